// A table's row beside the query's: each value, and how far from the query's it is, in parts of the feature's range.
import { featureText } from "../../components/example.js";
import { measured, signed } from "../../format.js";
import { html } from "../../lib.js";

/**
 * @typedef {Record<string, number | string | null>} Features
 * @param {{features: Features, query: Features, details: import("../../wire.js").IndexDetails}} props
 */
export function Differences({ features, query, details }) {
  const known = details.input?.kind === "features" ? details.input.features : [];
  const ranges = new Map(known.map(({ name, min, max }) => [name, (max ?? 0) - (min ?? 0)]));
  return html`<table class="differences"><thead class="hidden"><tr><th>Feature</th><th>Value</th><th>Difference to the query</th></tr></thead>
    <tbody>${Object.entries(features).map(
      ([
        name,
        value,
      ]) => html`<tr key=${name}><th scope="row" title=${name}>${name}</th><td class="number">${featureText(value)}</td>
        <td class="difference"><${Difference} value=${value} query=${query[name]} range=${ranges.get(name) ?? 0} /></td></tr>`,
    )}</tbody></table>`;
}

/** @param {{value: number | string | null, query: number | string | null | undefined, range: number}} props */
function Difference({ value, query, range }) {
  if (value === query) return html`<span class="soft">same</span>`;
  if (typeof value !== "number" || typeof query !== "number") return html`<span>not ${featureText(query)}</span>`;
  const size = value - query;
  const share = range > 0 ? Math.min(Math.abs(size) / range, 1) : 0;
  const side = size < 0 ? "less" : "more";
  return html`<span class="difference-bar" title=${`the query has ${measured(query)}`}><i class=${side} style=${{ width: `${Math.max(share * 50, 1)}%` }}></i></span>
    <span class="number">${signed(size)}</span>`;
}
