// All indexes of the service.
import { link } from "../../address.js";
import { count, present } from "../../format.js";
import { html } from "../../lib.js";
import { indexes } from "../../service.js";

export function Indexes() {
  if (!indexes.value.length) return null;
  return html`<section class="panel stack" aria-label="Indexes"><h2>Indexes of this service</h2>
    <div class="scrolls" tabindex="0" role="region" aria-label="Table of indexes"><table class="op-table"><thead><tr><th scope="col">Index</th><th scope="col">Task</th><th scope="col">Rows</th><th scope="col">Generation</th><th scope="col">State</th></tr></thead>
    <tbody>${indexes.value.map(
      ({
        name,
        task,
        rows,
        deleted,
        generation,
        loaded,
        opening_seconds: opening,
      }) => html`<tr><th scope="row"><a href=${link("operate", { index: name })}>${name ?? "the only one"}</a></th>
        <td>${task ?? "–"}</td><td class="number">${rows === null ? "–" : `${count(present({ rows, deleted: deleted ?? 0 }))}${deleted ? ` (and ${count(deleted)} deleted)` : ""}`}</td><td class="number">${generation === null ? "–" : count(generation)}</td>
        <td>${opening !== null ? `opening, ${Math.round(opening)} s` : generation === null ? html`<span class="tag danger">not readable</span>` : loaded ? "in memory" : "on disk"}</td></tr>`,
    )}</tbody></table></div></section>`;
}
