// Ask: what to explain. A click on a row answers; the ways to ask stand beside.
import { changed, link } from "../address.js";
import { PAGE } from "../components/virtual.js";
import { askAhead, listOf } from "../examples.js";
import { count, present } from "../format.js";
import { later } from "../later.js";
import { html } from "../lib.js";
import { Picker } from "./ask/picker.js";
import { Options } from "./question/options.js";

const Own = later(() => import("./ask/own.js").then(({ Own }) => Own));
const Saved = later(() => import("./ask/saved.js").then(({ Saved }) => Saved));

/** Most indexes have a query set; where this one has none, the answer is empty. @param {URLSearchParams} params */
export async function askRowsAhead(params) {
  const from = params.get("from") ?? "query";
  if (from === "query" || from === "train") await askAhead(from, listOf(params), PAGE);
}

/** @param {import("../views.js").ViewProps} props */
export function Ask({ params, details }) {
  const from = params.get("from") ?? (details.query_rows ? "query" : "train");
  const tabs = [
    ...(details.query_rows ? [["query", "Query set", count(details.query_rows)]] : []),
    ["train", "Training set", count(present(details))],
    ["own", "Your own", ""],
    ["saved", "Saved", ""],
  ];
  const none = { query: null, train: null, several: null, offset: null };
  return html`<div class="title"><h1>What should be explained?</h1>
      <p class="soft">Choose an example, and see which training rows made the model predict what it does.</p></div>
    <div class="beside ask">
      <aside class="rail panel" aria-label="How to ask"><${Options} params=${params} details=${details} /></aside>
      <section class="stack" aria-label="Examples">
        <nav class="tabs" aria-label="Where the example is from">${tabs.map(
          ([name, words, rows]) => html`<a class="tab" href=${link("ask", changed({ ...none, from: name }))}
            aria-current=${name === from ? "page" : null}>${words} <span class="count">${rows}</span></a>`,
        )}</nav>
        ${
          from === "own"
            ? html`<${Own} params=${params} details=${details} />`
            : from === "saved"
              ? html`<${Saved} params=${params} />`
              : html`<${Picker} params=${params} details=${details} split=${from === "train" ? "train" : "query"} />`
        }
      </section>
    </div>`;
}
