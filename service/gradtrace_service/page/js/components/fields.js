// Fields of forms, each with its name, and a hint where one is needed.
import { labelText } from "../format.js";
import { html, useEffect, useId, useState } from "../lib.js";

/** @param {{name: string, hint?: string, children: (id: string) => any}} props children: the control, which takes the id */
export function Field({ name, hint, children }) {
  const id = useId();
  return html`<div class="field"><label class="name" for=${id}>${name}</label>${children(id)}
    ${hint && html`<span class="hint" id=${`${id}-hint`}>${hint}</span>`}</div>`;
}

/**
 * @param {{name: string, hint?: string, value: string, options: [string, string][], choose: (value: string) => void}} props
 *   options: value and words of each
 */
export function Choice({ name, hint, value, options, choose }) {
  return html`<${Field} name=${name} hint=${hint}>${(/** @type {string} */ id) => html`<select class="input" id=${id}
    aria-describedby=${hint ? `${id}-hint` : null} value=${value} onChange=${(/** @type {any} */ event) => choose(event.target.value)}>
    ${options.map(([option, words]) => html`<option value=${option} selected=${option === value}>${words}</option>`)}
  </select>`}<//>`;
}

/** @param {{name: string, checked: boolean, set: (checked: boolean) => void}} props */
export function Check({ name, checked, set }) {
  return html`<label class="check"><input type="checkbox" checked=${checked}
    onChange=${(/** @type {any} */ event) => set(event.target.checked)} /><span>${name}</span></label>`;
}

/**
 * Any of the classes.
 * @param {{name: string, names: string[], chosen: number[], choose: (classes: number[]) => void, all?: string}} props
 */
export function ClassChoice({ name, names, chosen, choose, all = "All classes" }) {
  const left = names.map((_, label) => label).filter((label) => !chosen.includes(label));
  /** @param {string} value */
  const add = (value) => value !== "" && choose([...chosen, Number(value)]);
  return html`<div class="stack tight">
    <${Choice} name=${name} value="" choose=${add}
      options=${[["", chosen.length ? "Add a class" : all], ...left.map((label) => [String(label), names[label]])]} />
    ${
      chosen.length > 0 &&
      html`<ul class="row">${chosen.map(
        (label) => html`<li><button type="button" class="tag removable"
      onClick=${() => choose(chosen.filter((other) => other !== label))} aria-label=${`Remove ${labelText(label, names[label])}`}>
      ${labelText(label, names[label])} <span aria-hidden="true">×</span></button></li>`,
      )}</ul>`
    }
  </div>`;
}

/**
 * A text or number that counts with Enter or when the field is left; what is typed until then stays, whatever is drawn anew.
 * @param {{name: string, value: string, commit: (value: string) => void, [attribute: string]: any}} props
 */
export function Entry({ name, value, commit, ...attributes }) {
  const [text, setText] = useState(value);
  useEffect(() => setText(value), [value]);
  /** @param {any} event */
  const enter = ({ target }) => target.validity.valid && commit(target.value);
  return html`<${Field} name=${name}>${(
    /** @type {string} */ id,
  ) => html`<input class="input" id=${id} ...${attributes} value=${text}
    onInput=${(/** @type {any} */ event) => setText(event.target.value)} onChange=${enter} />`}<//>`;
}
