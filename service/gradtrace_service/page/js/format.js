// Numbers, labels and words, as everything on the page shows them.

const whole = new Intl.NumberFormat("en");

/** @param {number} value */
export const count = (value) => whole.format(value);

/** A measured number with three or so digits: 0.0123, 4.56, 1,234, 1.2e-7. @param {number | null | undefined} value */
export function measured(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e6)
    return value.toExponential(1).replace("-", "−").replace("e-", "e−").replace("e+", "e");
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4;
  return minus(new Intl.NumberFormat("en", { maximumFractionDigits: digits }).format(value));
}

/** A value of a table, as exact as people write them. @param {number} value */
export const exactly = (value) => minus(new Intl.NumberFormat("en", { maximumSignificantDigits: 6 }).format(value));

/** A score, with its sign. @param {number | null | undefined} value */
export function signed(value) {
  const text = measured(value);
  return value !== null && value !== undefined && value > 0 ? `+${text}` : text;
}

/** @param {number} share from 0 to 1 */
export const percent = (share) =>
  `${share >= 0.9995 || share === 0 ? Math.round(share * 100) : (share * 100).toFixed(share < 0.1 ? 2 : 1)} %`;

/** @param {number} ms */
export const milliseconds = (ms) =>
  ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;

/** A label in words. @param {number | null | undefined} label @param {string | null | undefined} [name] */
export function labelText(label, name) {
  if (name) return name;
  return label === null || label === undefined ? "unknown" : Number.isInteger(label) ? count(label) : measured(label);
}

/** @param {number} n @param {string} one @param {string} [many] */
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** How many rows of an index answer. @param {{rows: number, deleted?: number}} index */
export const present = ({ rows, deleted = 0 }) => rows - deleted;

/** What begins as a clause, as a sentence. @param {string} text */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** @param {string} text */
const minus = (text) => text.replace("-", "−");

const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const moment = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });

/** How long ago, in words. @param {string} when ISO @param {number} [now] milliseconds */
export function ago(when, now = Date.now()) {
  const seconds = (Date.parse(when) - now) / 1000;
  if (!Number.isFinite(seconds)) return "–";
  if (seconds > -45) return "just now";
  if (seconds > -3_600) return relative.format(Math.round(seconds / 60), "minute");
  if (seconds > -86_400) return relative.format(Math.round(seconds / 3_600), "hour");
  return relative.format(Math.round(seconds / 86_400), "day");
}

/** A time of the clock. @param {string | null | undefined} when ISO */
export const clock = (when) => (when ? moment.format(new Date(when)) : "–");
