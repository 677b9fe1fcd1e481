// Prometheus's text format, as far as a glance at it needs.

/** @typedef {{labels: Record<string, string>, value: number}} Sample */

/** @param {string} text @returns {Map<string, Sample[]>} by name */
export function parsedMetrics(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const [, name = "", labels = "", value = ""] = match;
    if (!metrics.has(name)) metrics.set(name, []);
    metrics
      .get(name)
      .push({ labels: parsedLabels(labels), value: value === "+Inf" ? Number.POSITIVE_INFINITY : Number(value) });
  }
  return metrics;
}

/** @param {string} text */
function parsedLabels(text) {
  const pairs = [...text.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)];
  return Object.fromEntries(
    pairs.map(([, name, value = ""]) => [name, value.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign))]),
  );
}

/** @param {Map<string, Sample[]>} metrics @param {string} name @param {(labels: Record<string, string>) => boolean} [wanted] */
export function sumOf(metrics, name, wanted = () => true) {
  return (metrics.get(name) ?? []).filter(({ labels }) => wanted(labels)).reduce((sum, { value }) => sum + value, 0);
}

/**
 * A quantile of a histogram, linear within its bucket; null without an observation.
 * @param {Map<string, Sample[]>} metrics @param {string} name @param {number} share @param {(labels: Record<string, string>) => boolean} [wanted]
 */
export function quantileOf(metrics, name, share, wanted = () => true) {
  const byEdge = new Map();
  for (const { labels, value } of metrics.get(`${name}_bucket`) ?? []) {
    const edge = labels.le === "+Inf" ? Number.POSITIVE_INFINITY : Number(labels.le);
    if (wanted(labels)) byEdge.set(edge, (byEdge.get(edge) ?? 0) + value);
  }
  const buckets = [...byEdge].sort(([a], [b]) => a - b);
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let [low, before] = [0, 0];
  for (const [edge, count] of buckets) {
    if (count >= share * total)
      return Number.isFinite(edge)
        ? low + ((edge - low) * (share * total - before)) / Math.max(count - before, 1)
        : low;
    [low, before] = [edge, count];
  }
  return low;
}
