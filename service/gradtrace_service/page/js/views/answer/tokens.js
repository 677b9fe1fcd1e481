// Which tokens a score comes from: those of the row's text, and those of the query's, the brighter the stronger.
import { api } from "../../api.js";
import { Failed, Skeleton } from "../../components/states.js";
import { signed } from "../../format.js";
import { html } from "../../lib.js";
import { questionOf } from "../../question.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

const BRIGHTEST = 55; // % of a fill's colour: on more, the text would be hard to read
const NAMED = 5; // strongest tokens that are read out

/** @typedef {import("../../wire.js").TokenShares} TokenShares */

/**
 * Whether the scores of an answer can be split by token.
 * @param {import("../../wire.js").InfluenceAnswer} answer @param {import("../../wire.js").Influence} result
 * @param {import("../../wire.js").IndexDetails} details
 */
export function hasTokens(answer, result, details) {
  return result.query.count === 1 && Boolean(details.token_methods?.includes(answer.method));
}

/**
 * What is asked of each row: the question, without what only a search needs.
 * @param {URLSearchParams} params @param {import("../../question.js").Source} source
 */
export function tokensQuestion(params, source) {
  const { filter: _, ...question } = /** @type {Record<string, unknown>} */ (questionOf(params, source));
  return question;
}

/** @param {{row: number, question: Record<string, unknown>, text: any}} props text: what stands there meanwhile */
export function Tokens({ row, question, text }) {
  const body = { ...question, rows: [row] };
  const { data, problem, reload } = useResource(JSON.stringify([body, turn.value]), (signal) =>
    api.ask("influence/tokens", body, { signal }),
  );
  if (problem) return html`${text}<${Failed} problem=${problem} retry=${reload} />`;
  if (!data) return html`${text}<${Skeleton} height="1.5rem" label="Splitting the score by token" />`;
  const [result] = /** @type {import("../../wire.js").TokensAnswer} */ (data).results;
  if (!result) return text;
  return html`<${Heat} title="Tokens of the row" tokens=${result.tokens} shares=${result.training} />
    <p class="small soft">In the query:</p>
    <${Heat} title="Tokens of the query" tokens=${data.query_tokens} shares=${result.query} />`;
}

/** @param {{title: string, tokens: string[], shares: TokenShares}} props */
function Heat({ title, tokens, shares }) {
  const { scores, elsewhere } = shares;
  const largest = Math.max(...scores.map(Math.abs), 0);
  return html`<section class="heat-of" aria-label=${title}>
    <p class="hidden">${strongest(tokens, scores)}</p>
    <div class="heat" dir="auto" tabindex="0" role="group" aria-label=${title}>${tokens.map(
      (token, at) => html`<${Token} token=${token} score=${scores[at] ?? 0} largest=${largest} />`,
    )}</div>
    ${Math.abs(elsewhere) >= largest / 100 && html`<p class="small soft number" title="Of layers that do not run over the tokens, parameters without layers, and the rounding of the stored row">${signed(elsewhere)} elsewhere</p>`}
  </section>`;
}

/** @param {{token: string, score: number, largest: number}} props */
function Token({ token, score, largest }) {
  const heat = largest ? Math.round((BRIGHTEST * Math.abs(score)) / largest) : 0;
  return html`<span class=${score < 0 ? "opposes" : "helps"} style=${{ "--heat": `${heat}%` }} title=${`${signed(score)} ${token.trim()}`}>${token}</span>`;
}

/** In words. @param {string[]} tokens @param {number[]} scores */
function strongest(tokens, scores) {
  const named = scores
    .map((score, at) => ({ score, token: (tokens[at] ?? "").trim() }))
    .filter(({ token }) => token)
    .sort((one, other) => Math.abs(other.score) - Math.abs(one.score))
    .slice(0, NAMED);
  return `The strongest tokens: ${named.map(({ token, score }) => `${token} ${signed(score)}`).join(", ")}`;
}
