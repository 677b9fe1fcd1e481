// A number before and after, and how much it changed.
import { measured, percent, signed } from "../format.js";
import { html } from "../lib.js";

/** @param {{before: number, change: number, what: string, title?: string}} props what: in words; lower is better */
export function Change({ before, change, what, title = "Predicted" }) {
  const share = before !== 0 ? Math.abs(change / before) : 0;
  const words = change < 0 ? "lower" : change > 0 ? "higher" : "the same";
  return html`<div class="change"><span class="small soft">${title}, ${what}</span>
    <p class="change-numbers number"><span>${measured(before)}</span><span aria-label="becomes">→</span><strong>${measured(before + change)}</strong>
      <span class=${`tag ${change < 0 ? "good" : change > 0 ? "warning" : ""}`}>${signed(change)}${share ? `, ${percent(share)} ${words}` : ""}</span></p></div>`;
}
