// The hits of the two sides beside each other; those of both are marked.
import { HitLine } from "../../components/hit-line.js";
import { Failed, Notice, Skeleton } from "../../components/states.js";
import { html } from "../../lib.js";

/** @typedef {import("./asking.js").Answer} Answer */

/** @param {{asked: import("./asking.js").Asked, first: import("./side.js").Side, second: import("./side.js").Side}} props */
export function Sides({ asked, first, second }) {
  const same = first.index === second.index; // else a row's number may be another row's
  return html`<div class="cmp-sides">
    <${Side} side=${first} answer=${asked.first} other=${same ? asked.second : null} />
    <${Side} side=${second} answer=${asked.second} other=${same ? asked.first : null} />
  </div>`;
}

/** @param {{side: import("./side.js").Side, answer: Answer, other: Answer | null}} props */
function Side({ side, answer, other }) {
  const result = answer.data?.results[0];
  const theirs = other?.data?.results[0] ?? null;
  const title = side.n === 1 ? "First" : "Second";
  const content = answer.problem
    ? html`<${Failed} problem=${answer.problem} retry=${answer.reload} />`
    : !result
      ? html`<${Skeleton} lines=${6} height="3.5rem" label="Asking" />`
      : html`${result.note && html`<${Notice}>${result.note}<//>`}
        <${End} title="Proponents" hits=${result.proponents} theirs=${theirs?.proponents ?? null} side=${side} />
        <${End} title="Opponents" hits=${result.opponents} theirs=${theirs?.opponents ?? null} side=${side} />
        <details class="fold"><summary>What the score means</summary><p class="small soft">${answer.data?.convention}</p></details>`;
  return html`<section class=${`panel stack${answer.busy ? " stale" : ""}`} aria-label=${`${title}: ${side.method}`} aria-busy=${answer.busy}>
    <h2><span class=${`cmp-dot side-${side.n}`}></span>${title}: ${side.method}</h2>${content}</section>`;
}

/** @param {{title: string, hits: import("../../wire.js").Hit[], theirs: import("../../wire.js").Hit[] | null, side: import("./side.js").Side}} props */
function End({ title, hits, theirs, side }) {
  const largest = Math.max(...hits.map(({ score }) => Math.abs(score)), 0);
  const ranks = new Map((theirs ?? []).map(({ row }, at) => [row, at + 1]));
  const other = side.n === 1 ? "second" : "first";
  return html`<div class="stack tight"><h3>${title}</h3><ol class="cmp-hits">${hits.map((hit) => {
    const rank = ranks.get(hit.row);
    const also = rank
      ? html`<span class="tag good" title=${`Number ${rank} of the ${other}'s ${title.toLowerCase()}`}>in both, ${rank === hits.indexOf(hit) + 1 ? "same rank" : `there ${rank}`}</span>`
      : null;
    return html`<li key=${hit.row} class=${rank ? "shared" : ""}><${HitLine} hit=${hit} largest=${largest} also=${also} index=${side.index} /></li>`;
  })}</ol>${!hits.length && html`<p class="small soft">No row.</p>`}</div>`;
}
