// The two questions of a comparison, as the address holds them: the second has what differs from the first.
import { questionOf, sourceOf } from "../../question.js";
import { indexes, indexName } from "../../service.js";

/**
 * @typedef {{n: 1 | 2, params: URLSearchParams, index: string | null, source: import("../../question.js").Source | null,
 *   method: string, body: Record<string, any> | null}} Side
 */

/** Parameters of a side. Those of the second end with a 2 in the address. */
const OWN = ["index", "query", "train", "method", "checkpoints"];
const SOURCES = ["query", "train", "example", "kept"];
const FILTERS = ["labels", "predicted", "correct", "min_loss", "rescore"]; // of an answer: here, all rows are compared

/** @param {string} name @param {1 | 2} n */
export const nameIn = (name, n) => (n === 2 ? `${name}2` : name);

/** @param {URLSearchParams} params @param {import("../../wire.js").IndexDetails} details @param {1 | 2} n @returns {Side} */
export function sideOf(params, details, n) {
  const mine = new URLSearchParams([...params].filter(([name]) => !name.endsWith("2") && !FILTERS.includes(name)));
  if (n === 2) {
    if (params.has("query2") || params.has("train2")) for (const name of SOURCES) mine.delete(name);
    for (const name of OWN) {
      if (!params.has(`${name}2`)) continue;
      mine.delete(name);
      for (const value of params.getAll(`${name}2`)) if (value !== "*") mine.append(name, value);
    }
  }
  const source = sourceOf(mine) ?? (details.query_rows ? { query_rows: [0] } : { train_rows: [0] });
  const method = methodOf(params, details, n);
  mine.set("method", method);
  const index = n === 2 ? (params.get("index2") ?? indexName.value) : indexName.value;
  const { index: _, ...question } = questionOf(mine, source);
  return { n, params: mine, index, source, method, body: { ...question, ...(index === null ? {} : { index }) } };
}

/** By default, the second is the first's question by another method. @param {URLSearchParams} params @param {import("../../wire.js").IndexDetails} details @param {1 | 2} n */
function methodOf(params, details, n) {
  const first =
    params.get("method") ?? (details.methods.includes("tracin") ? "tracin" : (details.methods[0] ?? "tracin"));
  if (n === 1) return first;
  const asked = params.get("method2");
  if (asked) return asked;
  if (OWN.some((name) => params.has(`${name}2`))) return first;
  const others = details.methods.filter((name) => name !== first);
  return others.includes("influence") ? "influence" : (others[0] ?? first);
}

/**
 * What changes in the address when the two sides are exchanged; null: the second cannot be given an example that is no
 * row.
 * @param {Side} first @param {Side} second
 */
export function swapped(first, second) {
  const [mine, theirs] = [sourceIn(first), sourceIn(second)];
  const same = JSON.stringify(mine) === JSON.stringify(theirs);
  if (!same && !(mine && theirs)) return null;
  const [checkpoints, others] = [first.params.getAll("checkpoints"), second.params.getAll("checkpoints")];
  const differ = first.index !== second.index;
  return {
    ...(theirs && { query: theirs.query, train: theirs.train }),
    ...{ query2: same ? null : mine?.query, train2: same ? null : mine?.train },
    ...{ method: second.method, method2: first.method },
    ...{ checkpoints: others, checkpoints2: checkpoints.length ? checkpoints : others.length ? ["*"] : [] },
    ...(differ && { index: second.index, index2: first.index ?? indexes.peek()[0]?.name }),
  };
}

/** @param {Side} side */
function sourceIn({ source }) {
  if (!source || "example" in source) return null;
  if ("query_rows" in source) return { query: source.query_rows.join(","), train: null };
  return { query: null, train: source.train_rows.join(",") };
}
