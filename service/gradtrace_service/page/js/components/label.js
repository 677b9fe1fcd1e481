// A class, or a number to be predicted, as a chip; the same class has the same colour everywhere.
import { labelText } from "../format.js";
import { html } from "../lib.js";

const GOLDEN_ANGLE = 137.508; // neighbouring classes get distant hues

/** Nothing where there is no label. @param {{label: number | null | undefined, name?: string | null | undefined}} props */
export function Label({ label, name }) {
  if ((label === null || label === undefined) && !name) return null;
  const text = labelText(label, name);
  const valued = !name; // a number to be predicted, most likely
  const hue = (Number(label ?? 0) * GOLDEN_ANGLE + 250) % 360;
  return html`<span class=${`label${valued ? " valued" : ""}`} style=${{ "--hue": hue }} title=${text}><span>${text}</span></span>`;
}
