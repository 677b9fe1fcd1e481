// What was asked about: the example, what the model makes of it, and what is explained.
import { change, changed, go, link, rowsIn } from "../../address.js";
import { Problem } from "../../api.js";
import { Example, kindOf, notRendered } from "../../components/example.js";
import { Icon } from "../../components/icons.js";
import { Label } from "../../components/label.js";
import { Skeleton } from "../../components/states.js";
import { examples } from "../../examples.js";
import { labelText, measured, percent, plural } from "../../format.js";
import { html } from "../../lib.js";
import { withExample } from "../../question.js";
import { useResource } from "../../resource.js";

/**
 * @typedef {import("../../wire.js").QueryInfo} QueryInfo
 * @typedef {import("../../wire.js").IndexDetails} IndexDetails
 */

const MOST_BARS = 6;
const MOST_PICTURES = 24;

/**
 * @param {{params: URLSearchParams, details: IndexDetails, source: import("../../question.js").Source, query: QueryInfo | null,
 *   problem: Error | null}} props problem: why there is no answer, so that nobody waits for what only it knows
 */
export function QueryCard({ params, details, source, query, problem }) {
  if (!query && problem) return concernsAll(problem) ? null : html`<${Unanswered} source=${source} />`;
  if (!query) return html`<div class="panel"><${Skeleton} height="12rem" label="Loading the query" /></div>`;
  const alone = query.count === 1;
  return html`<section class="panel stack query-card" aria-label="The query">
    ${alone ? html`<div class=${`query-example ${kindOf(query.example)}`}><${Example} example=${query.example} alt="the query" lines=${14} otherwise=${notRendered} /></div>` : html`<${Slice} source=${source} query=${query} />`}
    <dl class="facts">
      ${(query.label !== null || !alone) && html`<div><dt>Label</dt><dd>${query.label === null ? "several" : html`<${Label} label=${query.label} name=${query.label_name} />`}</dd></div>`}
      ${query.prediction !== null && html`<div><dt>Predicted</dt><dd><${Label} label=${query.prediction} name=${query.prediction_name} /></dd></div>`}
      ${query.loss !== null && html`<div><dt>${alone ? "Loss" : "Mean loss"}</dt><dd class="number">${measured(query.loss)}</dd></div>`}
      <div><dt>Explained</dt><dd>${query.target}</dd></div>
    </dl>
    ${query.probabilities && html`<${Probabilities} params=${params} probabilities=${query.probabilities} />`}
    ${alone && details.input && details.input.kind !== "other" && html`<${Edit} query=${query} />`}
  </section>`;
}

/** Whether it keeps the service from answering anything, so that there is no use in asking for more. @param {Error} problem */
function concernsAll(problem) {
  return !(problem instanceof Problem) || [0, 429, 502, 503, 504].includes(problem.status);
}

/** The rows that were asked about, as the data set has them; nothing where it has none such. @param {{source: import("../../question.js").Source}} props */
function Unanswered({ source }) {
  if ("example" in source) return null;
  const split = "query_rows" in source ? "query" : "train";
  const rows = "query_rows" in source ? source.query_rows : source.train_rows;
  const list = useRows(split, rows.slice(0, MOST_PICTURES));
  const [row] = list.data?.results ?? [];
  if (!row) return null;
  return html`<section class="panel stack query-card" aria-label="The query">
    ${
      rows.length === 1
        ? html`<div class=${`query-example ${kindOf(row.example)}`}><${Example} example=${row.example} alt="the query" lines=${14} /></div>
      ${row.label !== null && html`<dl class="facts"><div><dt>Label</dt><dd><${Label} label=${row.label} name=${row.label_name} /></dd></div></dl>`}`
        : html`<h2>${plural(rows.length, "row")}</h2><${Pictures} rows=${list.data?.results ?? []} />`
    }
  </section>`;
}

/** @param {import("../../wire.js").Split} split @param {number[]} rows */
function useRows(split, rows) {
  return useResource(JSON.stringify([split, rows]), (signal) =>
    examples(split, { labels: [], rows }, 0, rows.length, signal),
  );
}

/** @param {{rows: import("../../wire.js").Example[]}} props */
function Pictures({ rows }) {
  return html`<ul class="slice-rows">${rows.map(
    (row) =>
      html`<li class=${kindOf(row.example)}><${Example} example=${row.example} alt=${`row ${row.row}`} lines=${1} most=${2} /></li>`,
  )}</ul>`;
}

/** @param {{params: URLSearchParams, probabilities: import("../../wire.js").Probability[]}} props */
function Probabilities({ params, probabilities }) {
  const target = params.get("target");
  return html`<section aria-label="Probabilities"><h2>Probabilities <span class="hint">choose one to ask why</span></h2>
    <ul class="probabilities">${probabilities.slice(0, MOST_BARS).map(({ label, label_name: name, probability }) => {
      const asked = target === String(label) && !params.has("rather");
      return html`<li key=${label}><button type="button" class="probability" aria-pressed=${asked}
        onClick=${() => change({ target: asked ? null : label, rather: null }, { keep: true })}>
        <span class="name">${labelText(label, name)}</span><span class="bar"><i style=${{ width: `${probability * 100}%` }}></i></span>
        <span class="number">${percent(probability)}</span></button></li>`;
    })}</ul></section>`;
}

/** The queries of a mean. @param {{source: import("../../question.js").Source, query: QueryInfo}} props */
function Slice({ source, query }) {
  const split = "query_rows" in source ? "query" : "train";
  const rows = (query.rows ?? []).slice(0, MOST_PICTURES);
  const list = useRows(split, rows);
  return html`<h2>The mean of ${plural(query.count, "row")}</h2>
    <${Pictures} rows=${list.data?.results ?? []} />${query.count > rows.length && html`<p class="small soft">and ${query.count - rows.length} more</p>`}`;
}

/** Begin a question of one's own with this example. @param {{query: QueryInfo}} props */
function Edit({ query }) {
  const edit = () => {
    const label = query.label === null ? {} : { label: query.label };
    go("ask", changed({ from: "own", ...withExample({ ...query.example, ...label }) }));
  };
  return html`<button type="button" class="button plain" onClick=${edit}><${Icon} name="pencil" /> Change it and ask again</button>`;
}

/** The rows before and after. @param {import("../../views.js").ViewProps} props */
export function Neighbours({ params, details }) {
  const split = rowsIn(params, "query").length === 1 ? "query" : rowsIn(params, "train").length === 1 ? "train" : null;
  if (!split) return null;
  const row = rowsIn(params, split)[0] ?? 0;
  const rows = split === "query" ? details.query_rows : details.rows;
  /** @param {number} to @param {"left" | "right"} name @param {string} words */
  const step = (to, name, words) =>
    to >= 0 && to < rows
      ? html`<a class="button icon" href=${link("answer", changed({ [split]: to }))} aria-label=${words}><${Icon} name=${name} /></a>`
      : html`<span class="button icon" aria-hidden="true"><${Icon} name=${name} /></span>`;
  return html`<nav class="row neighbours" aria-label="Rows">${step(row - 1, "left", "The row before")}${step(row + 1, "right", "The row after")}</nav>`;
}
