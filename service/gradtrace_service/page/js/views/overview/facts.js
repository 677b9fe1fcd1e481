// What an index is.
import { count, plural, present } from "../../format.js";
import { html } from "../../lib.js";

/** @param {{details: import("../../wire.js").IndexDetails}} props */
export function Facts({ details }) {
  const runs = new Set(details.checkpoints.map(({ run }) => run)).size;
  const weights = details.checkpoints.filter(({ kind }) => kind === "weights");
  const facts = [
    ["Training rows", `${count(present(details))}${details.deleted ? `, and ${count(details.deleted)} deleted` : ""}`],
    ["Query rows", count(details.query_rows)],
    [
      "Checkpoints",
      `${count(weights.length)}${runs > 1 ? ` of ${plural(runs, "run")}` : ""}, to step ${count(Math.max(...weights.map(({ step }) => step), 0))}`,
    ],
    ["Task", details.task],
    ["Basis", `${details.basis}, ${plural(details.dimensions, "dimension")}, ${details.precision}`],
    ["Generation", `${count(details.generation)}${details.verified ? "" : ", checksums not compared"}`],
    ["Methods", details.methods.join(", ")],
  ];
  return html`<dl class="ov-facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}
