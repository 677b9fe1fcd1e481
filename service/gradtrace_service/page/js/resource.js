// What a view asks the service for, with its states: at first nothing, then data, which stays while newer is fetched.
import { useCallback, useEffect, useState } from "./lib.js";

/**
 * @template T
 * @typedef {{data: T | null, problem: Error | null, busy: boolean, reload: () => void}} Resource
 */

/**
 * Fetch whenever `key` changes; what is under way for an earlier key is aborted, as it is when the view is left.
 * @template T
 * @param {string | null} key everything that the answer depends on; null: nothing to ask
 * @param {(signal: AbortSignal) => Promise<T>} load
 * @param {{keep?: boolean}} [options] keep: whether earlier data is shown while the next is fetched
 * @returns {Resource<T>}
 */
export function useResource(key, load, { keep = true } = {}) {
  const [state, setState] = useState(
    /** @type {{key: string | null, turn: number, data: T | null, problem: Error | null}} */ ({
      key: null,
      turn: 0,
      data: null,
      problem: null,
    }),
  );
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    if (key === null) return;
    const abort = new AbortController();
    load(abort.signal).then(
      (data) => !abort.signal.aborted && setState({ key, turn, data, problem: null }),
      (problem) =>
        !abort.signal.aborted &&
        setState((last) => ({ key, turn, data: last.key === key ? last.data : null, problem })),
    );
    return () => abort.abort();
  }, [key, turn]);
  const reload = useCallback(() => setTurn((last) => last + 1), []);
  const current = state.key === key && state.turn === turn;
  const data = key !== null && (state.key === key || keep) ? state.data : null;
  return { data, problem: current ? state.problem : null, busy: key !== null && !current, reload };
}
