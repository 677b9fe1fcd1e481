// What one side of a comparison is: query, method, checkpoints, index.
import { change } from "../../address.js";
import { api } from "../../api.js";
import { Example } from "../../components/example.js";
import { Choice, Entry } from "../../components/fields.js";
import { Label } from "../../components/label.js";
import { count, measured } from "../../format.js";
import { html } from "../../lib.js";
import { useResource } from "../../resource.js";
import { indexes, indexName } from "../../service.js";
import { nameIn } from "./side.js";

/** @typedef {import("./side.js").Side} Side */

/** @param {{side: Side, params: URLSearchParams, details: import("../../wire.js").IndexDetails, result: import("../../wire.js").Influence | null}} props */
export function Form({ side, params, details, result }) {
  const { n, index } = side;
  const elsewhere = index !== indexName.value;
  const other = useResource(elsewhere ? `${index}` : null, (signal) => api.get("index", { query: { index }, signal }));
  const mine = elsewhere ? (other.data ?? details) : details;
  const title = n === 1 ? "First" : "Second";
  /** @param {string} name @returns {(value: string) => void} */
  const set = (name) => (value) => change({ [nameIn(name, n)]: value });
  return html`<section class=${`panel cmp-form side-${n}`} aria-label=${title}>
    <h2><span class=${`cmp-dot side-${n}`}></span>${title}</h2>
    <${Query} result=${result} />
    <div class="cmp-fields">
      ${indexes.value.length > 1 && html`<${Choice} name="Index" value=${index ?? indexes.value[0]?.name} options=${indexes.value.map(({ name }) => [name ?? "", name ?? "index"])} choose=${set("index")} />`}
      <${Method} side=${side} params=${params} details=${mine} />
      <${Checkpoints} side=${side} details=${mine} />
      <${Row} side=${side} details=${mine} />
    </div></section>`;
}

/** @param {{result: import("../../wire.js").Influence | null}} props */
function Query({ result }) {
  if (!result) return html`<div class="cmp-query"></div>`;
  const { query } = result;
  return html`<div class="cmp-query"><div class="cmp-example"><${Example} example=${query.example} alt="query" lines=${2} most=${3} /></div>
    <div class="stack tight"><p class="row">${query.count > 1 ? html`<span>${count(query.count)} queries, their mean</span>` : html`<${Label} label=${query.label} name=${query.label_name} />`}
      ${query.prediction !== null && html`<span class="small soft">predicted</span> <${Label} label=${query.prediction} name=${query.prediction_name} />`}</p>
      <p class="small soft number">${query.row === null ? "" : `${query.split} row ${count(query.row)} · `}loss ${measured(query.loss)}</p></div></div>`;
}

/** @param {{side: Side, params: URLSearchParams, details: import("../../wire.js").IndexDetails}} props */
function Method({ side, params, details }) {
  /** What was the second's by default stays what it was, when the first is changed. @param {string} method */
  const choose = (method) =>
    change(side.n === 2 ? { method2: method } : { method, method2: params.get("method2") ?? null });
  return html`<${Choice} name="Method" value=${side.method} options=${details.methods.map((name) => [name, name])} choose=${choose} />`;
}

/** @param {{side: Side, details: import("../../wire.js").IndexDetails}} props */
function Checkpoints({ side, details }) {
  const all = details.checkpoints.filter(({ kind }) => kind === "weights");
  const chosen = side.params.getAll("checkpoints");
  const runs = [...new Set(all.map(({ run }) => run))];
  const words = chosen.length > 1 ? [[chosen.join("\n"), `${chosen.length} of ${all.length}`]] : [];
  const options = [
    ["*", `All ${count(all.length)}`],
    ...words,
    ...all.map(({ name, step, run }) => [name, `Step ${count(step)}${runs.length > 1 ? `, run ${run + 1}` : ""}`]),
  ];
  /** @param {string} value */
  const choose = (value) =>
    change({ [nameIn("checkpoints", side.n)]: value === "*" ? (side.n === 2 ? ["*"] : null) : value.split("\n") });
  return html`<${Choice} name="Checkpoints" value=${chosen.length ? chosen.join("\n") : "*"} options=${options} choose=${choose} />`;
}

/** @param {{side: Side, details: import("../../wire.js").IndexDetails}} props */
function Row({ side, details }) {
  const { source, n } = side;
  if (!source || "example" in source) return html`<p class="small soft">Query: your own example</p>`;
  const split = "query_rows" in source ? "query" : "train";
  const rows = "query_rows" in source ? source.query_rows : source.train_rows;
  const most = (split === "query" ? details.query_rows : details.rows) - 1;
  /** @param {string} set @param {string} row */
  const choose = (set, row) =>
    change({
      [nameIn("query", n)]: set === "query" ? row : null,
      [nameIn("train", n)]: set === "train" ? row : null,
      ...(n === 1 && { example: null, kept: null }),
    });
  return html`<${Choice} name="Query from" value=${split} choose=${(/** @type {string} */ set) => choose(set, "0")}
      options=${[...(details.query_rows ? [["query", "Query set"]] : []), ["train", "Training set"]]} />
    ${
      rows.length > 1
        ? html`<p class="small soft">Mean of ${count(rows.length)} rows</p>`
        : html`<${Entry} name="Row" type="number" min="0" max=${most} step="1" value=${String(rows[0])}
            commit=${(/** @type {string} */ row) => row !== "" && choose(split, row)} />`
    }`;
}
