// What is done with the marks: files, a forecast, deletion, a retraining.
import { change } from "../../address.js";
import { api } from "../../api.js";
import { Choice } from "../../components/fields.js";
import { Icon } from "../../components/icons.js";
import { Empty } from "../../components/states.js";
import { toast } from "../../components/toast.js";
import { save } from "../../download.js";
import { count, plural } from "../../format.js";
import { html, useMemo, useState } from "../../lib.js";
import { KINDS, marks, marksState } from "../../marks.js";
import { chosenIndex, mayI } from "../../service.js";
import { Deletion } from "./deletion.js";
import { Forecast } from "./forecast.js";
import { Retraining } from "./retraining.js";

const CHOICES = /** @type {Record<string, string[]>} */ ({
  remove: ["remove"],
  wrong: ["wrong"],
  both: ["remove", "wrong"],
});

/** @param {import("../../views.js").ViewProps} props */
export function Act({ params, details }) {
  const { total, counts } = marksState.value;
  const chosen = params.get("rows") ?? ((counts.remove ?? 0) > 0 || !counts.wrong ? "remove" : "wrong");
  const kinds = CHOICES[chosen] ?? ["remove"];
  const rows = useMemo(() => rowsMarked(kinds), [marks.value, chosen]);
  return html`<div class="clean-act">
    <section class="panel stack clean-marks" aria-label="The marks"><h2>${plural(total, "row is", "rows are")} marked</h2>
      <ul class="row">${KINDS.map(
        ({
          kind,
          title,
          meaning,
        }) => html`<li class="clean-count"><span class=${`mark-chip mark-${kind}`}>${title}</span>
        <strong class="number">${count(counts[kind] ?? 0)}</strong><span class="small soft">${meaning}</span></li>`,
      )}</ul>
      <${Export} total=${total} />
    </section>
    <section class="panel stack clean-forecast" aria-label="Removal"><h2>What would removal do?</h2>
      <${Choice} name="Rows" value=${chosen} choose=${(/** @type {string} */ next) => change({ rows: next })} options=${[
        ["remove", `Marked remove (${count(counts.remove ?? 0)})`],
        ["wrong", `Marked wrong (${count(counts.wrong ?? 0)})`],
        ["both", `Marked remove or wrong (${count((counts.remove ?? 0) + (counts.wrong ?? 0))})`],
      ]} />
      ${
        rows.length
          ? html`<${Forecast} rows=${rows} params=${params} details=${details} />`
          : html`<${Empty} title="No row is marked so"><p>Mark rows in the review, and come back.</p>
        <button type="button" class="button" onClick=${() => change({ part: null })}>Review rows</button><//>`
      }
    </section>
    ${rows.length > 0 && html`<${Retraining} rows=${rows} params=${params} details=${details} />`}
    ${rows.length > 0 && html`<${Deletion} rows=${rows} params=${params} mine=${mayI("admin")} />`}
  </div>`;
}

/** @param {string[]} kinds */
function rowsMarked(kinds) {
  const rows = [...marks.peek().values()].filter(({ mark }) => kinds.includes(mark)).map(({ row }) => row);
  return rows.sort((a, b) => a - b);
}

const FORMATS = /** @type {const} */ ([
  ["csv", "CSV", "csv"],
  ["parquet", "Parquet", "parquet"],
  ["rows", "Row numbers", "txt"],
]);

/** @param {{total: number}} props */
function Export({ total }) {
  const [kind, setKind] = useState("");
  const options = [["", "All marks"], ...KINDS.map((known) => [known.kind, `Marked ${known.title.toLowerCase()}`])];
  return html`<div class="clean-export"><${Choice} name="Export" value=${kind} options=${options} choose=${setKind} />
    <div class="row">${FORMATS.map(
      ([format, words, ending]) => html`<button type="button" class="button" disabled=${!total}
      onClick=${() => exported(format, kind, ending)}><${Icon} name="download" /> ${words}</button>`,
    )}</div></div>`;
}

/** @param {string} format @param {string} kind @param {string} ending */
async function exported(format, kind, ending) {
  try {
    const response = await api.raw("marks/export", { query: { ...chosenIndex(), format, mark: kind } });
    await save(response, `marks.${ending}`);
  } catch (problem) {
    toast(`Not exported: ${/** @type {Error} */ (problem).message}`);
  }
}
