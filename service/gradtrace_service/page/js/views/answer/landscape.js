// Where the answer lies: the scores of all training rows as a histogram, with the hits marked.
import uPlot from "../../../vendor/uplot.js";
import { axis, Chart } from "../../components/chart.js";
import { Skeleton } from "../../components/states.js";
import { count, measured, signed } from "../../format.js";
import { html, useMemo } from "../../lib.js";

/** @typedef {import("../../wire.js").Influence} Influence */

const HEIGHT = 140;

/** @param {{result: Influence, distribution: import("../../wire.js").Distribution | null}} props */
export function Landscape({ result, distribution }) {
  return html`<section class="panel" aria-label="Scores of all training rows"><h2>Scores of all training rows</h2>
    ${distribution?.histogram ? html`<${Histogram} result=${result} distribution=${distribution} />` : distribution ? html`<${Quantiles} distribution=${distribution} />` : html`<${Skeleton} height=${`${HEIGHT}px`} label="Counting scores" />`}
  </section>`;
}

/** @param {{result: Influence, distribution: import("../../wire.js").Distribution}} props */
function Histogram({ result, distribution }) {
  const { edges, counts } = distribution.histogram ?? { edges: [], counts: [] };
  const data = useMemo(() => {
    const middles = counts.map((_, at) => ((edges[at] ?? 0) + (edges[at + 1] ?? 0)) / 2);
    return [middles, counts.map((n) => Math.log10(1 + n))]; // else all but the middle bars are too low to be seen
  }, [distribution]);
  const rows = counts.reduce((sum, n) => sum + n, 0);
  const words = `Histogram of ${count(rows)} scores from ${signed(edges[0])} to ${signed(edges.at(-1))}; mean ${signed(distribution.mean)}, standard deviation ${measured(distribution.std)}. The hits lie at its ends.`;
  return html`<${Chart} data=${data} height=${HEIGHT} label=${words} options=${(/** @type {(token: string) => string} */ paint) => optionsOf(paint, result, edges)} />
    <p class="small soft">Rows on a logarithmic scale; marks below: the hits. Mean ${signed(distribution.mean)}, standard deviation ${measured(distribution.std)}.</p>`;
}

/** @param {(token: string) => string} paint @param {Influence} result @param {number[]} edges */
function optionsOf(paint, result, edges) {
  const colours = {
    proponent: paint("--proponent-fill"),
    opponent: paint("--opponent-fill"),
    zero: paint("--line-strong"),
  };
  /** @param {uPlot} plot */
  const marks = (plot) => {
    verticals(plot, [0], colours.zero, plot.bbox.height);
    verticals(
      plot,
      result.proponents.map(({ score }) => score),
      colours.proponent,
      16 * devicePixelRatio,
    );
    verticals(
      plot,
      result.opponents.map(({ score }) => score),
      colours.opponent,
      16 * devicePixelRatio,
    );
  };
  /** @type {any} */
  const options = {
    cursor: { show: false },
    scales: {
      x: { time: false, range: [edges[0] ?? 0, edges.at(-1) ?? 1] },
      y: {
        range: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ high) => [
          0,
          Math.max(high, 1) * 1.05,
        ],
      },
    },
    axes: [
      axis(paint, { size: 28, values: (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(measured) }),
      axis(paint, {
        size: 54,
        splits: (
          /** @type {any} */ _,
          /** @type {number} */ __,
          /** @type {number} */ ___,
          /** @type {number} */ high,
        ) => [0, 1, 2, 3, 4, 5, 6].filter((tick) => tick <= high),
        values: (/** @type {any} */ _, /** @type {number[]} */ ticks) =>
          ticks.map((tick) => count(tick === 0 ? 0 : 10 ** tick)),
      }),
    ],
    series: [
      {},
      {
        fill: paint("--neutral-fill"),
        width: 0,
        points: { show: false },
        paths: uPlot.paths.bars?.({ size: [1, 100], gap: 1 }),
      },
    ],
    hooks: { draw: [marks] },
  };
  return options;
}

/** @param {uPlot} plot @param {number[]} at @param {string} colour @param {number} height in device pixels, from the bottom */
function verticals(plot, at, colour, height) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.fillStyle = colour;
  for (const value of at) {
    const x = plot.valToPos(value, "x", true);
    if (x >= bbox.left - 2 && x <= bbox.left + bbox.width + 2)
      ctx.fillRect(
        Math.round(x) - 1,
        bbox.top + bbox.height - height,
        Math.max(1, Math.round(1.5 * devicePixelRatio)),
        height,
      );
  }
  ctx.restore();
}

/** Where the service counts no histogram. @param {{distribution: import("../../wire.js").Distribution}} props */
function Quantiles({ distribution }) {
  return html`<table class="features"><tbody>${Object.entries(distribution.quantiles).map(([share, value]) => html`<tr><th scope="row">${share} % of rows are below</th><td class="number">${signed(value)}</td></tr>`)}</tbody></table>`;
}
