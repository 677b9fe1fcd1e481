// Some rows for all of them, where all would take too long.
import { MOST_QUERIES } from "./question.js";

/** Rows from 0 to `total`, evenly spaced, at most so many. @param {number} total @param {number} [most] */
export function sampledRows(total, most = MOST_QUERIES) {
  const size = Math.min(total, most);
  return Array.from({ length: size }, (_, at) => Math.floor((at * total) / size));
}
