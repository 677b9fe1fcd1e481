// How far the two sides agree: over all rows, and at their ends.
import { go } from "../../address.js";
import { Scatter } from "../../components/scatter.js";
import { Failed, Skeleton } from "../../components/states.js";
import { count, signed } from "../../format.js";
import { html, useMemo } from "../../lib.js";
import { chosenIndex } from "../../service.js";

/** @typedef {import("./asking.js").Asked} Asked */

/** @type {import("../../components/scatter.js").Styles} */
const STYLES = {
  others: { token: "--neutral-fill", size: 4 },
  first: { token: "--accent", size: 8, ring: true },
  second: { token: "--opponent-fill", size: 8, ring: true },
  both: { token: "--proponent-fill", size: 8 },
};

/** @param {{asked: Asked, first: import("./side.js").Side, second: import("./side.js").Side}} props */
export function Agreement({ asked, first, second }) {
  const { both } = asked;
  const points = useMemo(
    () => (both.data ? pointsOf(both.data, asked) : []),
    [both.data, asked.first.data, asked.second.data],
  );
  return html`<section class="panel cmp-agreement" aria-label="Agreement"><h2>Scores of all training rows</h2>
    ${
      both.problem
        ? html`<${Failed} problem=${both.problem} retry=${both.reload} title="The scores cannot be compared" />`
        : !both.data
          ? html`<${Skeleton} height="20rem" label="Comparing all rows" />`
          : html`<div class=${`cmp-plane${both.busy ? " stale" : ""}`}>
            <${Scatter} points=${points} styles=${STYLES} x=${`first: ${first.method}`} y=${`second: ${second.method}`} height=${340} zero
              label=${`Scores of ${count(both.data.rows)} rows: correlation ${fixed(both.data.pearson)}`}
              say=${(/** @type {any} */ { row, x, y }) => `row ${count(row)}: ${signed(x)}, ${signed(y)}`}
              pick=${(/** @type {any} */ { row }) => go("answer", { ...chosenIndex(), train: row })} />
            <${Figures} both=${both.data} k=${both.data.k} drawn=${points.length} /></div>`
    }</section>`;
}

/** @param {{both: import("./asking.js").Comparison, k: number, drawn: number}} props */
function Figures({ both, k, drawn }) {
  const figures = [
    ["Correlation (Pearson)", fixed(both.pearson)],
    ["Rank correlation (Spearman)", fixed(both.spearman)],
    ["Proponents in common", `${both.overlap.proponents} of ${k}`],
    ["Opponents in common", `${both.overlap.opponents} of ${k}`],
  ];
  const keys = [
    ["both", "hit of both"],
    ["first", "of the first alone"],
    ["second", "of the second alone"],
    ["others", "other row"],
  ];
  return html`<div class="stack">
    <dl class="cmp-figures">${figures.map(([name, value]) => html`<div><dt class="small soft">${name}</dt><dd class="number">${value}</dd></div>`)}</dl>
    <ul class="stack tight small">${keys.map(([name, words]) => html`<li class="row"><i class=${`cmp-key ${name}`}></i>${words}</li>`)}</ul>
    <p class="small soft">${drawn < both.rows ? `Drawn are ${count(drawn)} of ${count(both.rows)} rows: the hits, and an even sample.` : `All ${count(both.rows)} rows.`} The figures are over all rows. The units of two methods differ.</p></div>`;
}

/** @param {import("./asking.js").Comparison} both @param {Asked} asked */
function pointsOf({ points }, asked) {
  const [first, second] = [hitRows(asked.first), hitRows(asked.second)];
  return points.row.map((row, at) => {
    const style = first.has(row) ? (second.has(row) ? "both" : "first") : second.has(row) ? "second" : "others";
    return { row, x: points.first[at] ?? Number.NaN, y: points.second[at] ?? Number.NaN, style };
  });
}

/** @param {import("./asking.js").Answer} answer */
function hitRows({ data }) {
  const result = data?.results[0];
  return new Set([...(result?.proponents ?? []), ...(result?.opponents ?? [])].map(({ row }) => row));
}

/** @param {number | null} value */
function fixed(value) {
  return value === null || !Number.isFinite(value) ? "–" : value.toFixed(3).replace("-", "−");
}
