// Two requests for one answer: the cards at once, and what takes the service longer after them.
import { api } from "../../api.js";
import { hitsOf, questionOf } from "../../question.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

const FIRST = ["parts", "examples", "probabilities", "clusters"];
const LATER = ["percentiles", "histogram", "layers"];
const IN_FILE = ["parts", "examples", "probabilities", ...LATER]; // a file folds no near-duplicates

/**
 * @param {URLSearchParams} params @param {import("../../question.js").Source | null} source
 * @returns {{answer: import("../../resource.js").Resource<import("../../wire.js").InfluenceAnswer>,
 *   more: import("../../resource.js").Resource<import("../../wire.js").InfluenceAnswer>}}
 */
export function useAnswer(params, source) {
  const body = source && asked(params, source);
  const key = body && JSON.stringify([body, turn.value]);
  const answer = useResource(key, (signal) => api.ask("influence", { ...body, include: FIRST }, { signal }));
  const cards = answer.data && !answer.busy && !answer.problem; // first of all the cards
  const more = useResource(
    cards ? key : null,
    (signal) => api.ask("influence", { ...body, include: LATER }, { signal }),
    { keep: false },
  );
  return { answer, more };
}

/** The whole answer as one HTML document. @param {URLSearchParams} params @param {import("../../question.js").Source} source */
export function answerDocument(params, source) {
  return api.file("influence", { ...asked(params, source), include: IN_FILE }, "text/html");
}

/** @param {URLSearchParams} params @param {import("../../question.js").Source} source */
function asked(params, source) {
  const rescore = params.has("rescore") ? { rescore: true } : {};
  return { ...questionOf(params, source), ...rescore, k: hitsOf(params) };
}
