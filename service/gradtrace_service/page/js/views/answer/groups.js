// Sums of the scores of all training rows with the same label, or with another column's value or range of values.
import { change } from "../../address.js";
import { api } from "../../api.js";
import { ScoreBar } from "../../components/score.js";
import { Failed, Skeleton } from "../../components/states.js";
import { count, exactly, labelText, plural, signed } from "../../format.js";
import { html } from "../../lib.js";
import { questionOf } from "../../question.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

/** By which rows are summed, with its words; the first unless another is chosen. @param {import("../../wire.js").IndexDetails} details */
function columnsOf({ class_names: names, input }) {
  const features = input?.kind === "features" ? input.features : [];
  const labels = [
    ["label", names ? "class" : "label"],
    ["prediction", "prediction"],
  ];
  return [
    ...(names || features.length ? labels : []),
    ...(names ? [["correct", "right or wrong"]] : []),
    ["loss", "loss"],
    ...(names || features.length ? [] : labels),
    ...features.map(({ name }) => [`feature:${name}`, name]),
  ];
}

/** @param {{params: URLSearchParams, source: import("../../question.js").Source, details: import("../../wire.js").IndexDetails}} props */
export function Groups({ params, source, details }) {
  const columns = columnsOf(details);
  const by = columns.find(([name]) => name === params.get("sums"))?.[0] ?? columns[0]?.[0] ?? "label";
  const body = { ...questionOf(params, source), by };
  const { data, problem, reload } = useResource(JSON.stringify([body, turn.value]), (signal) =>
    api.ask("influence/groups", body, { signal }),
  );
  /** @type {import("../../wire.js").Group[]} */
  const groups = data?.results[0]?.groups ?? [];
  const largest = Math.max(...groups.map(({ sum }) => Math.abs(sum)), 0);
  return html`<section class="panel" aria-label="Sums of scores">
    <div class="panel-head"><h2>Sums by</h2><select class="input inline" aria-label="Column of the sums" value=${by} onChange=${(/** @type {any} */ event) => change({ sums: event.target.value })}>
      ${columns.map(([name, words]) => html`<option value=${name}>${words}</option>`)}</select></div>
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
  return html`<li class="group" title=${`${name}: ${plural(group.rows, "row")}, mean ${signed(group.mean)}`}><span class="name">${name}</span>
    <${ScoreBar} score=${group.sum} largest=${largest} /><span class="number">${signed(group.sum)}</span><span class="hidden">over ${count(group.rows)} rows</span></li>`;
}

/** @param {import("../../wire.js").Group} group @param {string} by @param {import("../../wire.js").IndexDetails} details */
function nameOf({ group, group_name: name, bounds }, by, details) {
  if (bounds) return bounds.map(exactly).join(" to ");
  if (typeof group === "string") return group;
  if (by === "correct") return group === null ? "unknown" : group ? "right" : "wrong";
  const classes = by === "label" || by === "prediction" ? details.class_names : null;
  return labelText(typeof group === "boolean" ? Number(group) : group, name ?? classes?.[Number(group)]);
}
