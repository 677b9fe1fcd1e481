// The class that proponents push towards.
import { labelText } from "../../format.js";

/**
 * In words; "" where there is no one class.
 * @param {URLSearchParams} params @param {import("../../wire.js").QueryInfo} query @param {import("../../wire.js").IndexDetails} details
 */
export function towards(params, query, details) {
  const names = details.class_names;
  if (!names) return "";
  const target = params.get("target");
  const rather = params.get("rather");
  if (target !== null && target !== "loss") {
    const name = names[Number(target)] ?? target;
    return rather === null ? name : `${name} rather than ${names[Number(rather)] ?? rather}`;
  }
  if (query.label !== null) return labelText(query.label, query.label_name);
  return query.prediction === null ? "" : labelText(query.prediction, query.prediction_name);
}
