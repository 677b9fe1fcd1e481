// A histogram whose bins are drawn equally wide: what their edges are says the axis.
import { count } from "../format.js";
import { html } from "../lib.js";

const TICKS = 3;

/** @param {{histogram: import("../wire.js").Histogram, format: (edge: number) => string, label: string}} props */
export function Bars({ histogram, format, label }) {
  const { edges, counts } = histogram;
  const most = Math.max(...counts, 1);
  const step = Math.max(1, Math.round(counts.length / TICKS));
  const ticks = edges.map((edge, at) => ({ edge, at })).filter(({ at }) => at % step === 0 && at < counts.length);
  return html`<figure class="bars" role="img" aria-label=${label}>
    <div class="bars-plot">${counts.map(
      (
        rows,
        at,
      ) => html`<div class="bars-bin" title=${`${count(rows)} rows from ${format(edges[at] ?? 0)} to ${format(edges[at + 1] ?? 0)}`}>
        <i class="bars-fill" style=${{ height: `${(100 * rows) / most}%` }}></i></div>`,
    )}</div>
    <div class="bars-axis small soft" aria-hidden="true">${ticks.map(
      ({ edge, at }) =>
        html`<span class="number" style=${{ left: `${(100 * at) / counts.length}%` }}>${format(edge)}</span>`,
    )}</div></figure>`;
}

/**
 * How many of the values are in each bin; where all are positive and their sizes differ much, each bin is wider than
 * the one before by the same factor.
 * @param {number[]} values @param {number} [bins] @returns {import("../wire.js").Histogram | null}
 */
export function histogramOf(values, bins = 40) {
  if (!values.length) return null;
  const sorted = Float64Array.from(values).sort();
  const high = sorted.at(-1) ?? 0;
  const low = sorted[Math.floor(sorted.length * 0.01)] ?? 0; // a few that are almost zero would stretch the axis
  if (high === low) return { edges: [low, low + 1], counts: [values.length] };
  const log = low > 0 && high / low > 100;
  const edges = Array.from({ length: bins + 1 }, (_, at) =>
    log ? low * (high / low) ** (at / bins) : low + ((high - low) * at) / bins,
  );
  const counts = new Array(bins).fill(0);
  for (const value of values) {
    const share = log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
    counts[Math.min(Math.max(Math.floor(share * bins), 0), bins - 1)] += 1;
  }
  return { edges, counts };
}
