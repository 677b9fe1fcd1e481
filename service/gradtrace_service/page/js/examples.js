// Rows of a data set, page by page.

import { rowsIn } from "./address.js";
import { api } from "./api.js";
import { chosenIndex } from "./service.js";

/** @typedef {import("./wire.js").Split} Split */

/** What a list shows, from the parameters of a view. @param {URLSearchParams} params */
export function listOf(params) {
  return {
    labels: params.getAll("class").map(Number),
    ...(params.has("wrong") && { correct: "false" }),
    ...(params.has("text") && { text: params.get("text") }),
    ...(params.has("order") && { order: params.get("order") }),
    ...(params.has("only") && { rows: rowsIn(params, "only") }),
  };
}

/** Pages that are on their way before anything shows them. @type {Map<string, Promise<import("./wire.js").ExampleList>>} */
const ahead = new Map();

/** Ask for the first page of a list that is going to be shown. @param {Split} split @param {ReturnType<typeof listOf>} list @param {number} k */
export async function askAhead(split, list, k) {
  const query = pageQuery(list, 0, k);
  const page = api.get(`examples/${split}`, { query });
  ahead.set(JSON.stringify([split, query]), page);
  await page.catch(() => {}); // whoever shows it is told
}

/**
 * One page of a list. `note` says what is not known yet.
 * @param {Split} split @param {ReturnType<typeof listOf>} list @param {number} offset @param {number} k @param {AbortSignal} signal
 * @returns {Promise<import("./wire.js").ExampleList>}
 */
export function examples(split, list, offset, k, signal) {
  const query = pageQuery(list, offset, k);
  const key = JSON.stringify([split, query]);
  const page = ahead.get(key) ?? api.get(`examples/${split}`, { query, signal });
  ahead.delete(key); // what is asked for again may have changed
  return page;
}

/** @param {ReturnType<typeof listOf>} list @param {number} offset @param {number} k */
function pageQuery(list, offset, k) {
  return { ...chosenIndex(), ...list, offset, k, render: "true" };
}

/** @param {Split} split @param {number} row @param {AbortSignal} signal @returns {Promise<import("./wire.js").Example>} */
export function example(split, row, signal) {
  return api.get(`examples/${split}/${row}`, { query: chosenIndex(), signal });
}
