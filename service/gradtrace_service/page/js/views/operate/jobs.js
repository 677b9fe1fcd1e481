// Jobs, running and ended.
import { api } from "../../api.js";
import { useChanges } from "../../changes.js";
import { JobCard } from "../../components/job.js";
import { Failed, Skeleton } from "../../components/states.js";
import { plural } from "../../format.js";
import { useJob } from "../../jobs.js";
import { html, useCallback, useState } from "../../lib.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

const SHOWN = 6;

export function Jobs() {
  const [all, setAll] = useState(false);
  /** @type {import("../../resource.js").Resource<{jobs: import("../../wire.js").Job[]}>} */
  const list = useResource(`jobs ${turn.value}`, (signal) => api.get("jobs", { signal }));
  const receive = useCallback((/** @type {import("../../changes.js").Change | null} */ change) => {
    if (!change || change.kind === "job") list.reload();
  }, []);
  useChanges(receive);
  const jobs = list.data?.jobs ?? [];
  return html`<section class="panel stack" aria-label="Jobs"><h2>Jobs</h2>
    ${
      list.problem
        ? html`<${Failed} problem=${list.problem} retry=${list.reload} />`
        : !list.data
          ? html`<${Skeleton} lines=${2} height="2.5rem" label="Reading the jobs" />`
          : jobs.length
            ? html`<ul class="op-jobs">${jobs
                .slice(0, all ? jobs.length : SHOWN)
                .map(
                  (job) =>
                    html`<li key=${job.id}>${job.state === "running" ? html`<${Followed} job=${job} />` : html`<${JobCard} job=${job} />`}</li>`,
                )}</ul>`
            : html`<p class="soft">No job was started yet.</p>`
    }
    ${jobs.length > SHOWN && html`<div><button type="button" class="button" onClick=${() => setAll(!all)}>${all ? "Fewer" : `All ${plural(jobs.length, "job")}`}</button></div>`}
  </section>`;
}

/** @param {{job: import("../../wire.js").Job}} props */
function Followed({ job }) {
  const { job: now } = useJob(job.id);
  return html`<${JobCard} job=${now ?? job} />`;
}
