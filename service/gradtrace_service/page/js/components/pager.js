// Pages of a list, for lists that are not scrolled through.
import { count } from "../format.js";
import { html } from "../lib.js";
import { Icon } from "./icons.js";

/** @param {{offset: number, size: number, total: number, show: (offset: number) => void, what?: string}} props */
export function Pager({ offset, size, total, show, what = "rows" }) {
  const last = Math.min(offset + size, total);
  return html`<nav class="row" aria-label=${`Pages of ${what}`}>
    <button type="button" class="button icon" aria-label="Previous page" disabled=${offset <= 0} onClick=${() => show(Math.max(offset - size, 0))}><${Icon} name="left" /></button>
    <span class="small soft number" aria-live="polite">${total ? `${count(offset + 1)}–${count(last)} of ${count(total)}` : `no ${what}`}</span>
    <button type="button" class="button icon" aria-label="Next page" disabled=${last >= total} onClick=${() => show(offset + size)}><${Icon} name="right" /></button>
  </nav>`;
}
