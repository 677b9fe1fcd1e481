// The states of an index that are kept, with a way back, and the next one.
import { api } from "../../api.js";
import { concerns, useChanges } from "../../changes.js";
import { Dialog } from "../../components/dialog.js";
import { Icon } from "../../components/icons.js";
import { Failed, Skeleton } from "../../components/states.js";
import { toast } from "../../components/toast.js";
import { ago, clock, count } from "../../format.js";
import { html, useCallback, useState } from "../../lib.js";
import { useResource } from "../../resource.js";
import { chosenIndex, turn, whenAnsweredFrom } from "../../service.js";

/** @typedef {import("../../wire.js").Generation} Generation */

/** @param {{details: import("../../wire.js").IndexDetails}} props */
export function Generations({ details }) {
  const [asked, ask] = useState(/** @type {Generation | null} */ (null));
  /** @type {import("../../resource.js").Resource<{generations: Generation[]}>} */
  const kept = useResource(JSON.stringify([chosenIndex(), details.generation, turn.value]), (signal) =>
    api.get("generations", { query: chosenIndex(), signal }),
  );
  const receive = useCallback((/** @type {import("../../changes.js").Change | null} */ change) => {
    if (change && !(change.kind === "generation" && concerns(change))) return;
    kept.reload();
    if (change?.generation) whenAnsweredFrom(change.generation);
  }, []);
  useChanges(receive);
  /** @param {number | null} generation */
  const start = async (generation) => {
    ask(null);
    try {
      await api.act("reindex", { ...chosenIndex(), ...(generation === null ? {} : { roll_back_to: generation }) });
      toast(
        generation === null ? "The index is being brought up to date." : `Rolling back to generation ${generation}.`,
      );
    } catch (problem) {
      toast(`Not started: ${/** @type {Error} */ (problem).message}`);
    }
  };
  return html`<section class="panel stack" aria-label="Generations"><div class="op-head"><h2>Generations</h2>
      <button type="button" class="button" onClick=${() => start(null)}><${Icon} name="reset" /> Bring up to date</button></div>
    <p class="small soft">Bringing up to date appends rows that the task has in addition, and checkpoints that lie in their folder. Queries are answered all the while.</p>
    ${
      kept.problem
        ? html`<${Failed} problem=${kept.problem} retry=${kept.reload} />`
        : !kept.data
          ? html`<${Skeleton} lines=${2} height="2rem" label="Reading the generations" />`
          : html`<div class="scrolls" tabindex="0" role="region" aria-label="Table of generations"><table class="op-table"><thead><tr><th scope="col">Generation</th><th scope="col">Made by</th><th scope="col">Rows</th><th scope="col">Checkpoints</th><th scope="col">Published</th><th scope="col"><span class="hidden">Action</span></th></tr></thead>
            <tbody>${kept.data.generations.map((one) => html`<${Line} key=${one.generation} generation=${one} ask=${ask} />`)}</tbody></table></div>`
    }
    ${
      asked &&
      html`<${Dialog} title=${`Roll back to generation ${asked.generation}?`} close=${() => ask(null)}>
      <p>A job publishes it again as a new generation, with ${asked.rows === null ? "its" : count(asked.rows)} rows and ${asked.checkpoints === null ? "its" : count(asked.checkpoints)} checkpoints. The present one stays, and can be returned to.</p>
      <div class="actions"><button type="button" class="button" onClick=${() => ask(null)}>Cancel</button>
        <button type="button" class="button primary" onClick=${() => start(asked.generation)}>Roll back</button></div><//>`
    }
  </section>`;
}

/** @param {{generation: Generation, ask: (generation: Generation) => void}} props */
function Line({ generation, ask }) {
  const { generation: number, created, rows, checkpoints, current, reason, problem } = generation;
  return html`<tr><th scope="row" class="number">${count(number)} ${current && html`<span class="tag good">current</span>`}</th>
    <td>${reason ?? "–"}</td><td class="number">${rows === null ? "–" : count(rows)}</td><td class="number">${checkpoints === null ? "–" : count(checkpoints)}</td>
    <td class="number" title=${clock(created)}>${created ? ago(created) : "–"}</td>
    <td>${problem ? html`<span class="small soft">${problem}</span>` : !current && html`<button type="button" class="button" aria-label=${`Roll back to generation ${number}`} onClick=${() => ask(generation)}>Roll back</button>`}</td></tr>`;
}
