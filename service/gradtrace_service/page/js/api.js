// The one way to the service: errors one can read, the key, and patience with a service that is busy or restarting.
import { signal } from "./lib.js";
import { apiKey, askToSignIn } from "./session.js";

/**
 * @typedef {import("./address.js").Parameters} Parameters
 * @typedef {{query?: Parameters, body?: unknown, accept?: string, signal?: AbortSignal, quiet?: boolean}} Options
 *   quiet: whether nobody is told that it waits
 * @typedef {{field: string, detail: string}} FieldProblem
 */

const PATIENCE_MS = 120_000;
const LONGEST_WAIT_MS = 8_000;
const RESTART_MS = 30_000; // what takes longer is perhaps no restart

/** A refusal of the service, from its problem document (RFC 9457), or what else went wrong on the way. */
export class Problem extends Error {
  /**
   * @param {string} detail what is wrong, and the remedy
   * @param {{status?: number, kind?: string, errors?: FieldProblem[], requestId?: string | null,
   *   document?: Record<string, any>}} [more] document: the whole problem document, which may say more
   */
  constructor(detail, { status = 0, kind = "", errors = [], requestId = null, document = {} } = {}) {
    super(detail);
    this.status = status;
    this.kind = kind;
    this.errors = errors;
    this.requestId = requestId;
    this.document = document;
  }
}

/** Set while a request waits for the service: why. */
export const patience = signal(/** @type {null | {reason: string}} */ (null));

/** Grows when the service answers again after it could not be reached. */
export const returned = signal(0);

/** When the service was first missed; null: it answered last. @type {number | null} */
let missedSince = null;

/** Raised by the button that gives up waiting. */
let impatience = new AbortController();
export function stopWaiting() {
  impatience.abort();
  impatience = new AbortController();
}

export const api = {
  /** @param {string} path relative to the page @param {Options} [options] @returns {Promise<any>} */
  get: (path, options = {}) => request("GET", path, options, true),
  /** A question, which may be asked again. @param {string} path @param {unknown} body @param {Options} [options] @returns {Promise<any>} */
  ask: (path, body, options = {}) => request("POST", path, { ...options, body }, true),
  /** A question whose answer is a file of the media type `accept`. @param {string} path @param {unknown} body @param {string} accept @returns {Promise<Response>} */
  file: (path, body, accept) => answered("POST", path, { body, accept }, true),
  /** An act, which is not repeated where it may have been done. @param {string} path @param {unknown} body @param {Options} [options] @returns {Promise<any>} */
  act: (path, body, options = {}) => request("POST", path, { ...options, body }, false),
  /** @param {string} path @param {unknown} body @param {Options} [options] @returns {Promise<any>} */
  put: (path, body, options = {}) => request("PUT", path, { ...options, body }, false),
  /** @param {string} path @param {Options} [options] @returns {Promise<any>} */
  delete: (path, options = {}) => request("DELETE", path, options, false),
  /** The answer as it came, such as a file to save. @param {string} path @param {Options} [options] @returns {Promise<Response>} */
  raw: (path, options = {}) => answered("GET", path, options, true),
  events,
};

/**
 * @param {string} method @param {string} path @param {Options} options @param {boolean} repeatable
 */
async function request(method, path, options, repeatable) {
  const response = await answered(method, path, options, repeatable);
  return response.status === 204 ? null : response.json();
}

/**
 * Server-sent events until the signal. EventSource cannot send a key.
 * @param {string} path @param {(event: {event: string, data: any}) => void} receive @param {AbortSignal} abort
 * @param {boolean} [quiet] as of the options
 */
async function events(path, receive, abort, quiet = false) {
  const response = await answered("GET", path, { signal: abort, quiet }, true);
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = (await reader?.read()) ?? { done: true, value: "" };
    if (done) return;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop() ?? "";
    for (const block of blocks) {
      const event = parsedEvent(block);
      if (event) receive(event);
    }
  }
}

/** @param {string} block */
function parsedEvent(block) {
  const fields = block.split(/\r?\n/).map((line) => /^(\w+): ?(.*)$/.exec(line));
  const data = fields.filter((field) => field?.[1] === "data").map((field) => field?.[2]);
  if (!data.length) return null;
  return { event: fields.find((field) => field?.[1] === "event")?.[2] ?? "message", data: JSON.parse(data.join("\n")) };
}

