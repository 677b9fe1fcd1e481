// Clean: training rows that are worth a look, and what people think of them.
import { changed, link } from "../address.js";
import { Notice } from "../components/states.js";
import { count } from "../format.js";
import { html } from "../lib.js";
import { marksState, useMarks } from "../marks.js";
import { who } from "../service.js";
import { Act } from "./clean/act.js";
import { Review } from "./clean/review.js";

/** @param {import("../views.js").ViewProps} props */
export function Clean({ params, details }) {
  useMarks();
  const { total, problem } = marksState.value;
  const acts = params.get("part") === "act";
  const tabs = /** @type {const} */ ([
    [false, "Review", ""],
    [true, "Act on the marks", count(total)],
  ]);
  return html`<div class="title"><h1>Clean the training set</h1>
      <p class="soft">Look at the rows that are likely to be wrong, mark them, and see what removing them would do.</p>
      <nav class="tabs clean-parts" aria-label="Steps">${tabs.map(
        ([act, words, number]) => html`<a class="tab" href=${link("clean", changed({ part: act ? "act" : null }))}
          aria-current=${act === acts ? "page" : null}>${words} <span class="count">${number}</span></a>`,
      )}</nav></div>
    ${problem && html`<${Notice} kind="warning">Marks cannot be read: ${problem.message}<//>`}
    ${!problem && who.value.read_only && html`<${Notice} kind="warning">Marks can be read, but not changed: the service cannot write its state file.<//>`}
    ${acts ? html`<${Act} params=${params} details=${details} />` : html`<${Review} params=${params} details=${details} />`}`;
}
