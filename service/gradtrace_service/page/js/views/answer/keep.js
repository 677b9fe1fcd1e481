// What is kept of an answer: its link, its question among those that people saved, all of it as a file.
import { link } from "../../address.js";
import { Icon } from "../../components/icons.js";
import { toast } from "../../components/toast.js";
import { save } from "../../download.js";
import { html, useState } from "../../lib.js";
import { questionParams } from "../../question.js";
import { indexes, indexName, who } from "../../service.js";
import { answerDocument } from "./asking.js";
import { CopyByHand, SaveQuestion } from "./keep-dialogs.js";

const TOO_LONG = "The example is too long for an address. Save the answer as a file instead.";
const LONGEST_ADDRESS = 4000; // that the service saves

/** @param {{params: URLSearchParams, source: import("../../question.js").Source, title: string}} props title: the question, in words */
export function Keep({ params, source, title }) {
  const [shown, show] = useState(/** @type {"link" | "question" | null} */ (null));
  const [busy, setBusy] = useState(false);
  const address = addressOf(params);
  const whole = !params.has("kept");
  const copy = async () => {
    if (!whole) return toast(TOO_LONG);
    try {
      await navigator.clipboard.writeText(full(address));
      toast("The link is copied.");
    } catch {
      show("link"); // browsers keep the clipboard from pages that came without TLS
    }
  };
  const keep = () => (whole && address.length <= LONGEST_ADDRESS ? show("question") : toast(TOO_LONG));
  const file = async () => {
    setBusy(true);
    try {
      await save(await answerDocument(params, source), fileName(title));
    } catch (problem) {
      toast(`Not saved: ${/** @type {Error} */ (problem).message}`);
    } finally {
      setBusy(false);
    }
  };
  const close = () => show(null);
  return html`<button type="button" class="button plain" onClick=${copy}><${Icon} name="share" /> Copy link</button>
    ${!who.value.read_only && html`<button type="button" class="button plain" onClick=${keep}><${Icon} name="bookmark" /> Save question</button>`}
    <button type="button" class="button plain" disabled=${busy} onClick=${file}><${Icon} name="download" /> ${busy ? "Saving" : "Save as file"}</button>
    ${shown === "link" && html`<${CopyByHand} address=${full(address)} close=${close} />`}
    ${shown === "question" && html`<${SaveQuestion} address=${address} title=${title} close=${close} />`}`;
}

/** The question alone; with its index, which may not be the first one tomorrow. @param {URLSearchParams} params */
function addressOf(params) {
  const question = questionParams(params);
  const index = indexName.value ?? (indexes.value.length > 1 ? indexes.value[0]?.name : null);
  if (index) question.set("index", index);
  return link("answer", question);
}

/** @param {string} address */
const full = (address) => new URL(address, location.href).href;

/** @param {string} title */
function fileName(title) {
  const words = title.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  return `${words.join("-").slice(0, 80) || "answer"}.html`;
}
