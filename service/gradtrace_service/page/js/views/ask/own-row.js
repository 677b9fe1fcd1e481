// A table's row, with the ranges that the training data has.
import { Choice, Field } from "../../components/fields.js";
import { measured } from "../../format.js";
import { html, useEffect } from "../../lib.js";

/** @typedef {import("../../wire.js").Feature} Feature */

/** @param {import("./own.js").InputProps} props */
export function OwnRow({ example, give, details }) {
  const features = details.input?.kind === "features" ? details.input.features : [];
  const values = example?.features ?? Object.fromEntries(features.map((feature) => [feature.name, usual(feature)]));
  useEffect(() => {
    if (!example?.features) give({ features: values });
  }, []);
  /** @param {string} name @param {number | string | null} value */
  const set = (name, value) => give({ features: { ...values, [name]: value } });
  return html`<p class="soft">It begins with the median of each feature.</p>
    <div class="table-form">${features.map(
      (feature) => html`<${FeatureField} key=${feature.name} feature=${feature} value=${values[feature.name] ?? null}
        set=${(/** @type {number | string | null} */ value) => set(feature.name, value)} />`,
    )}</div>`;
}

/** Of whole numbers, a median may lie between two of them, and the field would refuse it. @param {Feature} feature */
function usual({ median, choices, min, integer }) {
  if (choices) return choices[0] ?? null;
  const value = median ?? min ?? 0;
  return integer ? Math.round(value) : value;
}

/** @param {{feature: Feature, value: number | string | null, set: (value: number | string | null) => void}} props */
function FeatureField({ feature, value, set }) {
  const { name, min, max, choices, integer } = feature;
  if (choices) {
    return html`<${Choice} name=${name} value=${String(value)} options=${choices.map((choice) => [choice, choice])} choose=${set} />`;
  }
  /** @param {any} event */
  const type = ({ target }) => set(target.value === "" ? null : Number(target.value));
  const outside = typeof value === "number" && min !== null && max !== null && (value < min || value > max);
  const range = min === null || max === null ? "" : `training data: ${measured(min)} to ${measured(max)}`;
  return html`<${Field} name=${name} hint=${outside ? `outside of the ${range}` : range}>${(
    /** @type {string} */ id,
  ) => html`<span class="number-and-range">
    <input class="input" id=${id} type="number" step=${integer ? 1 : "any"} value=${value ?? ""} onInput=${type} aria-describedby=${`${id}-hint`} />
    ${range && html`<input type="range" min=${min} max=${max} step=${integer ? 1 : stepOf(min ?? 0, max ?? 1)} value=${value ?? min} onInput=${type} aria-label=${`${name}, by a slider`} />`}
  </span>`}<//>`;
}

/** @param {number} min @param {number} max */
function stepOf(min, max) {
  return max > min ? 10 ** Math.floor(Math.log10((max - min) / 200)) : 1;
}
