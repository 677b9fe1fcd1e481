// Answer: the training rows that pushed the model towards what it does on the query, and those that pushed against it.
import { link } from "../address.js";
import { kindOf } from "../components/example.js";
import { Check } from "../components/fields.js";
import { Empty, Failed, Notice, Skeleton } from "../components/states.js";
import { labelText, sentence } from "../format.js";
import { html, useState } from "../lib.js";
import { sourceOf, sourceText } from "../question.js";
import { useAnswer } from "./answer/asking.js";
import { reachOf } from "./answer/differences.js";
import { End } from "./answer/end.js";
import { Groups } from "./answer/groups.js";
import { Keep } from "./answer/keep.js";
import { Landscape } from "./answer/landscape.js";
import { Meaning } from "./answer/meaning.js";
import { Neighbours, QueryCard } from "./answer/query-card.js";
import { hasTokens, tokensQuestion } from "./answer/tokens.js";
import { towards } from "./answer/towards.js";
import { Options } from "./question/options.js";

/** @param {import("../views.js").ViewProps} props */
export function Answer({ params, details }) {
  const source = sourceOf(params);
  const { answer, more } = useAnswer(params, source);
  if (!source) {
    return html`<${Empty} title="Nothing was asked" page>
      <p>${params.has("kept") ? "The example was too long for the address, so this link does not hold it." : "Choose an example to explain."}</p>
      <a class="button primary" href=${link("ask", params)}>Choose an example</a><//>`;
  }
  const result = answer.data?.results[0];
  const shown = answer.busy ? " stale" : "";
  const words = title(params, result, details);
  return html`<div class="title"><h1>${words}</h1><${Neighbours} params=${params} details=${details} />
      <div class="row ask-again">${!answer.problem && html`<${Keep} params=${params} source=${source} title=${words} />`}
        <a class="button" href=${link("ask", params)}>Choose another</a></div></div>
    <div class="beside answer">
      <aside class="rail stack" aria-label="The question">
        <${QueryCard} params=${params} details=${details} source=${source} query=${result?.query ?? null} problem=${answer.problem} />
        <div class="panel"><${Options} params=${params} details=${details} /></div>
      </aside>
      <div class="stack${shown}" aria-busy=${answer.busy}>
        <p class="hidden" role="status">${answer.busy ? "Asking" : result ? `${result.proponents.length} proponents and ${result.opponents.length} opponents` : ""}</p>
        ${
          answer.problem
            ? html`<div class="panel"><${Failed} problem=${answer.problem} retry=${answer.reload} /></div>`
            : answer.data && result
              ? html`<${Found} answer=${answer.data} result=${result} more=${more.data?.results[0] ?? null} params=${params} details=${details} source=${source} />`
              : html`<${Waiting} />`
        }
      </div>
    </div>`;
}

/**
 * @param {import("../views.js").ViewProps & {answer: import("../wire.js").InfluenceAnswer, result: import("../wire.js").Influence,
 *   more: import("../wire.js").Influence | null, source: import("../question.js").Source}} props
 */
function Found({ answer, result, more, params, details, source }) {
  const [allTokens, setAllTokens] = useState(false);
  const hits = [...result.proponents, ...result.opponents];
  const shared = {
    largest: Math.max(...hits.map(({ score }) => Math.abs(score)), 0),
    query: result.query,
    details,
    reach: reachOf(
      hits.map(({ example }) => example?.features),
      result.query.example?.features,
      details,
    ),
    tokens: hasTokens(answer, result, details) ? { question: tokensQuestion(params, source), all: allTokens } : null,
    more: new Map([...(more?.proponents ?? []), ...(more?.opponents ?? [])].map((hit) => [hit.row, hit])),
  };
  const ordered = !["repsim", "bm25"].includes(answer.method);
  const aim = towards(params, result.query, details);
  return html`${result.note && html`<${Notice}>${sentence(result.note)}<//>`}
    <div class="overview"><${Landscape} result=${result} distribution=${more?.distribution ?? null} />
      <${Groups} params=${params} source=${source} details=${details} /></div>
    <${Meaning} answer=${answer} result=${result} />
    ${shared.tokens && hits.some(({ example }) => kindOf(example) === "text") && html`<${Check} name="Show the tokens of all rows" checked=${allTokens} set=${setAllTokens} />`}
    <div class="ends-of-answer">
      <${End} title=${ordered ? "Proponents" : "Most similar"} words=${!ordered ? "" : aim ? `pushed towards ${aim}` : "lowered the loss"} hits=${result.proponents} side="proponent" shared=${shared} />
      <${End} title=${ordered ? "Opponents" : "Least similar"} words=${!ordered ? "" : aim ? `pushed away from ${aim}` : "raised the loss"} hits=${result.opponents} side="opponent" shared=${shared} />
    </div>`;
}

function Waiting() {
  return html`<div class="overview"><${Skeleton} height="11rem" label="Asking" /></div>
    <div class="ends-of-answer"><${Skeleton} lines=${5} height="6.5rem" /><${Skeleton} lines=${5} height="6.5rem" /></div>`;
}

/** @param {URLSearchParams} params @param {import("../wire.js").Influence | undefined} result @param {import("../wire.js").IndexDetails} details */
function title(params, result, details) {
  const what = sourceText(params);
  const named = sentence(what);
  if (!result) return named;
  const { query } = result;
  if (params.has("target") && params.get("target") !== "loss")
    return `What speaks for ${towards(params, query, details)} in ${what}?`;
  if (query.count > 1) return `What helped and hurt ${what}?`;
  if (query.prediction === null) return `What helped and hurt ${what}?`;
  const predicted = labelText(query.prediction, query.prediction_name);
  if (!details.class_names || query.label === null || query.label === query.prediction)
    return `Why is ${what} predicted ${predicted}?`;
  return `${named}: ${labelText(query.label, query.label_name)}, but predicted ${predicted}`;
}
