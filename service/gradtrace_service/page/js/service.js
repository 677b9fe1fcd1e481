// What the page knows of the service: its indexes, the one that is looked at, and who asks.

import { address } from "./address.js";
import { api } from "./api.js";
import { computed, signal } from "./lib.js";
import { apiKey } from "./session.js";

/**
 * @typedef {import("./wire.js").IndexDetails} IndexDetails
 * @typedef {import("./wire.js").IndexSummary} IndexSummary
 * @typedef {import("./wire.js").Who} Who
 */

/** Name of the index that is looked at; null: the service's first, or only one. */
export const indexName = computed(() => address.value.params.get("index"));

/** Grows when something changed that every view depends on, such as the index's generation. */
export const turn = signal(0);

export const indexes = signal(/** @type {IndexSummary[]} */ ([]));
export const who = signal(
  /** @type {Who} */ ({ name: null, scopes: ["query", "admin"], keys_required: false, read_only: false }),
);

/** On its way before anything shows it. @type {Promise<IndexDetails> | null} */
let detailsAhead = null;

/** Ask for the details of the index that is going to be shown first. */
export function askDetailsAhead() {
  detailsAhead = api.get("index", { query: chosenIndex() });
  detailsAhead.catch(() => {}); // whoever shows it is told
}

/** @param {AbortSignal} signal @returns {Promise<IndexDetails>} */
export async function loadDetails(signal) {
  const ahead = detailsAhead;
  detailsAhead = null; // what is asked for again may have changed
  const details = await (ahead ?? api.get("index", { query: chosenIndex(), signal })); // first: it is the one that asks for a key
  loadSurroundings();
  return details;
}

async function loadSurroundings() {
  const [known, asking] = await Promise.allSettled([api.get("indexes"), api.get("whoami")]);
  if (known.status === "fulfilled") indexes.value = known.value.indexes;
  if (asking.status === "fulfilled") who.value = asking.value;
  else if (apiKey.peek()) who.value = { ...who.value, keys_required: true };
}

/** Whether the service is another process than when the page asked last. */
export async function wasRestarted() {
  const { started } = who.peek();
  who.value = await api.get("whoami", { quiet: true });
  return started !== undefined && started !== who.peek().started;
}

/** For requests: which index. @returns {{index?: string}} */
export function chosenIndex() {
  return indexName.value === null ? {} : { index: indexName.value };
}

/** @param {"query" | "admin"} scope */
export function mayI(scope) {
  return who.value.scopes.includes(scope);
}

const TAKE_OVER_TRIES = 60;

/** Show what a job has published, once the service answers from it, which is about a second later. @param {number} generation */
export async function whenAnsweredFrom(generation) {
  for (let attempt = 0; attempt < TAKE_OVER_TRIES; attempt++) {
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    const details = await api.get("index", { query: chosenIndex() }).catch(() => null);
    if (details?.generation >= generation) break;
  }
  turn.value += 1;
}
