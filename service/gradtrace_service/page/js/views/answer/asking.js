// Two requests for one answer: the cards at once, and what takes the service longer after them.
import { api } from "../../api.js";
import { hitsOf, questionOf } from "../../question.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

const FIRST = ["parts", "examples", "probabilities"];
const LATER = ["percentiles", "histogram", "layers"];

/**
 * @param {URLSearchParams} params @param {import("../../question.js").Source | null} source
 * @returns {{answer: import("../../resource.js").Resource<import("../../wire.js").InfluenceAnswer>,
 *   more: import("../../resource.js").Resource<import("../../wire.js").InfluenceAnswer>}}
 */
export function useAnswer(params, source) {
  const rescore = params.has("rescore") ? { rescore: true } : {};
  const body = source && { ...questionOf(params, source), ...rescore, k: hitsOf(params) };
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
