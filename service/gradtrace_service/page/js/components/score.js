// A score as a bar from zero: to the right for proponents, to the left for opponents, on one scale for all.
import { signed } from "../format.js";
import { html } from "../lib.js";

/** @param {{score: number, largest: number}} props largest: the largest absolute score on the scale */
export function ScoreBar({ score, largest }) {
  const share = largest > 0 ? Math.min(Math.abs(score) / largest, 1) : 0;
  return html`<div class="score-bar" role="img" aria-label=${`score ${signed(score)}`}>
    <i class=${score < 0 ? "negative" : "positive"} style=${{ width: `${Math.max(share * 50, 0.5)}%` }}></i></div>`;
}
