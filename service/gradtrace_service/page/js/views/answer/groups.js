// Sums of the scores of all training rows with the same label, or another column's value.
import { api } from "../../api.js";
import { ScoreBar } from "../../components/score.js";
import { Failed, Skeleton } from "../../components/states.js";
import { count, labelText, plural, signed } from "../../format.js";
import { html, useState } from "../../lib.js";
import { questionOf } from "../../question.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

const COLUMNS = /** @type {const} */ ([
  ["label", "class"],
  ["prediction", "prediction"],
  ["correct", "right or wrong"],
]);

/** @param {{params: URLSearchParams, source: import("../../question.js").Source, details: import("../../wire.js").IndexDetails}} props */
export function Groups({ params, source, details }) {
  const [by, setBy] = useState("label");
  const body = { ...questionOf(params, source), by };
  const { data, problem, reload } = useResource(JSON.stringify([body, turn.value]), (signal) =>
    api.ask("influence/groups", body, { signal }),
  );
  /** @type {import("../../wire.js").Group[]} */
  const groups = data?.results[0]?.groups ?? [];
  const largest = Math.max(...groups.map(({ sum }) => Math.abs(sum)), 0);
  return html`<section class="panel" aria-label="Sums of scores">
    <div class="panel-head"><h2>Sums by</h2><select class="input inline" aria-label="Column of the sums" value=${by} onChange=${(/** @type {any} */ event) => setBy(event.target.value)}>
      ${COLUMNS.map(([name, words]) => html`<option value=${name}>${words}</option>`)}</select></div>
    ${
      problem
        ? html`<${Failed} problem=${problem} retry=${reload} />`
        : data
          ? html`<ul class="groups" tabindex=${groups.length > 8 ? 0 : null}>${groups.map((group) => html`<${Sum} key=${String(group.group)} group=${group} name=${nameOf(group, by, details)} largest=${largest} />`)}</ul>`
          : html`<${Skeleton} height="9rem" label="Summing scores" />`
    }
  </section>`;
}

/** @param {{group: import("../../wire.js").Group, name: string, largest: number}} props */
function Sum({ group, name, largest }) {
  return html`<li class="group" title=${`${plural(group.rows, "row")}, mean ${signed(group.mean)}`}><span class="name">${name}</span>
    <${ScoreBar} score=${group.sum} largest=${largest} /><span class="number">${signed(group.sum)}</span><span class="hidden">over ${count(group.rows)} rows</span></li>`;
}

/** @param {import("../../wire.js").Group} group @param {string} by @param {import("../../wire.js").IndexDetails} details */
function nameOf({ group, group_name: name }, by, details) {
  if (by === "correct") return group === null ? "unknown" : group ? "right" : "wrong";
  return labelText(typeof group === "boolean" ? Number(group) : group, name ?? details.class_names?.[Number(group)]);
}
