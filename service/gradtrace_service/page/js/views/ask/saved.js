// Questions that people saved, the latest first; each leads to its answer.
import { change, numberIn } from "../../address.js";
import { useChanges } from "../../changes.js";
import { Dialog } from "../../components/dialog.js";
import { Icon } from "../../components/icons.js";
import { Pager } from "../../components/pager.js";
import { Empty, Failed, Skeleton } from "../../components/states.js";
import { toast } from "../../components/toast.js";
import { ago, clock } from "../../format.js";
import { html, useCallback, useState } from "../../lib.js";
import { useResource } from "../../resource.js";
import { deleteQuestion, savedQuestions } from "../../saved-questions.js";
import { who } from "../../service.js";

/** @typedef {import("../../wire.js").SavedQuestion} SavedQuestion */

const PAGE = 50;

/** @param {{params: URLSearchParams}} props */
export function Saved({ params }) {
  const [asked, ask] = useState(/** @type {SavedQuestion | null} */ (null));
  const offset = Math.max(Math.round(numberIn(params, "offset", 0)), 0);
  const list = useResource(String(offset), (signal) => savedQuestions(offset, PAGE, signal));
  const receive = useCallback((/** @type {import("../../changes.js").Change | null} */ change) => {
    if (!change || change.kind === "questions") list.reload();
  }, []);
  useChanges(receive);
  const remove = async (/** @type {SavedQuestion} */ { id }) => {
    ask(null);
    try {
      await deleteQuestion(id);
    } catch (problem) {
      toast(`Not deleted: ${/** @type {Error} */ (problem).message}`);
    }
    list.reload();
  };
  if (list.problem) return html`<div class="panel"><${Failed} problem=${list.problem} retry=${list.reload} /></div>`;
  if (!list.data) return html`<${Skeleton} lines=${4} height="3.5rem" label="Reading the saved questions" />`;
  const { total, results } = list.data;
  if (!total)
    return html`<div class="panel"><${Empty} title="No question is saved"><p>“Save question” above an answer keeps it here, for all who use this service.</p><//></div>`;
  return html`<ul class="panel saved" aria-label="Saved questions">${results.map(
    (question) =>
      html`<${Line} key=${question.id} question=${question} remove=${who.value.read_only ? null : () => ask(question)} />`,
  )}</ul>
    ${(total > PAGE || offset > 0) && html`<${Pager} offset=${offset} size=${PAGE} total=${total} what="questions" show=${(/** @type {number} */ next) => change({ offset: next || null })} />`}
    ${
      asked &&
      html`<${Dialog} title="Delete the question?" close=${() => ask(null)}><p>“${asked.title}” is then gone for all who use this service.</p>
      <div class="actions"><button type="button" class="button" onClick=${() => ask(null)}>Cancel</button>
        <button type="button" class="button danger" onClick=${() => remove(asked)}>Delete</button></div><//>`
    }`;
}

/** @param {{question: SavedQuestion, remove: (() => void) | null}} props */
function Line({ question: { title, address, note, who: name, when }, remove }) {
  const safe = /^[#?]/.test(address); // it stays on this page
  return html`<li class="saved-line"><div><a class="saved-title" href=${safe ? address : null}>${title}</a>
      ${note && html`<p class="small saved-note">${note}</p>`}
      <p class="small soft">${name ? `${name} · ` : ""}<time datetime=${when} title=${clock(when)}>${ago(when)}</time></p></div>
    ${remove && html`<button type="button" class="button plain icon" aria-label=${`Delete ${title}`} onClick=${remove}><${Icon} name="trash" /></button>`}</li>`;
}
