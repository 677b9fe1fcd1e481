// A prompt, and what the model writes after it or might have written; of that, the words that are to be explained.
import { api } from "../../api.js";
import { Field } from "../../components/fields.js";
import { Notice } from "../../components/states.js";
import { html, useState } from "../../lib.js";
import { chosenIndex } from "../../service.js";

const MOST_TOKENS = 32;

/**
 * @typedef {{prompt: string, completion: string, written: import("../../wire.js").Completion | null, chosen: number[]}} Draft
 *   written: by the model, after this prompt;  chosen: numbers of its tokens
 */

/** @param {import("./own.js").InputProps} props */
export function OwnCompletion({ example, give, details }) {
  const [draft, setDraft] = useState(/** @type {Draft} */ (draftOf(example)));
  const [busy, setBusy] = useState(false);
  const [fault, setFault] = useState("");
  const texts = details.input?.kind === "text"; // whether a text alone may be asked about
  /** @param {Partial<Draft>} change */
  const set = (change) => {
    const next = { ...draft, ...change };
    setDraft(next);
    give(payloadOf(next, texts));
  };
  const complete = async () => {
    setBusy(true);
    setFault("");
    try {
      const body = { ...chosenIndex(), prompt: draft.prompt, max_tokens: MOST_TOKENS };
      const written = await api.ask("complete", body);
      set({ written, completion: written.text, chosen: [] });
    } catch (error) {
      setFault(String(/** @type {Error} */ (error).message));
    }
    setBusy(false);
  };
  /** @param {number[]} tokens */
  const toggle = (tokens) => {
    const without = draft.chosen.filter((token) => !tokens.includes(token));
    set({ chosen: without.length < draft.chosen.length ? without : [...without, ...tokens].sort((a, b) => a - b) });
  };
  /** @param {any} event */
  const typePrompt = ({ target }) => set({ prompt: target.value, written: null, chosen: [] });
  /** @param {any} event */
  const typeCompletion = ({ target }) => set({ completion: target.value, written: null, chosen: [] });
  return html`<${Field} name=${texts ? "Prompt, or a text" : "Prompt"}>${(
    /** @type {string} */ id,
  ) => html`<textarea class="input" id=${id} rows="4" placeholder="Type or paste a text" onInput=${typePrompt} dir="auto"
      disabled=${busy}>${draft.prompt}</textarea>`}<//>
    <div class="row"><button type="button" class="button" disabled=${busy || !draft.prompt} onClick=${complete}>Complete</button>
      <span class="soft small" role="status">${busy ? "The model writes …" : endOf(draft)}</span></div>
    ${fault && html`<${Notice} kind="warning">${fault}<//>`}
    <${Field} name="Completion" hint="Why this one? The words that come after the prompt.">${(
      /** @type {string} */ id,
    ) => html`<textarea class="input" id=${id} rows="3" placeholder="What the model wrote, or might have written"
      onInput=${typeCompletion} dir="auto" disabled=${busy}>${draft.completion}</textarea>`}<//>
    ${draft.written && html`<${Words} tokens=${draft.written.tokens} chosen=${draft.chosen} toggle=${toggle} />`}`;
}

/** @param {{tokens: string[], chosen: number[], toggle: (tokens: number[]) => void}} props */
function Words({ tokens, chosen, toggle }) {
  return html`<fieldset class="completion-words"><legend class="name">Only these words (none chosen: all)</legend>
    ${wordsOf(tokens).map(
      ({ text, numbers }) => html`<button type="button" class="completion-word" dir="auto"
        aria-pressed=${numbers.some((number) => chosen.includes(number))} onClick=${() => toggle(numbers)}>${text.trim() || "␣"}</button>`,
    )}</fieldset>`;
}

/** Tokens that belong to a word: all up to the next space. @param {string[]} tokens */
export function wordsOf(tokens) {
  /** @type {{text: string, numbers: number[]}[]} */
  const words = [];
  tokens.forEach((token, number) => {
    const last = words.at(-1);
    if (last && (!token || (/^\S/.test(token) && /\S$/.test(last.text) && !/^<.*>$/.test(token)))) {
      last.text += token;
      last.numbers.push(number);
    } else {
      words.push({ text: token, numbers: [number] });
    }
  });
  return words;
}

/** @param {Draft} draft @param {boolean} texts @returns {import("../../wire.js").Payload | null} */
function payloadOf({ prompt, completion, written, chosen }, texts) {
  if (written) return chosen.length ? { ...written.payload, only: chosen } : written.payload;
  if (completion) return { prompt, completion };
  return texts && prompt.trim() ? { text: prompt } : null;
}

/** @param {any} example @returns {Draft} */
function draftOf(example) {
  return {
    prompt: example?.prompt ?? example?.text ?? "",
    completion: example?.completion ?? "",
    written: null,
    chosen: [],
  };
}

/** Why the model wrote no more. @param {Draft} draft */
function endOf({ written }) {
  if (!written) return "";
  return written.ended === "end" ? "It ended the text." : "It might go on.";
}
