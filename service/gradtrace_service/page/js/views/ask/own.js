// An example of one's own, given as the task takes it.
import { changed, go } from "../../address.js";
import { Choice, Field } from "../../components/fields.js";
import { Empty, Notice } from "../../components/states.js";
import { html, useState } from "../../lib.js";
import { exampleOf, withExample } from "../../question.js";
import { OwnCompletion } from "./own-completion.js";
import { OwnImage } from "./own-image.js";
import { OwnRow } from "./own-row.js";

/**
 * @typedef {import("../../wire.js").Payload} Payload
 * @typedef {{example: Payload | null, give: (example: Payload | null) => void, details: import("../../wire.js").IndexDetails}} InputProps
 *   give: what the example is now; null: it is not complete
 */

/** @param {import("../../views.js").ViewProps} props */
export function Own({ params, details }) {
  const before = exampleOf(params);
  const [example, give] = useState(/** @type {Payload | null} */ (unlabelled(before)));
  const [label, setLabel] = useState(before?.label === undefined ? "" : String(before.label));
  if (details.input === null) {
    return html`<${Empty} title="This task takes no examples of your own">
      <p>It defines no <code>parse</code>, which would read them. Choose a row of its data instead.</p><//>`;
  }
  /** @param {Event} event */
  const submit = (event) => {
    event.preventDefault();
    if (!example) return;
    const labelled = label === "" ? example : { ...example, label: Number(label) };
    go("answer", changed(withExample(labelled)));
  };
  const lost = params.has("kept") && !before;
  return html`<form class="panel stack" onSubmit=${submit}>
    ${lost && html`<${Notice} kind="warning">The example was too long for the address, so this link does not hold it. Give it again.<//>`}
    <${inputOf(details)} example=${example} give=${give} details=${details} />
    <div class="row">
      ${!details.can_complete && html`<div class="own-label"><${LabelField} details=${details} label=${label} set=${setLabel} /></div>`}
      <button class="button primary" disabled=${!example}>Explain it</button>
    </div>
  </form>`;
}

/** @param {Payload | null} example */
function unlabelled(example) {
  if (!example) return null;
  const { label: _, ...input } = example;
  return input;
}

/** @param {InputProps["details"]} details */
function inputOf(details) {
  if (details.can_complete) return OwnCompletion;
  const kind = details.input?.kind;
  return kind === "image" ? OwnImage : kind === "text" ? OwnText : kind === "features" ? OwnRow : OwnJson;
}

/** @param {{details: InputProps["details"], label: string, set: (label: string) => void}} props */
function LabelField({ details, label, set }) {
  const hint = "Without one, what is explained is the prediction.";
  const names = details.class_names;
  if (names) {
    const options = [["", "not given"], ...names.map((name, at) => [String(at), name])];
    return html`<${Choice} name="Its label" hint=${hint} value=${label} options=${options} choose=${set} />`;
  }
  return html`<${Field} name="Its label" hint=${hint}>${(/** @type {string} */ id) => html`<input class="input" id=${id}
    type="number" step="any" value=${label} onInput=${(/** @type {any} */ event) => set(event.target.value)} />`}<//>`;
}

/** @param {InputProps} props */
function OwnText({ example, give }) {
  /** @param {any} event */
  const type = ({ target }) => give(target.value.trim() ? { text: target.value } : null);
  return html`<${Field} name="Text">${(
    /** @type {string} */ id,
  ) => html`<textarea class="input" id=${id} rows="7" placeholder="Type or paste a text"
    onInput=${type} dir="auto">${example?.text ?? ""}</textarea>`}<//>`;
}

/** @param {InputProps} props */
function OwnJson({ example, give }) {
  const [fault, setFault] = useState("");
  /** @param {any} event */
  const type = ({ target }) => {
    try {
      const value = JSON.parse(target.value);
      const fits = typeof value === "object" && value !== null && !Array.isArray(value);
      setFault(fits ? "" : "It must be an object, such as {…}.");
      give(fits ? value : null);
    } catch (error) {
      setFault(String(/** @type {Error} */ (error).message));
      give(null);
    }
  };
  return html`<${Field} name="Example, as JSON in the task's own form" hint=${fault || "The task's parse reads it."}>${(
    /** @type {string} */ id,
  ) => html`<textarea
    class="input" id=${id} rows="8" spellcheck="false" aria-invalid=${fault !== ""} onInput=${type}>${example ? JSON.stringify(example, null, 2) : ""}</textarea>`}<//>`;
}