/**
 * The first answer that is one: after signing in, and after waiting.
 * @param {string} method @param {string} path @param {Options} options @param {boolean} repeatable
 * @returns {Promise<Response>}
 */
async function answered(method, path, options, repeatable) {
  const started = performance.now();
  const mark = { waits: false };
  try {
    for (let attempt = 0; ; attempt++) {
      const { response, failure } = await tried(method, path, options);
      if (response?.ok) return response;
      const problem = response ? await problemOf(response) : failure;
      if (!problem) throw new Problem("the service gave no answer");
      if (response?.status === 401 && (await askToSignIn(apiKey.peek() ? problem.message : ""))) continue;
      const wait = waitOf(problem, response, attempt, repeatable);
      if (wait === null || performance.now() - started > PATIENCE_MS) throw problem;
      if (!options.quiet) waitBegins(mark, problem);
      await pause(wait, options.signal);
    }
  } finally {
    waitEnds(mark);
  }
}

/** @param {string} method @param {string} path @param {Options} options */
async function tried(method, path, { query, body, accept, signal: abort }) {
  const headers = new Headers(apiKey.peek() ? { Authorization: `Bearer ${apiKey.peek()}` } : {});
  if (body !== undefined) headers.set("Content-Type", "application/json");
  if (accept !== undefined) headers.set("Accept", accept);
  try {
    const init = { method, headers, body: body === undefined ? null : JSON.stringify(body), signal: abort ?? null };
    const response = await fetch(target(path, query), init);
    if (response.status !== 502) hasReturned(); // else it is a proxy that misses it
    return { response };
  } catch (error) {
    if (abort?.aborted) throw error;
    return { failure: new Problem(missingText(), { kind: "unreachable" }) };
  }
}

function hasReturned() {
  if (missedSince !== null) returned.value += 1;
  missedSince = null;
}

function missingText() {
  missedSince ??= performance.now();
  const ms = performance.now() - missedSince;
  if (ms < RESTART_MS) return "The service cannot be reached. It may be restarting; is it running?";
  return `The service has not been reached for ${Math.round(ms / 1_000)} seconds. Is it running?`;
}

/** @param {string} path @param {Parameters} [query] */
function target(path, query = {}) {
  const url = new URL(path, document.baseURI.replace(/[?#].*$/s, ""));
  for (const [name, value] of Object.entries(query)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "") url.searchParams.append(name, String(item));
    }
  }
  return url;
}

/** @param {Response} response */
async function problemOf(response) {
  const { status } = response;
  try {
    const document = await response.json();
    const kind =
      String(document.type ?? "")
        .split(":")
        .pop() ?? "";
    const detail = String(document.detail ?? document.title ?? `the service answered ${status}`);
    const { errors = [], request_id: requestId = null } = document;
    return new Problem(detail, { status, kind, errors, requestId, document });
  } catch {
    return new Problem(`The service, or a proxy before it, answered ${status}.`, { status });
  }
}

/**
 * Milliseconds until the next attempt; null: there is no use.
 * @param {Problem} problem @param {Response | undefined} response @param {number} attempt @param {boolean} repeatable
 */
function waitOf(problem, response, attempt, repeatable) {
  const refused = response?.status === 429 || response?.status === 503; // nothing was done
  const lost = problem.kind === "unreachable" || response?.status === 502;
  if (!refused && !(lost && repeatable)) return null;
  const asked = Number(response?.headers.get("Retry-After") ?? Number.NaN) * 1000;
  const backoff = Math.min(500 * 2 ** attempt, LONGEST_WAIT_MS);
  return Number.isFinite(asked) ? Math.max(asked, 200) : backoff;
}

const waits = new Set();

/** @param {{waits: boolean}} mark @param {Problem} problem */
function waitBegins(mark, problem) {
  waits.add(mark);
  patience.value = { reason: problem.message };
}

/** @param {{waits: boolean}} mark */
function waitEnds(mark) {
  if (waits.delete(mark) && !waits.size) patience.value = null;
}

/** @param {number} ms @param {AbortSignal} [abort] @returns {Promise<void>} */
function pause(ms, abort) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    const stop = () => {
      clearTimeout(timer);
      reject(abort?.aborted ? abort.reason : new Problem("You stopped waiting for the service.", { kind: "stopped" }));
    };
    abort?.addEventListener("abort", stop, { once: true });
    impatience.signal.addEventListener("abort", stop, { once: true });
  });
}
