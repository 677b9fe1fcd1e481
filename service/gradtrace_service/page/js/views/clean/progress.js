// How far somebody is through the list.
import { count, plural } from "../../format.js";
import { html } from "../../lib.js";
import { KINDS, marks } from "../../marks.js";

const GOAL = 200; // rows at a time: a person's hour

/** @param {{list: import("./ranking.js").Candidate[], listed: number}} props list: those that the filters leave of the listed */
export function Progress({ list, listed }) {
  const kinds = list.map(({ row }) => marks.value.get(row)?.mark);
  let goal = Math.min(GOAL, list.length);
  while (goal < list.length && kinds.slice(0, goal).every(Boolean)) goal = Math.min(goal + GOAL, list.length);
  const first = kinds.slice(0, goal);
  const looked = first.filter(Boolean).length;
  const words = `${count(looked)} of ${goal < list.length ? "the first " : ""}${plural(goal, "row")} marked`;
  return html`<div class="clean-progress">
    <div class="clean-bar" role="progressbar" aria-label=${words} aria-valuemin="0" aria-valuemax=${goal} aria-valuenow=${looked}>
      ${KINDS.map(({ kind }) => html`<i class=${`mark-${kind}`} style=${{ width: `${(100 * first.filter((mark) => mark === kind).length) / Math.max(goal, 1)}%` }}></i>`)}
    </div>
    <p class="small soft"><strong>${words}</strong>${list.length < listed ? `; ${count(list.length)} of ${plural(listed, "row")} are like this` : ""}.
      ${" "}${KINDS.map(({ kind, title }) => `${title} ${count(kinds.filter((mark) => mark === kind).length)}`).join(" · ")}</p>
  </div>`;
}
