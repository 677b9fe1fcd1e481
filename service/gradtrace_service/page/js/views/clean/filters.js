// In which order rows are listed, and which of them.
import { change, changed, link } from "../../address.js";
import { Check, Choice, ClassChoice } from "../../components/fields.js";
import { html } from "../../lib.js";
import { KINDS } from "../../marks.js";
import { rankingOf, rankingsOf } from "./ranking.js";

/** @param {import("../../views.js").ViewProps} props */
export function Order({ params, details }) {
  const { by } = rankingOf(params);
  const offered = rankingsOf(details);
  const words = offered.find((ranking) => ranking.by === by)?.words;
  return html`<div class="stack tight"><nav class="tabs" aria-label="Which rows come first">${offered.map(
    (ranking) => html`<a class="tab" aria-current=${ranking.by === by ? "page" : null}
      href=${link("clean", changed({ by: ranking.by === "self" ? null : ranking.by, row: null, offset: null }))}>${ranking.title}</a>`,
  )}</nav><p class="small soft">${words}</p></div>`;
}

/** @param {import("../../views.js").ViewProps} props */
export function Filters({ params, details }) {
  const { by } = rankingOf(params);
  const names = details.class_names;
  /** @param {string} name @returns {(value: number[] | string | boolean) => void} */
  const set = (name) => (value) => change({ [name]: value, row: null, ...(name !== "show" && { offset: null }) });
  const classes = (/** @type {string} */ name) => params.getAll(name).map(Number);
  const methods = details.methods.map((name) => /** @type {[string, string]} */ ([name, name]));
  return html`<search class="clean-filters">
    <${Choice} name="Show" value=${params.get("show") ?? "all"} choose=${(/** @type {string} */ show) => set("show")(show === "all" ? "" : show)}
      options=${[["all", "Marked or not"], ["open", "Not marked yet"], ...KINDS.map(({ kind, title }) => [kind, `Marked ${title.toLowerCase()}`])]} />
    ${names && html`<${ClassChoice} name="Label" names=${names} chosen=${classes("class")} choose=${set("class")} />`}
    ${by === "harm" && names && html`<${ClassChoice} name="Harm to queries of" names=${names} chosen=${classes("slice")} choose=${set("slice")} />`}
    ${
      by !== "disagree" &&
      html`<${Choice} name="Method" value=${params.get("method") ?? "tracin"} options=${methods}
        choose=${(/** @type {string} */ name) => set("method")(name === "tracin" ? "" : name)} />`
    }
    ${by !== "disagree" && names && html`<div class="clean-check"><${Check} name="Predicted as another class" checked=${params.has("wrong")} set=${set("wrong")} /></div>`}
  </search>`;
}
