// A mark, in a word and a colour.
import { ago, clock, labelText } from "../../format.js";
import { html } from "../../lib.js";

/** @param {{mark: import("../../marks.js").Mark}} props */
export function MarkChip({ mark }) {
  return html`<span class=${`mark-chip mark-${mark.mark}`} title=${`${markText(mark)}, ${clock(mark.when)}`}>${mark.mark}</span>`;
}

/** Who marked it, and when. @param {import("../../marks.js").Mark} mark */
export function markText({ mark, label, label_name: name, who, when }) {
  const suggested = label === null ? "" : `, suggested label ${labelText(label, name)}`;
  return `${mark}${suggested} · ${who ?? "somebody"} · ${ago(when)}`;
}
