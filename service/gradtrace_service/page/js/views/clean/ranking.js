// Which training rows to look at first, and why.
import { numberIn } from "../../address.js";
import { api } from "../../api.js";
import { count, measured, plural, signed } from "../../format.js";
import { MOST_QUERIES } from "../../question.js";
import { useResource } from "../../resource.js";
import { chosenIndex, turn } from "../../service.js";

/**
 * @typedef {import("../../wire.js").Judged & {row: number, score: number | null, rank: number}} Candidate
 * @typedef {{candidates: Candidate[], offset: number, total: number, note: string, queries?: number[]}} Ranking
 *   offset: rows that come before the listed ones.  total: rows in all.  queries: rows of the query set that are harmed
 * @typedef {"self" | "harm" | "disagree"} By
 */

/** @typedef {{by: By, title: string, words: string, score: (candidate: Candidate) => string}} Order */

/** Of disagreement, where labels are no classes. */
const BY_LOSS = { title: "Highest loss", words: "Rows that the model fits worst, the highest loss first." };

/** @type {Order[]} */
const RANKINGS = [
  {
    by: "self",
    title: "Self-influence",
    words: "Rows that the model had to learn by heart: mislabelled and unusual ones come first.",
    score: ({ score }) => `self-influence ${measured(score)}`,
  },
  {
    by: "harm",
    title: "Harm to queries",
    words: "Rows that raised the loss on queries which are predicted wrongly.",
    score: ({ score }) => `score ${signed(score)}`,
  },
  {
    by: "disagree",
    title: "Disagreement",
    words: "Rows of which the model predicts something else than their label, the highest loss first.",
    score: ({ loss }) => `loss ${measured(loss)}`,
  },
];

const PAGE = 1_000;
const PATIENCE_MS = 30_000; // then those that are known by then
const AGAIN_MS = 1_000;
export const LISTED = 2_000; // rows at a time

/** @param {URLSearchParams} params */
export function rankingOf(params) {
  return RANKINGS.find(({ by }) => by === params.get("by")) ?? /** @type {(typeof RANKINGS)[0]} */ (RANKINGS[0]);
}

/** Those that make sense for an index. @param {import("../../wire.js").IndexDetails} details */
export function rankingsOf(details) {
  const offered = RANKINGS.filter(({ by }) => by !== "harm" || details.query_rows > 0);
  return details.class_names
    ? offered
    : offered.map((order) => (order.by === "disagree" ? { ...order, ...BY_LOSS } : order));
}

/** @param {URLSearchParams} params @param {import("../../wire.js").IndexDetails} details */
export function useRanking(params, details) {
  const { by } = rankingOf(params);
  const asked = {
    by: by === "harm" && !details.query_rows ? /** @type {By} */ ("self") : by,
    labels: params.getAll("class").map(Number),
    slice: params.getAll("slice").map(Number),
    method: params.get("method"),
    classes: details.class_names !== null,
    offset: Math.max(Math.round(numberIn(params, "offset", 0)), 0),
  };
  const key = JSON.stringify([asked, chosenIndex(), details.generation, turn.value]);
  const load = { self: bySelfInfluence, harm: byHarm, disagree: byDisagreement }[asked.by];
  return useResource(key, (signal) => load(asked, signal), { keep: false });
}

/** @typedef {{labels: number[], slice: number[], method: string | null, classes: boolean, offset: number}} Asked */

/** @param {Asked} asked @param {AbortSignal} signal @returns {Promise<Ranking>} */
async function bySelfInfluence({ labels, method, offset }, signal) {
  const { rows, total } = await paged(offset, async (offset) => {
    const query = { ...chosenIndex(), k: PAGE, offset, labels, method, examples: "false" };
    /** @type {import("../../wire.js").SelfInfluenceAnswer} */
    const page = await api.get("self-influence", { query, signal });
    return { rows: page.results, total: page.rows_total };
  });
  return { candidates: ranked(rows, offset), offset, total, note: "" };
}

