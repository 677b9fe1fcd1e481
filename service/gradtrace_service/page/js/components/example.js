// An example as its task renders it: a picture, a text, or a row of a table.
import { exactly } from "../format.js";
import { html } from "../lib.js";

const SMALL = 128; // pixels: smaller pictures are shown with sharp pixels

/** @typedef {import("../wire.js").Payload} Payload */

/** @param {Payload | null | undefined} example @returns {"image" | "text" | "features" | "error" | "none"} */
export function kindOf(example) {
  if (typeof example?.image === "string") return "image";
  if (typeof example?.text === "string") return "text";
  if (example?.features && typeof example.features === "object") return "features";
  return typeof example?.error === "string" ? "error" : "none";
}

/** Whether the task renders it: else it has only numbers. @param {Payload | null | undefined} example */
export const isRendered = (example) => Boolean(example && Object.keys(example).length);

/**
 * @param {{example: Payload | null | undefined, alt?: string, lines?: number, mark?: Set<string>, most?: number, otherwise?: any}} props
 *   lines: of text, further ones are cut.  mark: words, in lower case, that are marked.  most: features shown.  otherwise: where
 *   the task does not render it
 */
export function Example({ example, alt = "example", lines, mark, most, otherwise = null }) {
  const kind = kindOf(example);
  if (kind === "image") return html`<${Picture} source=${example?.image} alt=${alt} />`;
  if (kind === "text")
    return html`<${Text} text=${example?.text} soft=${promptLength(example)} lines=${lines} mark=${mark} />`;
  if (kind === "features") return html`<${Features} features=${example?.features} most=${most} />`;
  if (kind === "error") return html`<p class="small soft">This row cannot be shown: ${example?.error}</p>`;
  if (!isRendered(example)) return otherwise;
  return html`<${Text} text=${JSON.stringify(example)} lines=${lines} />`;
}

/** Said once in a view. */
export const notRendered = html`<p class="small soft">The task defines no <code>render</code>: rows have only their numbers.</p>`;

/** @param {{source: string, alt: string}} props */
function Picture({ source, alt }) {
  // A data URL by contract; anything else would have the browser fetch it, which the page's policy refuses.
  if (!source.startsWith("data:image/")) return html`<p class="small soft">The picture is not a data URL.</p>`;
  /** @param {any} event */
  const sharpen = ({ target }) =>
    target.classList.toggle("small", Math.max(target.naturalWidth, target.naturalHeight) < SMALL);
  return html`<span class="picture-frame"><img class="example-image" src=${source} alt=${alt} onLoad=${sharpen} decoding="async" /></span>`;
}

/** Of a text that is a prompt with its completion, as language tasks render it. @param {any} example */
function promptLength({ text, prompt, completion }) {
  return typeof prompt === "string" && typeof completion === "string" && text.startsWith(prompt) ? prompt.length : 0;
}

/** @param {{text: string, soft?: number, lines?: number, mark?: Set<string>}} props  soft: characters in a softer ink */
export function Text({ text, soft = 0, lines, mark }) {
  /** @param {string} piece */
  const shown = (piece) => (mark?.size ? marked(piece, mark) : piece);
  const content = soft
    ? [html`<span class="soft">${shown(text.slice(0, soft))}</span>`, shown(text.slice(soft))]
    : shown(text);
  return html`<div class=${`example-text${lines ? " clamped" : ""}`} style=${lines ? { "--lines": lines } : null} dir="auto">${content}</div>`;
}

/** @param {string} text @param {Set<string>} words */
function marked(text, words) {
  return text
    .split(/([\p{L}\p{N}]+)/u)
    .map((piece, at) => (at % 2 && words.has(piece.toLowerCase()) ? html`<mark>${piece}</mark>` : piece));
}

/** @param {{features: Record<string, number | string | null>, most?: number}} props */
function Features({ features, most = Number.POSITIVE_INFINITY }) {
  const all = Object.entries(features);
  return html`<table class="features"><tbody>
    ${all.slice(0, most).map(([name, value]) => html`<tr><th scope="row">${name}</th><td>${featureText(value)}</td></tr>`)}
    ${all.length > most && html`<tr><th scope="row" colspan="2">and ${all.length - most} more</th></tr>`}
  </tbody></table>`;
}

/** @param {number | string | null | undefined} value */
export function featureText(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "number" ? exactly(value) : value;
}
