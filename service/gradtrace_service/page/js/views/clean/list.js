// The rows to look at, as pictures or lines, with their marks.
import { change } from "../../address.js";
import { Example, featureText } from "../../components/example.js";
import { Failed } from "../../components/states.js";
import { VirtualList } from "../../components/virtual.js";
import { examples } from "../../examples.js";
import { count, labelText, measured } from "../../format.js";
import { html, useMemo, useRef } from "../../lib.js";
import { marks } from "../../marks.js";
import { MarkChip, markText } from "./mark-chip.js";

/**
 * @typedef {import("./ranking.js").Candidate} Candidate
 * @typedef {Candidate & {example: import("../../wire.js").Payload | null}} Shown
 */

const GRID = { itemWidth: 104, itemHeight: 152 };
const LINES = { itemHeight: 68 };

/** @param {{list: Candidate[], at: number, details: import("../../wire.js").IndexDetails}} props */
export function CandidateList({ list, at, details }) {
  const lists = useRef(0);
  const id = useMemo(() => String(++lists.current), [list]);
  const pictures = details.input?.kind === "image";
  /** @param {number} offset @param {number} size @param {AbortSignal} signal */
  const load = async (offset, size, signal) => {
    const part = list.slice(offset, offset + size);
    const page = part.length
      ? await examples("train", { labels: [], rows: part.map(({ row }) => row) }, 0, part.length, signal)
      : { results: [] };
    const byRow = new Map(page.results.map((result) => [result.row, result.example]));
    return {
      total: list.length,
      items: part.map((candidate) => ({ ...candidate, example: byRow.get(candidate.row) ?? null })),
    };
  };
  /** @param {Shown | null} shown @param {number} place @param {any} focus */
  const render = (shown, place, focus) => {
    if (!shown) return html`<div class="skeleton filled" aria-hidden="true"></div>`;
    const mark = marks.value.get(shown.row);
    const words = `row ${count(shown.row)}, ${verdictText(shown)}${mark ? `, marked ${markText(mark)}` : ""}`;
    return html`<button type="button" class=${`pick ${pictures ? "tile" : "line"} ${mark ? "marked" : ""}`} ...${focus}
      aria-current=${place === at ? "true" : null} aria-label=${words} onClick=${() => change({ row: shown.row })}>
      ${pictures ? html`<${Tile} shown=${shown} />` : html`<${Line} shown=${shown} />`}
      ${mark && html`<${MarkChip} mark=${mark} />`}</button>`;
  };
  return html`<${VirtualList} id=${id} load=${load} render=${render} label="Rows to look at" at=${at}
    onMove=${(/** @type {number} */ next) => list[next] && change({ row: list[next].row })} ...${pictures ? GRID : LINES}
    failed=${(/** @type {Error} */ problem, /** @type {() => void} */ retry) => html`<${Failed} problem=${problem} retry=${retry} />`} />`;
}

/** @param {{shown: Shown}} props */
function Tile({ shown }) {
  return html`<span class="tile-picture"><${Example} example=${shown.example} alt="" /></span>
    <span class="tile-words"><${Verdict} shown=${shown} /></span>`;
}

/** @param {{shown: Shown}} props */
function Line({ shown }) {
  const features = shown.example?.features;
  return html`<span class="line-row soft number">${count(shown.row)}</span>
    <span class="line-example">${
      features
        ? Object.entries(features)
            .map(([name, value]) => `${name} ${featureText(value)}`)
            .join(" · ")
        : html`<${Example} example=${shown.example} lines=${2} otherwise=${html`<span class="small soft number">loss ${measured(shown.loss)}</span>`} />`
    }</span><span class="line-words"><${Verdict} shown=${shown} /></span>`;
}

/** @param {{shown: Candidate}} props */
function Verdict({ shown }) {
  const label = shown.label === null ? "" : labelText(shown.label, shown.label_name);
  if (shown.prediction === null || shown.correct === true) return html`<span>${label}</span>`;
  return html`<span>${label} <span class=${`predicted ${shown.correct === false ? "wrong" : "soft"}`}>→ ${labelText(shown.prediction, shown.prediction_name)}</span></span>`;
}

/** @param {Candidate} candidate */
export function verdictText({ label, label_name, prediction, prediction_name, loss }) {
  const words = [
    ...(label === null ? [] : [`labelled ${labelText(label, label_name)}`]),
    ...(prediction === null ? [] : [`predicted ${labelText(prediction, prediction_name)}`]),
  ];
  return [...words, `loss ${measured(loss)}`].join(", ");
}
