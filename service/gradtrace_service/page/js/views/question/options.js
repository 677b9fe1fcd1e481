// How a question is asked: what is explained, by which method, over which checkpoints and rows.
import { change } from "../../address.js";
import { Check, Choice, ClassChoice, Field } from "../../components/fields.js";
import { count, measured, plural } from "../../format.js";
import { html } from "../../lib.js";
import { DEFAULT_K, hitsOf } from "../../question.js";

/** @typedef {import("../../views.js").ViewProps} ViewProps */

const HITS = [5, 10, 20, 50, 100];

/** @param {ViewProps} props */
export function Options({ params, details }) {
  return html`<section class="stack" aria-label="How to ask">
    <${Target} params=${params} details=${details} />
    <${Method} params=${params} details=${details} />
    <${Hits} params=${params} />
    <${Checkpoints} params=${params} details=${details} />
    <${Filter} params=${params} details=${details} />
  </section>`;
}

/** @param {ViewProps} props */
function Target({ params, details }) {
  const names = details.class_names;
  if (!names) return null;
  const target = params.get("target");
  const rather = params.get("rather");
  const kind = target === null ? "default" : target === "loss" ? "loss" : rather === null ? "class" : "contrast";
  const classes = names.map((name, label) => /** @type {[string, string]} */ ([String(label), name]));
  /** @param {string} next */
  const choose = (next) => {
    const label = target !== null && target !== "loss" ? target : "0";
    if (next === "class") change({ target: label, rather: null });
    else if (next === "contrast") change({ target: label, rather: label === "0" ? "1" : "0" });
    else change({ target: null, rather: null });
  };
  return html`<${Choice} name="Explain" value=${kind} choose=${choose} options=${[
    ["default", "Its label, or the prediction"],
    ["class", "Another class: why not …?"],
    ["contrast", "A contrast: … rather than …"],
  ]} />
  ${
    (kind === "class" || kind === "contrast") &&
    html`<div class="pair">
    <${Choice} name=${kind === "class" ? "Why not" : "Why"} value=${target} options=${classes} choose=${(/** @type {string} */ label) => change({ target: label })} />
    ${kind === "contrast" && html`<${Choice} name="Rather than" value=${rather} options=${classes.filter(([label]) => label !== target)} choose=${(/** @type {string} */ label) => change({ rather: label })} />`}
  </div>`
  }`;
}

/** @param {ViewProps} props */
function Method({ params, details }) {
  const first = details.methods[0] ?? "tracin";
  const method = params.get("method") ?? (details.methods.includes("tracin") ? "tracin" : first);
  const options = details.methods.map((name) => /** @type {[string, string]} */ ([name, name]));
  return html`<${Choice} name="Method" value=${method} options=${options}
    choose=${(/** @type {string} */ name) => change({ method: name === "tracin" ? null : name })} />`;
}

/** @param {{params: URLSearchParams}} props */
function Hits({ params }) {
  const k = hitsOf(params);
  const options = [...new Set([...HITS, k])].sort((a, b) => a - b);
  return html`<${Choice} name="Rows at each end" value=${String(k)} options=${options.map((n) => [String(n), String(n)])}
    choose=${(/** @type {string} */ value) => change({ k: Number(value) === DEFAULT_K ? null : value })} />`;
}

/** @param {ViewProps} props */
function Checkpoints({ params, details }) {
  const all = details.checkpoints.filter(({ kind }) => kind === "weights");
  if (all.length < 2) return null;
  const chosen = params.getAll("checkpoints");
  const runs = [...new Set(all.map(({ run }) => run))];
  /** @param {string[]} names */
  const set = (names) => change({ checkpoints: names.length === all.length ? null : names });
  /** @param {string} name @param {boolean} on */
  const toggle = (name, on) => {
    const now = new Set(chosen.length ? chosen : all.map((checkpoint) => checkpoint.name));
    if (on) now.add(name);
    else if (now.size > 1) now.delete(name);
    set(all.map((checkpoint) => checkpoint.name).filter((other) => now.has(other)));
  };
  const words = chosen.length
    ? `${chosen.length} of ${plural(all.length, "checkpoint")}`
    : `All ${count(all.length)} checkpoints`;
  return html`<details class="fold"><summary>${words}</summary><div class="stack tight">
    ${
      runs.length > 1 &&
      html`<div class="row">${runs.map(
        (run) => html`<button type="button" class="button"
      onClick=${() => set(all.filter((checkpoint) => checkpoint.run === run).map(({ name }) => name))}>Run ${run + 1}</button>`,
      )}
      <button type="button" class="button" onClick=${() => set([])}>All runs</button></div>`
    }
    <fieldset class="checkpoints"><legend class="hidden">Checkpoints</legend>
    ${all.map(
      ({
        name,
        step,
        run,
        learning_rate: rate,
      }) => html`<${Check} key=${name} checked=${!chosen.length || chosen.includes(name)}
      set=${(/** @type {boolean} */ on) => toggle(name, on)}
      name=${`step ${count(step)}${runs.length > 1 ? `, run ${run + 1}` : ""} · rate ${measured(rate)}`} />`,
    )}</fieldset>
  </div></details>`;
}

/** @param {ViewProps} props */
function Filter({ params, details }) {
  const names = details.class_names;
  const labels = params.getAll("labels").map(Number);
  const predicted = params.getAll("predicted").map(Number);
  const least = params.get("min_loss") ?? "";
  const set = [labels.length, predicted.length, params.has("correct"), least !== ""].filter(Boolean).length;
  /** @param {any} event */
  const setLeast = (event) => change({ min_loss: event.target.value });
  return html`<details class="fold" open=${set > 0}><summary>${set ? `Only some training rows (${plural(set, "condition")})` : "All training rows"}</summary>
    <div class="stack tight">
      ${
        names &&
        html`<${ClassChoice} name="Label" names=${names} chosen=${labels} choose=${(/** @type {number[]} */ next) => change({ labels: next })} />
      <${ClassChoice} name="Predicted as" names=${names} chosen=${predicted} choose=${(/** @type {number[]} */ next) => change({ predicted: next })} />`
      }
      <${Check} name="Correctly predicted rows" checked=${params.has("correct")} set=${(/** @type {boolean} */ on) => change({ correct: on })} />
      <${Field} name="Loss at least">${(/** @type {string} */ id) => html`<input class="input" id=${id} type="number" min="0" step="any" value=${least} onChange=${setLeast} />`}<//>
      <${Check} name="Recompute the best from full gradients" checked=${params.has("rescore")} set=${(/** @type {boolean} */ on) => change({ rescore: on })} />
    </div></details>`;
}
