// One end of an answer: its rows as cards, near-duplicates folded into the first of them.

import { Empty } from "../../components/states.js";
import { plural } from "../../format.js";
import { html, useState } from "../../lib.js";
import { HitCard } from "./hit-card.js";

/**
 * @typedef {import("../../wire.js").Hit} Hit
 * @typedef {{largest: number, query: import("../../wire.js").QueryInfo, details: import("../../wire.js").IndexDetails, more: Map<number, Hit>, reach: number,
 *   tokens: {question: Record<string, unknown>, all: boolean} | null}} Shared
 *   largest: absolute score on the page, for one scale.  more: by row, what came after the cards.
 *   reach: the largest difference to the query, in parts of a feature's range
 *   tokens: what is asked for the tokens of a row, and whether those of all are shown; null: there are none
 * @typedef {{hit: Hit, rank: number}} Ranked
 */

/** @param {{title: string, words: string, hits: Hit[], side: "proponent" | "opponent", shared: Shared}} props */
export function End({ title, words, hits, side, shared }) {
  const clusters = clustered(hits);
  return html`<section class=${`end ${side}`} aria-label=${title}>
    <h2>${title} <span class="soft">${words}</span></h2>
    ${clusters.length ? html`<ol class="stack tight">${clusters.map((cluster) => html`<${Cluster} key=${cluster[0]?.hit.row} cluster=${cluster} side=${side} shared=${shared} />`)}</ol>` : html`<div class="panel"><${Empty} title=${`No ${title.toLowerCase()}`}><p>No row that passes the filter has a score of this sign.</p><//></div>`}
  </section>`;
}

/** @param {{cluster: Ranked[], side: string, shared: Shared}} props */
function Cluster({ cluster, side, shared }) {
  const [open, setOpen] = useState(false);
  const [first, ...others] = cluster;
  if (!first) return null;
  return html`<li class="stack tight"><${HitCard} ranked=${first} side=${side} shared=${shared} />
    ${
      others.length > 0 &&
      html`<button type="button" class="button plain duplicates" aria-expanded=${open} onClick=${() => setOpen(!open)}>
      ${open ? "Fold" : "Show"} ${plural(others.length, "near-duplicate")}</button>`
    }
    ${open && html`<ol class="stack tight folded">${others.map((ranked) => html`<li key=${ranked.hit.row}><${HitCard} ranked=${ranked} side=${side} shared=${shared} /></li>`)}</ol>`}
  </li>`;
}

/** By cluster, in the order of their highest hits. @param {Hit[]} hits @returns {Ranked[][]} */
function clustered(hits) {
  /** @type {Map<number, Ranked[]>} */
  const clusters = new Map();
  hits.forEach((hit, at) => {
    const cluster = hit.cluster ?? hit.row;
    clusters.set(cluster, [...(clusters.get(cluster) ?? []), { hit, rank: at + 1 }]);
  });
  return [...clusters.values()];
}
