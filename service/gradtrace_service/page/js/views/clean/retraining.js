// Training again without the rows: what was predicted beside what is measured.
import { change } from "../../address.js";
import { api } from "../../api.js";
import { Change } from "../../components/change.js";
import { JobCard } from "../../components/job.js";
import { Scatter } from "../../components/scatter.js";
import { Failed, Notice } from "../../components/states.js";
import { count, percent, plural, signed } from "../../format.js";
import { useJob } from "../../jobs.js";
import { html, useMemo, useState } from "../../lib.js";
import { chosenIndex, mayI } from "../../service.js";
import { forecastMethod } from "./forecast.js";

/** @param {import("../../views.js").ViewProps & {rows: number[]}} props */
export function Retraining({ rows, params, details }) {
  const [problem, setProblem] = useState(/** @type {Error | null} */ (null));
  const { job, problem: lost } = useJob(params.get("retraining"));
  const start = async () => {
    try {
      setProblem(null);
      const body = { ...chosenIndex(), without_rows: rows, seed: 0 }; // compared with every method that forecasts
      change({ retraining: (await api.act("retrain", body)).id });
    } catch (failed) {
      setProblem(/** @type {Error} */ (failed));
    }
  };
  return html`<section class="panel stack clean-training" aria-label="Retraining"><h2>Train again without them</h2>
    <p class="small soft">Trains twice with the same seed, with all rows and without these, and compares the losses on the query set.</p>
    ${
      !details.can_retrain
        ? html`<${Notice}>This task cannot be trained from here: it defines no <code>fit</code>.<//>`
        : mayI("admin")
          ? html`<div><button type="button" class="button" disabled=${job?.state === "running"} onClick=${start}>Train without ${plural(rows.length, "row")}</button></div>`
          : html`<${Notice}>Training needs a key of scope admin.<//>`
    }
    ${(problem ?? lost) && html`<${Failed} problem=${problem ?? lost} title="Not trained" />`}
    ${job && html`<${JobCard} job=${job} />`}
    ${job?.state === "succeeded" && job.result && html`<${Outcome} result=${job.result} asked=${forecastMethod(params, details)} />`}
  </section>`;
}

/** @param {{result: import("../../wire.js").RetrainResult, asked: string}} props asked: the method of the forecast */
function Outcome({ result, asked }) {
  const { measured, measured_change: change, accuracy, predictions } = result;
  const chosen =
    predictions.find(({ method }) => method === asked) ??
    predictions.find(({ method }) => method === result.method) ??
    predictions[0];
  const points = useMemo(() => pointsOf(result, chosen), [result, chosen]);
  const predicted = chosen?.predicted_change ?? null;
  return html`<div class="stack">
    <p class="small soft">${plural(result.queries.length, `${result.split} row`)}, seed ${result.seed}: trained with ${count(result.rows)} rows, and without ${count(result.removed)} of them.</p>
    <div class="clean-outcome">
      ${predicted !== null && html`<${Change} title=${`Predicted by ${chosen?.method}`} before=${measured[0]} change=${predicted} what=${`mean ${result.measurement}`} />`}
      <${Change} title="Measured" before=${measured[0]} change=${change} what=${`mean ${result.measurement}`} />
      ${accuracy && html`<${Accuracy} before=${accuracy[0]} after=${accuracy[1]} />`}
    </div>
    ${
      points.length > 0 &&
      html`<${Scatter} points=${points} height=${280} zero x=${chosen?.predicted_changes ? `Change that ${chosen.method} predicted` : `Sum of scores by ${chosen?.method}`} y="Measured change"
      label=${`Predicted and measured change of ${points.length} queries; rank correlation ${signed(chosen?.spearman)}`} />`
    }
    ${
      predictions.length > 0 &&
      html`<table class="clean-effects"><thead><tr><th scope="col">Method</th><th scope="col">Predicted change</th><th scope="col">Rank correlation with the measured changes</th></tr></thead>
      <tbody>${predictions.map(({ method, predicted_change: value, spearman }) => html`<tr><th scope="row">${method}</th><td class="number">${value === null ? "no loss" : signed(value)}</td><td class="number">${spearman === null ? "–" : signed(spearman)}</td></tr>`)}</tbody></table>`
    }
  </div>`;
}

/** @param {{before: number, after: number}} props */
function Accuracy({ before, after }) {
  return html`<div class="change"><span class="small soft">Measured, accuracy</span><p class="change-numbers number"><span>${percent(before)}</span><span aria-label="becomes">→</span><strong>${percent(after)}</strong>
    <span class=${`tag ${after > before ? "good" : after < before ? "warning" : ""}`}>${signed(100 * (after - before))} points</span></p></div>`;
}

/** @param {import("../../wire.js").RetrainResult} result @param {import("../../wire.js").RetrainPrediction | undefined} prediction */
function pointsOf({ queries, before, after }, prediction) {
  const values = prediction?.predicted_changes ?? prediction?.score_sums ?? [];
  return values.map((x, at) => ({
    x,
    y: (after[at] ?? Number.NaN) - (before[at] ?? Number.NaN),
    row: queries[at] ?? at,
  }));
}
