// Dialogs of what is kept of an answer.
import { Dialog } from "../../components/dialog.js";
import { Field } from "../../components/fields.js";
import { Notice } from "../../components/states.js";
import { toast } from "../../components/toast.js";
import { html, useState } from "../../lib.js";
import { saveQuestion, toAll } from "../../saved-questions.js";

const LONGEST_TITLE = 200; // characters
const LONGEST_NOTE = 1000;

/** @param {{address: string, title: string, close: () => void}} props */
export function SaveQuestion({ address, title, close }) {
  const [problem, setProblem] = useState(/** @type {Error | null} */ (null));
  /** @param {any} event */
  const submit = async (event) => {
    event.preventDefault();
    const { title: titled, note } = Object.fromEntries(new FormData(event.target));
    try {
      await saveQuestion({ title: String(titled).trim(), note: String(note).trim(), address });
    } catch (failure) {
      return setProblem(/** @type {Error} */ (failure));
    }
    toast("The question is saved, for all who use this service.", toAll());
    close();
  };
  return html`<${Dialog} title="Save the question" close=${close}><form class="stack" onSubmit=${submit}>
    <${Field} name="Title">${(/** @type {string} */ id) => html`<input class="input" id=${id} name="title" required pattern=".*\\S.*" maxlength=${LONGEST_TITLE} defaultValue=${title.slice(0, LONGEST_TITLE)} />`}<//>
    <${Field} name="Note" hint="What others should look at">${(/** @type {string} */ id) => html`<textarea class="input short" id=${id} name="note" maxlength=${LONGEST_NOTE}></textarea>`}<//>
    ${problem && html`<${Notice} kind="danger">Not saved: ${problem.message}<//>`}
    <div class="actions"><button type="button" class="button" onClick=${close}>Cancel</button><button class="button primary">Save</button></div>
  </form><//>`;
}

/** @param {{address: string, close: () => void}} props */
export function CopyByHand({ address, close }) {
  return html`<${Dialog} title="Copy the link" close=${close}>
    <${Field} name="Link" hint="The browser does not let this page copy it: it was not loaded over HTTPS.">${(
      /** @type {string} */ id,
    ) =>
      html`<input class="input" id=${id} readonly value=${address} onFocus=${(/** @type {any} */ event) => event.target.select()} />`}<//>
    <div class="actions"><button type="button" class="button" onClick=${close}>Close</button></div><//>`;
}
