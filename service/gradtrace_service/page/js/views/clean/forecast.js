// What removing rows would do to the loss, as a method predicts it.
import { change, link } from "../../address.js";
import { api } from "../../api.js";
import { Change } from "../../components/change.js";
import { Choice } from "../../components/fields.js";
import { Failed, Skeleton } from "../../components/states.js";
import { count, measured, plural, signed } from "../../format.js";
import { html } from "../../lib.js";
import { useResource } from "../../resource.js";
import { sampledRows } from "../../sample.js";
import { chosenIndex, turn } from "../../service.js";

/** @typedef {import("../../wire.js").RemovalAnswer} RemovalAnswer */

const SHOWN = 8; // queries of either end

/** The method that predicts, unless the address says another. @param {URLSearchParams} params @param {import("../../wire.js").IndexDetails} details */
export function forecastMethod(params, details) {
  const asked = params.get("forecast");
  return asked ?? (details.methods.includes("influence") ? "influence" : (details.methods[0] ?? "tracin"));
}

/** @param {import("../../views.js").ViewProps & {rows: number[]}} props */
export function Forecast({ rows, params, details }) {
  const method = forecastMethod(params, details);
  const queries = sampledRows(details.query_rows || details.rows);
  const source = details.query_rows ? { query_rows: queries } : { train_rows: queries };
  const body = { ...chosenIndex(), rows, ...source, method };
  const answer = useResource(JSON.stringify([body, details.generation, turn.value]), (signal) =>
    api.ask("influence/removal", body, { signal }),
  );
  const sampled = queries.length < (details.query_rows || details.rows);
  const set = details.query_rows ? "query set" : "training set";
  return html`<${Choice} name="Predicted by" value=${method} choose=${(/** @type {string} */ name) => change({ forecast: name })}
      options=${details.methods.map((name) => [name, name])} />
    <p class="small soft">${sampled ? `${plural(queries.length, "row")} of the ${set}, evenly spaced among ${count(details.query_rows || details.rows)}.` : `All ${plural(queries.length, "row")} of the ${set}.`}</p>
    ${
      answer.problem
        ? html`<${Failed} problem=${answer.problem} retry=${answer.reload} />`
        : answer.data
          ? html`<div class=${`stack${answer.busy ? " stale" : ""}`} aria-busy=${answer.busy}><${Effect} answer=${answer.data} /></div>`
          : html`<${Skeleton} height="9rem" label="Predicting" />`
    }`;
}

/** @param {{answer: RemovalAnswer}} props */
function Effect({ answer }) {
  const { mean, results } = answer;
  const value = (/** @type {import("../../wire.js").RemovalTerms} */ terms) =>
    terms.predicted_change ?? terms.score_sum;
  const forecast = mean.predicted_change !== null;
  const better = results.filter((result) => value(result) < 0).length;
  const ordered = [...results].sort((a, b) => value(a) - value(b));
  const ends = [...ordered.slice(0, SHOWN), ...ordered.slice(Math.max(SHOWN, ordered.length - SHOWN))];
  const largest = Math.max(...ends.map((result) => Math.abs(value(result))), 0);
  return html`
    ${
      forecast
        ? html`<${Change} before=${mean.loss} change=${mean.predicted_change ?? 0} what="mean loss of the queries" />`
        : html`<p>Sum of the scores, in the mean <strong class="number">${signed(mean.score_sum)}</strong>. The method predicts no loss: the sums only tell which queries are affected most.</p>`
    }
    <p class="small soft">Without ${plural(answer.rows, "row")}: ${count(better)} of ${plural(results.length, "query", "queries")} ${forecast ? "would have a lower loss" : "have the rows against them"}, ${count(results.length - better)} ${forecast ? "a higher one" : "have them in favour"}.</p>
    <table class="clean-effects"><caption class="small soft">The queries that would change most</caption>
      <thead><tr><th scope="col">Query</th><th scope="col">Label</th><th scope="col">Loss</th><th scope="col" colspan="2">${forecast ? "Predicted change" : "Sum of scores"}</th></tr></thead>
      <tbody>${ends.map((result) => html`<${Line} result=${result} value=${value(result)} largest=${largest} />`)}</tbody></table>
    <details class="fold"><summary>What this means</summary><p class="small soft">${answer.convention}</p></details>`;
}

/** @param {{result: RemovalAnswer["results"][0], value: number, largest: number}} props */
function Line({ result, value, largest }) {
  const { query, loss } = result;
  const share = largest > 0 ? (50 * Math.abs(value)) / largest : 0;
  return html`<tr><th scope="row">${query.row === null ? "–" : html`<a href=${link("answer", { ...chosenIndex(), [query.split ?? "query"]: query.row })}>${count(query.row)}</a>`}</th><td>${query.label_name ?? measured(query.label)}</td>
    <td class="number">${measured(loss)}</td><td class="number">${signed(value)}</td>
    <td class="clean-effect"><div class="score-bar" aria-hidden="true"><i class=${value < 0 ? "lower" : "higher"} style=${{ width: `${share}%` }}></i></div></td></tr>`;
}
