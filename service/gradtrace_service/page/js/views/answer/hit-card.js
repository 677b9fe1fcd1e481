// One training row: how it looks, how strongly it pushed, when in the training, and through which layers.
import { changed, link } from "../../address.js";
import { Example, kindOf } from "../../components/example.js";
import { Label } from "../../components/label.js";
import { ScoreBar } from "../../components/score.js";
import { Spark } from "../../components/spark.js";
import { count, labelText, measured, signed } from "../../format.js";
import { html, useEffect, useState } from "../../lib.js";
import { Differences } from "./differences.js";
import { Tokens } from "./tokens.js";
import { sharedWords } from "./words.js";

/** @typedef {import("../../wire.js").Hit} Hit */

/** @param {{ranked: import("./end.js").Ranked, side: string, shared: import("./end.js").Shared}} props */
export function HitCard({ ranked, side, shared }) {
  const { hit, rank } = ranked;
  const kind = kindOf(hit.example);
  const later = shared.more.get(hit.row);
  return html`<article class=${`hit ${side} ${kind}`} aria-label=${`${side} ${rank}: row ${hit.row}`}>
    ${kind === "image" && html`<div class="hit-picture"><${Example} example=${hit.example} alt=${`training row ${hit.row}`} /></div>`}
    <div class="hit-body">
      <header class="row"><span class="rank number">${rank}</span><${Label} label=${hit.label} name=${hit.label_name} />
        <a class="small row-link number" href=${link("answer", changed({ query: null, example: null, kept: null, train: hit.row, target: null, rather: null }))}
          title="Explain this training row">row ${count(hit.row)}</a>
        <${Verdict} hit=${hit} details=${shared.details} /></header>
      <${Content} hit=${hit} kind=${kind} shared=${shared} />
      <div class="hit-score"><span class="score number">${signed(hit.score)}</span><${ScoreBar} score=${hit.score} largest=${shared.largest} /></div>
      <p class="small soft number">${facts(hit, later?.percentile)}</p>
    </div>
    <${Shares} hit=${hit} layers=${later?.layers ?? null} />
  </article>`;
}

/** @param {{hit: Hit, kind: string, shared: import("./end.js").Shared}} props */
function Content({ hit, kind, shared }) {
  if (kind === "image") return null;
  if (kind === "text") {
    const words = sharedWords(shared.query.example?.text ?? "", hit.example?.text ?? "");
    const text = html`<${Example} example=${hit.example} lines=${5} mark=${words} />`;
    return shared.tokens ? html`<${ByToken} row=${hit.row} tokens=${shared.tokens} text=${text} />` : text;
  }
  if (kind === "features" && shared.query.example?.features) {
    return html`<${Differences} features=${hit.example?.features ?? {}} query=${shared.query.example.features} reach=${shared.reach} details=${shared.details} />`;
  }
  return html`<${Example} example=${hit.example} lines=${5} />`;
}

/** A text, and on request the tokens that the score comes from. @param {{row: number, tokens: NonNullable<import("./end.js").Shared["tokens"]>, text: any}} props */
function ByToken({ row, tokens, text }) {
  const [open, setOpen] = useState(tokens.all);
  useEffect(() => setOpen(tokens.all), [tokens.all]);
  return html`${open ? html`<${Tokens} row=${row} question=${tokens.question} text=${text} />` : text}
    <button type="button" class="button plain show-tokens" aria-expanded=${open} onClick=${() => setOpen(!open)}>${open ? "Hide" : "Show"} tokens</button>`;
}

/** What the model makes of the row, where it is not its label. @param {{hit: Hit, details: import("../../wire.js").IndexDetails}} props */
function Verdict({ hit, details }) {
  if (details.class_names === null && hit.prediction !== null) {
    return html`<span class="small soft number hit-verdict">predicted ${labelText(hit.prediction, hit.prediction_name)}</span>`;
  }
  if (hit.correct !== false) return null;
  const doubtful = looksMislabelled(hit, details.class_names?.length ?? 2);
  return html`<span class="row hit-verdict"><span class="small wrong">predicted ${labelText(hit.prediction, hit.prediction_name)}</span>
    ${doubtful && html`<span class="tag warning" title="The model predicts another class, and gives the label less than a guess would.">looks mislabelled</span>`}</span>`;
}

/** Whether the label has less than a guess's probability. @param {Hit} hit @param {number} classes */
function looksMislabelled({ loss, correct }, classes) {
  return correct === false && loss !== null && loss > Math.log(Math.max(classes, 2));
}

/** @param {Hit} hit @param {number | null | undefined} percentile */
function facts({ loss }, percentile) {
  const parts = [];
  if (loss !== null) parts.push(`loss ${measured(loss)}`);
  if (percentile !== null && percentile !== undefined) parts.push(percentileText(percentile));
  return parts.join(" · ");
}

/** @param {number} percentile */
function percentileText(percentile) {
  if (percentile === 0) return "the lowest of all rows";
  return percentile >= 50 ? `above ${share(percentile)} % of rows` : `below ${share(100 - percentile)} % of rows`;
}

/** Rounded down: no row is above 100 % of them. @param {number} percentage */
const share = (percentage) => (Math.floor(percentage * 100) / 100).toFixed(2);

/** Shares of the score. @param {{hit: Hit, layers: Record<string, number> | null}} props */
function Shares({ hit, layers }) {
  const parts = Object.entries(hit.parts ?? {});
  const byLayer = Object.entries(layers ?? {});
  if (parts.length < 2 && byLayer.length < 2) return null;
  return html`<div class="shares">
    ${parts.length > 1 && html`<figure><${Spark} values=${parts.map(([name, value]) => [name, value])} title="Score by checkpoint" width=${84} height=${26} /><figcaption>checkpoints</figcaption></figure>`}
    ${byLayer.length > 1 && html`<figure><${Spark} values=${byLayer} title="Score by layer" width=${84} height=${26} /><figcaption>layers</figcaption></figure>`}
  </div>`;
}
