// What changes in the service while the page is open: marks of others, jobs, generations.
import { api, Problem } from "./api.js";
import { useEffect } from "./lib.js";
import { indexes, indexName } from "./service.js";

/**
 * @typedef {{kind: "marks" | "questions" | "job" | "generation", index: string | null, change?: number | null,
 *   job?: string | null, state?: string | null, generation?: number | null}} Change
 */

const AGAIN_MS = 2_000;

/** @type {Set<(change: Change | null) => void>} */
const listeners = new Set();
/** @type {AbortController | null} */
let stream = null;

/**
 * Be told of changes while the component is there; null: some may have been missed, since the stream was cut off.
 * @param {(change: Change | null) => void} receive
 */
export function useChanges(receive) {
  useEffect(() => {
    listeners.add(receive);
    if (!stream) follow();
    return () => {
      listeners.delete(receive);
      if (listeners.size) return;
      stream?.abort();
      stream = null;
    };
  }, [receive]);
}

/** Whether it is a change of the index that is looked at. @param {{index: string | null}} change */
export function concerns({ index }) {
  const shown = indexName.peek() ?? indexes.peek()[0]?.name ?? null;
  return index === null || shown === null || index === shown;
}

async function follow() {
  const mine = new AbortController();
  stream = mine;
  let quiet = false; // once somebody does not want to wait for it
  for (let missed = false; !mine.signal.aborted; missed = true) {
    try {
      if (missed) tell(null);
      await api.events("events", ({ data }) => tell(data), mine.signal, quiet);
      quiet = false;
    } catch (problem) {
      if (problem instanceof Problem && [401, 403, 404].includes(problem.status)) return; // no such stream for us
      quiet = problem instanceof Problem && (problem.kind === "stopped" || (quiet && problem.kind === "unreachable"));
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

/** @param {Change | null} change */
function tell(change) {
  for (const listener of listeners) listener(change);
}
