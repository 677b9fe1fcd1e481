// The losses of the training rows: their mean by checkpoint, and their distribution.

import { Bars } from "../../components/bars.js";
import { axis, Chart } from "../../components/chart.js";
import { count, measured, plural } from "../../format.js";
import { html, useMemo } from "../../lib.js";

const COLOURS = ["--accent", "--proponent-fill", "--opponent-fill", "--ink-faint"];

/** @param {{losses: import("../../wire.js").OverviewAnswer["loss_by_checkpoint"]}} props */
export function CheckpointLosses({ losses }) {
  const known = losses.filter(({ mean_loss: loss }) => loss !== null);
  const runs = [...new Set(losses.map(({ run }) => run))];
  const data = useMemo(() => {
    const steps = [...new Set(losses.map(({ step }) => step))].sort((a, b) => a - b);
    const byRun = runs.map((run) =>
      steps.map((step) => losses.find((loss) => loss.run === run && loss.step === step)?.mean_loss ?? null),
    );
    return [steps, ...byRun];
  }, [losses]);
  if (!known.length) return html`<p class="small soft">The mean losses are not known yet.</p>`;
  const words = known.map(
    ({ step, run, mean_loss: loss }) => `${runs.length > 1 ? `run ${run + 1}, ` : ""}step ${step}: ${measured(loss)}`,
  );
  return html`<${Chart} data=${data} height=${190} label=${`Mean loss of the training rows. ${words.join("; ")}`} options=${(/** @type {(token: string) => string} */ paint) => options(paint, runs)} />
    <p class="small soft">Mean loss of ${runs.length > 1 ? `the training rows, of ${plural(runs.length, "run")}` : "the training rows"}; last: ${measured(known.at(-1)?.mean_loss)}.</p>`;
}

/** @param {(token: string) => string} paint @param {number[]} runs @returns {any} */
function options(paint, runs) {
  const short = (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(measured);
  return {
    cursor: { show: false },
    scales: {
      x: { time: false },
      y: {
        range: (/** @type {any} */ _, /** @type {number} */ low, /** @type {number} */ high) => [
          Math.min(0, low),
          (high || 1) * 1.08,
        ],
      },
    },
    axes: [
      axis(paint, { values: (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(count) }),
      axis(paint, { size: 52, values: short }),
    ],
    series: [
      {},
      ...runs.map((_, at) => ({
        stroke: paint(COLOURS[at % COLOURS.length] ?? "--accent"),
        width: 2,
        points: { show: true, size: 6, fill: paint(COLOURS[at % COLOURS.length] ?? "--accent") },
        spanGaps: true,
      })),
    ],
  };
}

/** @param {{histogram: import("../../wire.js").Histogram | null}} props */
export function LossDistribution({ histogram }) {
  if (!histogram) return html`<p class="small soft">The losses are not known.</p>`;
  const rows = histogram.counts.reduce((sum, n) => sum + n, 0);
  return html`<${Bars} histogram=${histogram} format=${measured} label=${`Losses of ${count(rows)} training rows, from ${measured(histogram.edges[0])} to ${measured(histogram.edges.at(-1))}`} />
    <p class="small soft">${plural(rows, "row")} by their loss at the last checkpoint; bins grow by a constant factor.</p>`;
}
