// The requests of a comparison: the hits of each side, and the scores of all rows of both.
import { api } from "../../api.js";
import { hitsOf } from "../../question.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

/**
 * @typedef {{pearson: number | null, spearman: number | null, overlap: {proponents: number, opponents: number}, k: number,
 *   points: {row: number[], first: number[], second: number[]}, rows: number}} Comparison
 * @typedef {import("../../resource.js").Resource<import("../../wire.js").InfluenceAnswer>} Answer
 * @typedef {{first: Answer, second: Answer, both: import("../../resource.js").Resource<Comparison>, k: number}} Asked
 */

/** @param {import("./side.js").Side} first @param {import("./side.js").Side} second @param {number} generation @returns {Asked} */
export function useComparison(first, second, generation) {
  const k = hitsOf(first.params);
  const bodies = { first: scoresOf(first.body), second: scoresOf(second.body), k };
  const both = useResource(JSON.stringify([bodies, generation, turn.value]), (signal) =>
    api.ask("influence/compare", bodies, { signal }),
  );
  return { first: useSide(first, k, generation), second: useSide(second, k, generation), both, k };
}

/** @param {import("./side.js").Side} side @param {number} k @param {number} generation @returns {Answer} */
function useSide(side, k, generation) {
  const body = { ...side.body, k, include: ["examples"] };
  return useResource(JSON.stringify([body, generation, turn.value]), (signal) =>
    api.ask("influence", body, { signal }),
  );
}

/** The scores of all rows are compared; of several queries, their mean always. @param {Record<string, any> | null} body */
function scoresOf(body) {
  const { aggregate: _, ...rest } = body ?? {};
  return rest;
}
