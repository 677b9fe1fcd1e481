// The service at a glance, from the metrics that it gives to Prometheus.
import { api } from "../../api.js";
import { Failed, Skeleton } from "../../components/states.js";
import { count, measured, milliseconds, percent } from "../../format.js";
import { html, useEffect, useRef } from "../../lib.js";
import { parsedMetrics, quantileOf, sumOf } from "../../prometheus.js";
import { useResource } from "../../resource.js";

/** @typedef {Map<string, import("../../prometheus.js").Sample[]>} Samples */

const EVERY_MS = 5_000;
const ENDPOINTS = 8;
const OWN = /^\/(page\/|events|metrics|whoami|$)/; // what the page asks for itself

export function Metrics() {
  const asked = useResource("metrics", async (signal) => {
    const response = await api.raw("metrics", { signal });
    return { samples: parsedMetrics(await response.text()), at: performance.now() };
  });
  useEffect(() => {
    const timer = setInterval(() => document.visibilityState === "visible" && asked.reload(), EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  const rate = useRate(asked.data);
  return html`<section class="panel stack" aria-label="Metrics"><h2>The service at a glance</h2>
    ${
      asked.problem && !asked.data
        ? html`<${Failed} problem=${asked.problem} retry=${asked.reload} />`
        : !asked.data
          ? html`<${Skeleton} height="8rem" label="Reading the metrics" />`
          : html`<${Figures} samples=${asked.data.samples} rate=${rate} /><${Endpoints} samples=${asked.data.samples} />
            <p class="small soft">Since the service was started; read every ${EVERY_MS / 1000} seconds. All of it: <a href="metrics">metrics</a>.</p>`
    }</section>`;
}

/** Requests a second between the last two readings. @param {{samples: Samples, at: number} | null} data */
function useRate(data) {
  const last = useRef({ total: Number.NaN, at: 0, rate: /** @type {number | null} */ (null) });
  if (data && data.at !== last.current.at) {
    const total = sumOf(data.samples, "gradtrace_requests_total", ({ endpoint = "" }) => !OWN.test(endpoint));
    const { total: before, at } = last.current;
    last.current = {
      total,
      at: data.at,
      rate: Number.isNaN(before) ? null : Math.max(total - before, 0) / ((data.at - at) / 1000),
    };
  }
  return last.current.rate;
}

/** @param {{samples: Samples, rate: number | null}} props */
function Figures({ samples, rate }) {
  const requests = sumOf(samples, "gradtrace_requests_total");
  const failed = sumOf(samples, "gradtrace_requests_total", ({ status = "" }) => status.startsWith("5"));
  const searched = sumOf(samples, "gradtrace_rows_searched_total");
  const [open, most] = [sumOf(samples, "process_open_fds"), sumOf(samples, "process_max_fds")];
  const started = sumOf(samples, "process_start_time_seconds");
  const figures = [
    ["Requests", count(requests), rate === null ? "" : `${measured(rate)} a second now`],
    [
      "Waiting",
      count(sumOf(samples, "gradtrace_queue_length")),
      `waited ${seconds(quantileOf(samples, "gradtrace_queue_seconds", 0.5))} in the median`,
    ],
    [
      "A pass of a worker",
      seconds(quantileOf(samples, "gradtrace_batch_seconds", 0.5)),
      `95 % below ${seconds(quantileOf(samples, "gradtrace_batch_seconds", 0.95))}`,
    ],
    ["Failed (5xx)", count(failed), errorsText(samples)],
    [
      "Rows read in full",
      searched ? percent(sumOf(samples, "gradtrace_rows_touched_total") / searched) : "–",
      `of ${count(searched)} searched`,
    ],
    ["Memory", megabytes(sumOf(samples, "process_resident_memory_bytes")), "of the process that answers HTTP"],
    ["Open files", count(open), most ? `of ${count(most)}` : ""],
    ["Running for", started ? duration(Date.now() / 1000 - started) : "–", freeText(samples)],
  ];
  return html`<dl class="op-figures">${figures.map(([name, value, more]) => html`<div><dt class="small soft">${name}</dt><dd class="number">${value}</dd><dd class="small soft">${more}</dd></div>`)}</dl>`;
}

/** @param {{samples: Samples}} props */
function Endpoints({ samples }) {
  const names = [
    ...new Set((samples.get("gradtrace_request_seconds_count") ?? []).map(({ labels }) => labels.endpoint ?? "")),
  ];
  const lines = names
    .filter((endpoint) => !OWN.test(endpoint))
    .map((endpoint) => {
      const mine = (/** @type {Record<string, string>} */ labels) => labels.endpoint === endpoint;
      const times = [0.5, 0.95].map((share) => quantileOf(samples, "gradtrace_request_seconds", share, mine));
      return { endpoint, requests: sumOf(samples, "gradtrace_request_seconds_count", mine), times };
    })
    .sort((a, b) => b.requests - a.requests)
    .slice(0, ENDPOINTS);
  if (!lines.length) return null;
  return html`<div class="scrolls" tabindex="0" role="region" aria-label="Table of endpoints"><table class="op-table"><thead><tr><th scope="col">Endpoint</th><th scope="col">Requests</th><th scope="col">Median</th><th scope="col">95 %</th></tr></thead>
    <tbody>${lines.map(({ endpoint, requests, times }) => html`<tr><th scope="row"><code>${endpoint}</code></th><td class="number">${count(requests)}</td>${times.map((time) => html`<td class="number">${seconds(time)}</td>`)}</tr>`)}</tbody></table></div>`;
}

/** @param {Samples} samples */
function errorsText(samples) {
  const kinds = (samples.get("gradtrace_errors_total") ?? [])
    .filter(({ value }) => value > 0)
    .sort((a, b) => b.value - a.value);
  return kinds.length
    ? `refused or failed: ${kinds
        .slice(0, 2)
        .map(({ labels, value }) => `${labels.kind} ${count(value)}`)
        .join(", ")}`
    : "nothing was refused";
}

/** @param {Samples} samples */
function freeText(samples) {
  const free = (samples.get("gradtrace_index_disk_free_bytes") ?? []).map(({ value }) => value);
  return free.length ? `${(Math.min(...free) / 1e9).toFixed(1)} GB of disk are free` : "";
}

/** @param {number | null} value */
const seconds = (value) => (value === null ? "–" : milliseconds(value * 1000));

/** @param {number} bytes */
const megabytes = (bytes) => (bytes ? `${count(Math.round(bytes / 2 ** 20))} MB` : "–");

/** @param {number} value in seconds */
function duration(value) {
  if (value < 3_600) return `${Math.max(Math.round(value / 60), 0)} min`;
  return value < 86_400 ? `${(value / 3_600).toFixed(1)} h` : `${(value / 86_400).toFixed(1)} days`;
}
