// Clean: training rows that are worth a look, and what people think of them.
import { changed, link } from "../address.js";
import { Failed, Notice, Skeleton } from "../components/states.js";
import { count } from "../format.js";
import { html } from "../lib.js";
import { later, marksState, useMarks } from "../marks.js";
import { who } from "../service.js";
import { Act } from "./clean/act.js";
import { Review } from "./clean/review.js";

/** @param {import("../views.js").ViewProps} props */
export function Clean({ params, details }) {
  useMarks();
  const { index, total, problem } = marksState.value;
  const acts = params.get("part") === "act";
  const known = index !== undefined && !(problem && !total); // else nothing can be said of the marks
  const tabs = /** @type {const} */ ([
    [false, "Review", ""],
    [true, "Act on the marks", count(total)],
  ]);
  return html`<div class="title"><h1>Clean the training set</h1>
      <p class="soft">Look at the rows that are likely to be wrong, and mark them.</p>
      <nav class="tabs clean-parts" aria-label="Steps">${tabs.map(
        ([act, words, number]) => html`<a class="tab" href=${link("clean", changed({ part: act ? "act" : null }))}
          aria-current=${act === acts ? "page" : null}>${words} <span class="count">${known ? number : ""}</span></a>`,
      )}</nav></div>
    ${problem && (known || !acts) && html`<${Notice} kind="warning">Marks cannot be read: ${problem.message}<//>`}
    ${!problem && who.value.read_only && html`<${Notice} kind="warning">Marks can be read, but not changed: the service cannot write its state file.<//>`}
    ${
      !acts
        ? html`<${Review} params=${params} details=${details} />`
        : known
          ? html`<${Act} params=${params} details=${details} />`
          : problem
            ? html`<div class="panel"><${Failed} problem=${problem} retry=${later} title="The marks cannot be read" /></div>`
            : html`<${Skeleton} lines=${3} height="6rem" label="Reading the marks" />`
    }`;
}
