// Which class helps or hurts which: for the query rows of each class, the mean score of the training rows of each.
import { change, link } from "../../address.js";
import { api } from "../../api.js";
import { Choice } from "../../components/fields.js";
import { Failed } from "../../components/states.js";
import { labelText, plural, signed } from "../../format.js";
import { html, useEffect, useState } from "../../lib.js";
import { useResource } from "../../resource.js";
import { sampledRows } from "../../sample.js";
import { chosenIndex, turn } from "../../service.js";

/**
 * @typedef {import("../../wire.js").OverviewAnswer["labels"]} Labels
 * @typedef {{label: number, queries: number[], means: Map<number, number>}} Line  means: by training label
 */

const MOST_CLASSES = 20;
const QUERIES = 16; // of each class

/** @param {import("../../views.js").ViewProps & {labels: Labels}} props */
export function HeatMap({ params, details, labels }) {
  const method = params.get("method") ?? "tracin";
  const classes = [...labels].sort((a, b) => b.rows - a.rows).slice(0, MOST_CLASSES);
  classes.sort((a, b) => a.label - b.label);
  const { lines, problem, retry } = useLines(
    classes.map(({ label }) => label),
    method,
    details.generation,
  );
  const sizes = lines.flatMap(({ means }) => [...means.values()].map(Math.abs));
  const largest = Math.max(...sizes, 0);
  const byLabel = new Map(lines.map((line) => [line.label, line]));
  const few = labels.length > classes.length ? `The ${classes.length} largest of ${labels.length} classes. ` : "";
  return html`<section class="panel ov-wide" aria-label="Influence by class"><div class="ov-head"><h2>Which class helps or hurts which</h2>
      <${Choice} name="Method" value=${method} options=${details.methods.map((name) => [name, name])}
        choose=${(/** @type {string} */ name) => change({ method: name === "tracin" ? null : name })} /></div>
    ${problem && html`<${Failed} problem=${problem} retry=${retry} />`}
    <div class="scrolls" tabindex="0" role="region" aria-label="Table of influence by class" aria-busy=${lines.length < classes.length}><table class="heat"><caption class="hidden">Mean score of training rows of a class on query rows of a class</caption>
      <thead><tr><td class="small soft">queries ↓<br />training rows →</td>${classes.map((train) => html`<th class="heat-name" scope="col">${labelText(train.label, train.label_name)}</th>`)}</tr></thead>
      <tbody>${classes.map(
        (query) =>
          html`<tr><th class="heat-name heat-query" scope="row">${labelText(query.label, query.label_name)}</th>${classes.map((train) => html`<${Cell} line=${byLabel.get(query.label)} train=${train.label} largest=${largest} method=${method} />`)}</tr>`,
      )}</tbody></table></div>
    <p class="small soft">${few}Mean score of a training row of the column's class on ${plural(QUERIES, "query row")} (fewer where there are fewer, evenly spaced) of the line's class; <span class="heat-key helps">above zero they help</span>, <span class="heat-key hurts">below they hurt</span>. The depth of the colour grows with the square root. A click shows the rows.</p>
  </section>`;
}

/** @param {{line: Line | undefined, train: number, largest: number, method: string}} props */
function Cell({ line, train, largest, method }) {
  if (!line) return html`<td class="heat-wait"></td>`;
  const mean = line.means.get(train);
  if (mean === undefined) return html`<td class="soft">–</td>`;
  const depth = largest > 0 ? 60 * Math.sqrt(Math.abs(mean) / largest) : 0;
  const address = {
    ...chosenIndex(),
    query: line.queries.join(","),
    labels: train,
    method: method === "tracin" ? null : method,
  };
  return html`<td><a class=${`number ${mean < 0 ? "hurts" : "helps"}`} style=${{ "--depth": `${depth}%` }} href=${link("answer", address)} title=${signed(mean)}>${short(mean, largest)}</a></td>`;
}

/** Few characters: two digits, and nothing where it is next to nothing. @param {number} value @param {number} largest */
function short(value, largest) {
  if (Math.abs(value) < largest / 2_000) return "0";
  return signed(Number(value.toPrecision(2))).replace(/^([+−]?)0\./, "$1.");
}

/** The lines as they come, one request each. @param {number[]} labels @param {string} method @param {number} generation */
function useLines(labels, method, generation) {
  const key = JSON.stringify([chosenIndex(), labels, method, generation, turn.value]);
  const [lines, setLines] = useState(/** @type {Line[]} */ ([]));
  useEffect(() => setLines([]), [key]);
  const { problem, reload } = useResource(key, async (signal) => {
    const byLabel = await queriesByLabel(signal);
    for (const label of labels) {
      const all = byLabel.get(label) ?? [];
      const queries = sampledRows(all.length, QUERIES).map((at) => all[at] ?? 0);
      const means = queries.length ? await meansOf(queries, method, signal) : new Map();
      if (signal.aborted) return;
      setLines((last) => [...last.filter((line) => line.label !== label), { label, queries, means }]);
    }
  });
  return { lines, problem, retry: reload };
}

/** @param {AbortSignal} signal */
async function queriesByLabel(signal) {
  /** @type {import("../../wire.js").ColumnsAnswer} */
  const { rows, columns } = await api.get("columns/query", {
    query: { ...chosenIndex(), names: ["label"], k: 20_000 },
    signal,
  });
  const byLabel = new Map();
  for (const [at, label] of (columns.label ?? []).entries()) {
    if (!byLabel.has(label)) byLabel.set(label, []);
    byLabel.get(label).push(rows[at]);
  }
  return byLabel;
}

/** @param {number[]} queries @param {string} method @param {AbortSignal} signal */
async function meansOf(queries, method, signal) {
  const body = { ...chosenIndex(), query_rows: queries, aggregate: "mean", by: "label", method };
  /** @type {import("../../wire.js").GroupsAnswer} */
  const answer = await api.ask("influence/groups", body, { signal });
  return new Map((answer.results[0]?.groups ?? []).map(({ group, mean }) => [Number(group), mean]));
}
