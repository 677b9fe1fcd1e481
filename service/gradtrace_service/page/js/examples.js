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

/**
 * One page of a list. `note` says what is not known yet.
 * @param {Split} split @param {ReturnType<typeof listOf>} list @param {number} offset @param {number} k @param {AbortSignal} signal
 * @returns {Promise<import("./wire.js").ExampleList>}
 */
export function examples(split, list, offset, k, signal) {
  return api.get(`examples/${split}`, { query: { ...chosenIndex(), ...list, offset, k, render: "true" }, signal });
}

/** @param {Split} split @param {number} row @param {AbortSignal} signal @returns {Promise<import("./wire.js").Example>} */
export function example(split, row, signal) {
  return api.get(`examples/${split}/${row}`, { query: chosenIndex(), signal });
}
