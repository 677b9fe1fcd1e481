// A training row with its score, in a line.
import { link } from "../address.js";
import { count, labelText, signed } from "../format.js";
import { html } from "../lib.js";
import { chosenIndex } from "../service.js";
import { Example, featureText, kindOf } from "./example.js";
import { Label } from "./label.js";
import { ScoreBar } from "./score.js";

const FEATURES = 4;

/** @param {{hit: import("../wire.js").Hit, largest: number, also?: any, index?: string | null}} props also: said beside the row; index: of the row, where it is not the one that is looked at */
export function HitLine({ hit, largest, also, index }) {
  const { example } = hit;
  const kind = kindOf(example);
  const features = Object.entries(example?.features ?? {}).slice(0, FEATURES);
  return html`<article class=${`hit-line ${kind}`} aria-label=${`row ${hit.row}`}>
    ${kind === "image" && html`<div class="hit-line-picture"><${Example} example=${example} alt=${`training row ${hit.row}`} /></div>`}
    <div class="hit-line-body">
      <div class="row"><${Label} label=${hit.label} name=${hit.label_name} />
        ${hit.correct === false && html`<span class="small wrong">predicted ${labelText(hit.prediction, hit.prediction_name)}</span>`}
        <a class="small number" href=${link("answer", { ...chosenIndex(), ...(index ? { index } : {}), train: hit.row })}>row ${count(hit.row)}</a>${also}</div>
      ${kind === "text" && html`<${Example} example=${example} lines=${2} />`}
      ${features.length > 0 && html`<p class="small soft">${features.map(([name, value]) => `${name} ${featureText(value)}`).join(" · ")}</p>`}
      <div class="hit-line-score"><span class="number">${signed(hit.score)}</span><${ScoreBar} score=${hit.score} largest=${largest} /></div>
    </div></article>`;
}