/** @param {Asked} asked @param {AbortSignal} signal @returns {Promise<Ranking>} */
async function byDisagreement({ labels, classes, offset }, signal) {
  const { rows, total } = await paged(offset, async (offset) => {
    const page = await highestLoss("train", { labels, k: PAGE, offset, ...(classes && { correct: "false" }) }, signal);
    return { rows: page.results, total: page.rows_total };
  });
  const scored = rows.map((row) => ({ ...row, score: row.loss }));
  return { candidates: ranked(scored, offset), offset, total, note: "" };
}

/** @param {Asked} asked @param {AbortSignal} signal @returns {Promise<Ranking>} */
async function byHarm({ labels, slice, method, classes }, signal) {
  const list = { labels: slice, k: MOST_QUERIES };
  let page = await onceKnown(
    () => highestLoss("query", { ...list, ...(classes && { correct: "false" }) }, signal),
    signal,
  );
  const wrong = classes && page.rows_total > 0;
  if (!page.rows_total) page = await highestLoss("query", list, signal);
  const queries = page.results.map(({ row }) => row);
  if (!queries.length)
    return { candidates: [], offset: 0, total: 0, note: page.note ?? "The query set has no such row.", queries };
  const body = {
    ...chosenIndex(),
    query_rows: queries,
    aggregate: "mean",
    k: PAGE,
    include: [],
    ...(method && { method }),
    ...(labels.length && { filter: { labels } }),
  };
  /** @type {import("../../wire.js").InfluenceAnswer} */
  const answer = await api.ask("influence", body, { signal });
  const hits = answer.results[0]?.opponents ?? [];
  const few = queries.length < page.rows_total ? `, of ${plural(page.rows_total, "such row")}` : "";
  const what = wrong ? "query rows that are predicted wrongly" : "query rows with the highest loss";
  const none = classes && !wrong && !page.pending ? " None is predicted wrongly." : "";
  const total = answer.results[0]?.rows_searched ?? hits.length;
  const first =
    hits.length < total ? ` Listed are the ${count(hits.length)} of ${plural(total, "row")} that harm most.` : "";
  const note = `Mean over ${plural(queries.length, what.replace("rows", "row"), what)}${few}.${none}${page.note ? ` So far: ${page.note}.` : ""}${first}`;
  return { candidates: ranked(hits, 0), offset: 0, total: hits.length, note, queries };
}

/** @param {"train" | "query"} split @param {import("../../address.js").Parameters} list @param {AbortSignal} signal @returns {Promise<import("../../wire.js").ExampleList>} */
function highestLoss(split, list, signal) {
  return api.get(`examples/${split}`, {
    query: { ...chosenIndex(), ...list, order: "-loss", render: "false" },
    signal,
  });
}

/**
 * Predictions on the query set are computed once, at the first question about them.
 * @param {() => Promise<import("../../wire.js").ExampleList>} load @param {AbortSignal} signal
 */
async function onceKnown(load, signal) {
  const until = performance.now() + PATIENCE_MS;
  for (;;) {
    const page = await load();
    if (!page.pending || performance.now() > until || signal.aborted) return page;
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

/**
 * As many rows as are listed at a time.
 * @template T @param {number} start @param {(offset: number) => Promise<{rows: T[], total: number}>} load
 */
async function paged(start, load) {
  const { rows, total } = await load(start);
  const all = [...rows];
  while (all.length < Math.min(total - start, LISTED)) {
    const { rows: more } = await load(start + all.length);
    if (!more.length) break;
    all.push(...more);
  }
  return { rows: all, total };
}

/**
 * @param {(import("../../wire.js").Judged & {row: number, score: number | null})[]} rows
 * @param {number} offset rows that come before them @returns {Candidate[]}
 */
function ranked(rows, offset) {
  return rows.map(({ row, score, label, label_name, prediction, prediction_name, loss, correct }, at) => ({
    ...{ row, score, label, label_name, prediction, prediction_name, loss, rank: offset + at + 1 },
    correct: correct ?? null,
  }));
}
