// Short messages about what was done, perhaps with a way back.
import { html, signal } from "../lib.js";
import { Icon } from "./icons.js";

/** @typedef {{id: number, text: string, action?: {title: string, run: () => void}}} Message */

const SECONDS = 8;
const messages = signal(/** @type {Message[]} */ ([]));
let last = 0;

/** @param {string} text @param {Message["action"]} [action] */
export function toast(text, action) {
  const id = ++last;
  messages.value = [...messages.value.slice(-2), action ? { id, text, action } : { id, text }];
  setTimeout(() => dismiss(id), SECONDS * 1000);
}

/** @param {number} id */
function dismiss(id) {
  messages.value = messages.value.filter((message) => message.id !== id);
}

export function Toasts() {
  return html`<div class="toasts" role="status" aria-live="polite">
    ${messages.value.map(({ id, text, action }) => {
      const act = () => {
        dismiss(id);
        action?.run();
      };
      return html`<div class="toast" key=${id}>
        <span>${text}</span>
        <span class="row">
          ${action && html`<button type="button" class="button" onClick=${act}>${action.title}</button>`}
          <button type="button" class="button icon" aria-label="Dismiss" onClick=${() => dismiss(id)}><${Icon} name="close" /></button>
        </span>
      </div>`;
    })}
  </div>`;
}
