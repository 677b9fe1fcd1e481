// A question to the index, as the address holds it and as POST /influence takes it.
import { numberIn, rowsIn } from "./address.js";
import { count } from "./format.js";
import { chosenIndex } from "./service.js";

/**
 * @typedef {import("./wire.js").Payload} Payload
 * @typedef {{query_rows: number[]} | {train_rows: number[]} | {example: Payload}} Source
 */

export const DEFAULT_K = 10;
export const MOST_QUERIES = 128; // that a request may hold
const LONGEST_IN_ADDRESS = 3500; // characters of an example: longer addresses cannot be saved

/** Parameters of the question; others belong to a view. */
const NAMES =
  "index query train example kept method checkpoints k target rather labels predicted correct min_loss rescore";

/** The parameters of the question alone. @param {URLSearchParams} params */
export function questionParams(params) {
  const names = NAMES.split(" ");
  return new URLSearchParams([...params].filter(([name]) => names.includes(name)));
}

/** What is asked about; null: nothing yet. @param {URLSearchParams} params @returns {Source | null} */
export function sourceOf(params) {
  const query = rowsIn(params, "query");
  if (query.length) return { query_rows: query.slice(0, MOST_QUERIES) };
  const train = rowsIn(params, "train");
  if (train.length) return { train_rows: train.slice(0, MOST_QUERIES) };
  const example = exampleOf(params);
  return example && { example };
}

/**
 * What is the same in every request about the question: the fields of InfluenceRequest but `k`, `rescore` and `include`.
 * @param {URLSearchParams} params @param {Source} source
 */
export function questionOf(params, source) {
  const rows = "query_rows" in source ? source.query_rows : "train_rows" in source ? source.train_rows : [];
  const checkpoints = params.getAll("checkpoints");
  return {
    ...chosenIndex(),
    ...source,
    ...(params.has("method") && { method: params.get("method") }),
    ...(checkpoints.length && { checkpoints }),
    ...(rows.length > 1 && { aggregate: "mean" }),
    ...targetOf(params),
    ...filterOf(params),
  };
}

/** @param {URLSearchParams} params */
export function hitsOf(params) {
  return Math.min(Math.max(Math.round(numberIn(params, "k", DEFAULT_K)), 1), 1000);
}

/** @param {URLSearchParams} params */
function targetOf(params) {
  const label = params.get("target");
  if (label === null) return {};
  if (label === "loss") return { target: "loss" };
  const rather = params.get("rather");
  return { target: rather === null ? { label: Number(label) } : { label: Number(label), rather_than: Number(rather) } };
}

/** @param {URLSearchParams} params */
function filterOf(params) {
  const labels = params.getAll("labels").map(Number);
  const predicted = params.getAll("predicted").map(Number);
  const where = {
    ...(predicted.length && { prediction: { in: predicted } }),
    ...(params.has("min_loss") && { loss: { min: numberIn(params, "min_loss", 0) } }),
  };
  const filter = {
    ...(labels.length && { labels }),
    ...(params.has("correct") && { correct_only: true }),
    ...(Object.keys(where).length && { where }),
  };
  return Object.keys(filter).length ? { filter } : {};
}

/** Examples that are too long for an address, until the page is left. @type {Payload[]} */
const kept = [];

/** The example of the address; null: there is none, or it was not kept. @param {URLSearchParams} params @returns {Payload | null} */
export function exampleOf(params) {
  if (params.has("kept")) return kept[numberIn(params, "kept", -1)] ?? null;
  try {
    const example = JSON.parse(params.get("example") ?? "null");
    return example && typeof example === "object" ? example : null;
  } catch {
    return null; // a link that was cut off
  }
}

/** Parameters that name the example. @param {Payload} example */
export function withExample(example) {
  const text = JSON.stringify(example);
  const none = { query: null, train: null, example: null, kept: null };
  if (text.length <= LONGEST_IN_ADDRESS) return { ...none, example: text };
  return { ...none, kept: kept.push(example) - 1 };
}

/** What is asked about, in words. @param {URLSearchParams} params */
export function sourceText(params) {
  for (const split of /** @type {const} */ (["query", "train"])) {
    const rows = rowsIn(params, split);
    const set = split === "query" ? "query" : "training";
    if (rows.length === 1) return `${set} row ${count(rows[0] ?? 0)}`;
    if (rows.length) return `${count(rows.length)} ${set} rows, their mean`;
  }
  return "your own example";
}
