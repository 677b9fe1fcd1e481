// Deleting the marked rows from the index: for admins, after a question.
import { change } from "../../address.js";
import { api } from "../../api.js";
import { Dialog } from "../../components/dialog.js";
import { JobCard } from "../../components/job.js";
import { Failed, Notice } from "../../components/states.js";
import { plural } from "../../format.js";
import { useJob } from "../../jobs.js";
import { html, useState } from "../../lib.js";
import { unmark } from "../../marks.js";
import { chosenIndex } from "../../service.js";

/** @param {{rows: number[], params: URLSearchParams, mine: boolean}} props mine: whether the key may do it */
export function Deletion({ rows, params, mine }) {
  const [asks, setAsks] = useState(false);
  const [problem, setProblem] = useState(/** @type {Error | null} */ (null));
  const { job, problem: lost } = useJob(params.get("deletion"));
  const start = async () => {
    setAsks(false);
    try {
      setProblem(null);
      const started = await api.act("rows/delete", { ...chosenIndex(), rows });
      change({ deletion: started.id });
    } catch (failed) {
      setProblem(/** @type {Error} */ (failed));
    }
  };
  return html`<section class="panel stack clean-deletion" aria-label="Deletion"><h2>Delete from the index</h2>
    <p class="small soft">No answer of the next generation names the rows any more. The training data and the model stay as they are; the generation before stays, and can be rolled back to.</p>
    ${
      mine
        ? html`<div><button type="button" class="button danger" disabled=${job?.state === "running"} onClick=${() => setAsks(true)}>Delete ${plural(rows.length, "row")} …</button></div>`
        : html`<${Notice}>Deleting needs a key of scope admin.<//>`
    }
    ${(problem ?? lost) && html`<${Failed} problem=${problem ?? lost} title="Not deleted" />`}
    ${job && html`<${JobCard} job=${job} />`}
    ${job?.state === "succeeded" && html`<${Notice}>The rows are in no answer any more. Their marks are kept. <button type="button" class="button" onClick=${() => unmark(rows)}>Clear the marks of these ${plural(rows.length, "row")}</button><//>`}
    ${
      asks &&
      html`<${Dialog} title=${`Delete ${plural(rows.length, "row")} from the index?`} close=${() => setAsks(false)}>
      <p>A job writes a new generation without them. Queries are answered all the while.</p>
      <div class="actions"><button type="button" class="button" onClick=${() => setAsks(false)}>Cancel</button>
        <button type="button" class="button primary" onClick=${start}>Delete</button></div><//>`
    }
  </section>`;
}
