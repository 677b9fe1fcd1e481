import { html } from "../lib.js";
export function Answer() {
  return html`<h1>Answer</h1>`;
}
