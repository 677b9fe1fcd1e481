// What the numbers mean, and how they were found, in sentences.
import { count, milliseconds, percent } from "../../format.js";
import { html } from "../../lib.js";

/** @param {{answer: import("../../wire.js").InfluenceAnswer, result: import("../../wire.js").Influence}} props */
export function Meaning({ answer, result }) {
  const { exact, recall, rescored, timing_ms: times } = answer;
  const found = exact
    ? "Exact: scoring every stored row would give the same rows."
    : recall
      ? `Approximate: of the true rows, ${percent(recall.top)} of the top and ${percent(recall.bottom)} of the bottom are found on average.`
      : "Approximate: some of the true rows may be missing.";
  return html`<div class="meaning">
    <span class=${`tag${exact ? "" : " warning"}`} title=${found}>${exact ? "exact" : "approximate"}</span>
    ${rescored && html`<span class="tag" title="Scores are from full gradients, for the rows that the search found.">rescored</span>`}
    <span class="small soft number">${count(result.rows_touched)} of ${count(result.rows_searched)} rows read in full · ${milliseconds(times.total ?? 0)}</span>
    <span class="small soft unit" title=${answer.convention}>${unitOf(answer.convention)}</span>
    <details class="fold meaning-words"><summary>More about the score</summary><div class="panel stack small">
      <p>${answer.convention}</p><p>${found}</p>
      <p>${timesText(times)}</p></div></details>
  </div>`;
}

/** The sentence of a convention that says what a score is. @param {string} convention */
function unitOf(convention) {
  const sentence = /Score: (.*?)\.(?: |$)/s.exec(convention)?.[1];
  return sentence ? `Score: ${sentence}.` : convention.split(". ")[0];
}

/** @param {Record<string, number>} times */
function timesText(times) {
  const stages = ["queue", "gradient", "search", "rescore", "percentiles", "render"];
  const spent = stages
    .filter((stage) => (times[stage] ?? 0) > 0.05)
    .map((stage) => `${stage} ${milliseconds(times[stage] ?? 0)}`);
  return `Time: ${spent.join(", ")}; ${milliseconds(times.total ?? 0)} in all.`;
}
