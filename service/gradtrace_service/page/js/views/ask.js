import { html } from "../lib.js";
export function Ask() {
  return html`<h1>Ask</h1>`;
}
