// A table's row beside the query's: each value, and how far from the query's it is, in parts of the feature's range.
import { featureText } from "../../components/example.js";
import { exactly, signed } from "../../format.js";
import { html } from "../../lib.js";

/**
 * @typedef {Record<string, number | string | null>} Features
 * @param {{features: Features, query: Features, reach: number, details: import("../../wire.js").IndexDetails}} props
 */
export function Differences({ features, query, reach, details }) {
  const ranges = rangesOf(details);
  return html`<table class="differences"><thead class="hidden"><tr><th>Feature</th><th>Value</th><th>Difference to the query</th></tr></thead>
    <tbody>${Object.entries(features).map(
      ([
        name,
        value,
      ]) => html`<tr key=${name}><th scope="row" title=${name}>${name}</th><td class="number">${featureText(value)}</td>
        <td class="difference"><${Difference} value=${value} query=${query[name]} range=${(ranges.get(name) ?? 0) * reach} /></td></tr>`,
    )}</tbody></table>`;
}

/**
 * The largest difference of any row to the query, in parts of its feature's range: the scale that all bars share.
 * @param {(Features | undefined)[]} rows @param {Features | undefined} query @param {import("../../wire.js").IndexDetails} details
 */
export function reachOf(rows, query, details) {
  let reach = 0;
  for (const [name, range] of rangesOf(details)) {
    const middle = query?.[name];
    if (typeof middle !== "number" || !(range > 0)) continue;
    for (const row of rows) {
      const value = row?.[name];
      if (typeof value === "number") reach = Math.max(reach, Math.abs(value - middle) / range);
    }
  }
  return reach;
}

/** @param {import("../../wire.js").IndexDetails} details */
function rangesOf(details) {
  const known = details.input?.kind === "features" ? details.input.features : [];
  return new Map(known.map(({ name, min, max }) => [name, (max ?? 0) - (min ?? 0)]));
}

/** @param {{value: number | string | null, query: number | string | null | undefined, range: number}} props */
function Difference({ value, query, range }) {
  if (value === query) return html`<span class="soft">same</span>`;
  if (typeof value !== "number" || typeof query !== "number") return html`<span>not ${featureText(query)}</span>`;
  const size = value - query;
  const share = range > 0 ? Math.min(Math.abs(size) / range, 1) : 0;
  const side = size < 0 ? "less" : "more";
  return html`<span class="difference-bar" title=${`the query has ${exactly(query)}`}><i class=${side} style=${{ width: `${Math.max(share * 50, 1)}%` }}></i></span>
    <span class="number">${signed(size)}</span>`;
}
