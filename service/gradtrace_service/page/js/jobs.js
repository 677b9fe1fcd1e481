// Jobs that change an index or retrain, followed until they end.
import { api, Problem } from "./api.js";
import { concerns } from "./changes.js";
import { useEffect, useState } from "./lib.js";
import { whenAnsweredFrom } from "./service.js";

/** @typedef {import("./wire.js").Job} Job */

const POLL_MS = 1_500; // where events do not come through

/**
 * The job's state now and whenever it changes; null: not known yet.
 * @param {string | null} id
 * @returns {{job: Job | null, problem: Error | null}}
 */
export function useJob(id) {
  const [state, setState] = useState(
    /** @type {{job: Job | null, problem: Error | null}} */ ({ job: null, problem: null }),
  );
  useEffect(() => {
    setState({ job: null, problem: null });
    if (id === null) return;
    const abort = new AbortController();
    const receive = (/** @type {Job} */ job) => !abort.signal.aborted && setState({ job, problem: null });
    follow(id, receive, abort.signal).catch(
      (problem) => !abort.signal.aborted && setState((last) => ({ ...last, problem })),
    );
    return () => abort.abort();
  }, [id]);
  return state;
}

/** @param {string} id @param {(job: Job) => void} receive @param {AbortSignal} abort */
async function follow(id, receive, abort) {
  let last = /** @type {Job} */ (await api.get(`jobs/${id}`, { signal: abort }));
  const running = last.state === "running"; // else it ended before somebody looked
  /** @param {Job} job */
  const take = (job) => {
    last = job;
    receive(job);
  };
  take(last);
  while (last.state === "running" && !abort.aborted) {
    try {
      await api.events(`jobs/${id}/events`, ({ data }) => take(data), abort);
    } catch (problem) {
      if (problem instanceof Problem && problem.status === 404) throw problem;
    }
    if (last.state !== "running" || abort.aborted) break;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS)); // the service was restarted: the job goes on
    take(await api.get(`jobs/${id}`, { signal: abort }));
  }
  if (running && last.state === "succeeded" && last.operation !== "retrain" && concerns(last))
    whenAnsweredFrom(last.generation);
}

const WORDS = /** @type {Record<string, string>} */ ({
  update: "Bring up to date",
  "roll back": "Roll back",
  delete: "Delete rows",
  retrain: "Retrain without rows",
});

/** What a job does, in words. @param {Job} job */
export function jobText(job) {
  const what = WORDS[job.operation] ?? job.operation;
  if (job.roll_back_to) return `${what} to generation ${job.roll_back_to}`;
  return job.rows ? `${what} (${job.rows})` : what;
}
