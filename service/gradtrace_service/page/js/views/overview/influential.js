// The rows that matter most to the whole query set.
import { link } from "../../address.js";
import { api } from "../../api.js";
import { HitLine } from "../../components/hit-line.js";
import { Failed, Notice, Skeleton } from "../../components/states.js";
import { count, plural, sentence } from "../../format.js";
import { html } from "../../lib.js";
import { MOST_QUERIES } from "../../question.js";
import { useResource } from "../../resource.js";
import { sampledRows } from "../../sample.js";
import { chosenIndex, turn } from "../../service.js";

const SHOWN = 8; // at either end
const BESIDE_A_MAP = 5; // of which is known later whether there is one: as many are asked for

/** @param {import("../../views.js").ViewProps & {half: boolean}} props half: of the view's width */
export function Influential({ params, details, half }) {
  const method = params.get("method") ?? "tracin";
  const all = details.query_rows || details.rows;
  const rows = sampledRows(all, MOST_QUERIES);
  const source = details.query_rows ? { query_rows: rows } : { train_rows: rows };
  const body = { ...chosenIndex(), ...source, aggregate: "mean", k: SHOWN, include: ["examples"], method };
  /** @type {import("../../resource.js").Resource<import("../../wire.js").InfluenceAnswer>} */
  const answer = useResource(JSON.stringify([body, details.generation, turn.value]), (signal) =>
    api.ask("influence", body, { signal }),
  );
  const result = answer.data?.results[0];
  const most = half ? BESIDE_A_MAP : SHOWN;
  const set = details.query_rows ? "query" : "training";
  const sampled =
    rows.length < all
      ? `${plural(rows.length, `${set} row`)}, evenly spaced among ${count(all)}`
      : `all ${plural(all, `${set} row`)}`;
  return html`<section class=${`panel ${half ? "ov-half" : "ov-full"}`} aria-label="Most influential rows"><h2>Most influential rows over the ${set} set</h2>
    <p class="small soft">By the mean score over ${sampled}. ${answer.data && (answer.data.exact ? "Exact." : recallText(answer.data))}
      ${" "}<a href=${link("answer", { ...chosenIndex(), [details.query_rows ? "query" : "train"]: rows.join(","), method: method === "tracin" ? null : method })}>The whole answer</a></p>
    ${
      answer.problem
        ? html`<${Failed} problem=${answer.problem} retry=${answer.reload} />`
        : !result
          ? html`<${Skeleton} lines=${4} height="3.5rem" label="Asking" />`
          : html`${result.note && html`<div class="ov-note"><${Notice}>${sentence(result.note)}<//></div>`}<div class=${`ov-ends${answer.busy ? " stale" : ""}`}>
            <${Side} title="Help most" hits=${result.proponents.slice(0, most)} /><${Side} title="Hurt most" hits=${result.opponents.slice(0, most)} /></div>`
    }</section>`;
}

/** @param {{title: string, hits: import("../../wire.js").Hit[]}} props */
function Side({ title, hits }) {
  const largest = Math.max(...hits.map(({ score }) => Math.abs(score)), 0);
  return html`<div><h3>${title}</h3><ol class="ov-hits">${hits.map((hit) => html`<li key=${hit.row}><${HitLine} hit=${hit} largest=${largest} /></li>`)}</ol>
    ${!hits.length && html`<p class="small soft">No row.</p>`}</div>`;
}

/** @param {import("../../wire.js").InfluenceAnswer} answer */
function recallText({ recall }) {
  return recall
    ? `Approximate: recall ${recall.top.toFixed(2)} at the top, ${recall.bottom.toFixed(2)} at the bottom.`
    : "Approximate.";
}
