// A modal dialog: the browser's own, which keeps the focus inside, and closes with Escape.
import { html, useEffect, useId, useRef } from "../lib.js";

/** @param {{title: string, close: () => void, children?: any}} props */
export function Dialog({ title, close, children }) {
  const dialog = useRef(/** @type {HTMLDialogElement | null} */ (null));
  const heading = useId();
  useEffect(() => {
    dialog.current?.showModal();
  }, []);
  return html`<dialog class="dialog" ref=${dialog} aria-labelledby=${heading} onClose=${close}>
    <div class="stack"><h2 id=${heading}>${title}</h2>${children}</div>
  </dialog>`;
}
