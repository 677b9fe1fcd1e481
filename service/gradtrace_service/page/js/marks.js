// What people think of training rows: kept by the service, shared by all who look at its page.
import { api, Problem } from "./api.js";
import { concerns, useChanges } from "./changes.js";
import { toast } from "./components/toast.js";
import { count, plural } from "./format.js";
import { signal, useCallback, useEffect } from "./lib.js";
import { chosenIndex, indexName } from "./service.js";

/**
 * @typedef {"wrong" | "right" | "unsure" | "remove"} Kind
 * @typedef {import("./wire.js").Mark} Mark
 * @typedef {{row: number, mark: Mark | null}} Conflict
 */

/** @type {{kind: Kind, key: string, title: string, meaning: string}[]} */
export const KINDS = [
  { kind: "wrong", key: "w", title: "Wrong", meaning: "the label is wrong" },
  { kind: "right", key: "r", title: "Right", meaning: "the label is right" },
  { kind: "unsure", key: "u", title: "Unsure", meaning: "somebody else should look" },
  { kind: "remove", key: "x", title: "Remove", meaning: "delete the row" },
];

const PAGE = 1_000;
const MOST = 20_000; // marks that the page keeps
const TOGETHER_MS = 150; // events that come in that time are answered by one request

/** By row, of the index that is looked at. */
export const marks = signal(/** @type {Map<number, Mark>} */ (new Map()));
export const marksState = signal(
  /** @type {{index: string | null | undefined, total: number, counts: Record<string, number>, problem: Error | null}} */ ({
    index: undefined,
    total: 0,
    counts: {},
    problem: null,
  }),
);

/** What another person set in the meantime, by row, until it is looked at. */
export const conflicts = signal(/** @type {Map<number, {theirs: Mark | null, mine: Kind | null}>} */ (new Map()));

/** Changes of this page that can be undone, the latest last. */
const done = signal(/** @type {{change: number, rows: number[], index: string | null}[]} */ ([]));

/** Keep `marks` as the service has them while the component is there. */
export function useMarks() {
  const index = indexName.value;
  useEffect(() => {
    const abort = new AbortController();
    reload(abort.signal);
    return () => abort.abort();
  }, [index]);
  const receive = useCallback((/** @type {import("./changes.js").Change | null} */ change) => {
    if (change === null || (change.kind === "marks" && concerns(change))) later();
  }, []);
  useChanges(receive);
}

let timer = 0;
/** Read the marks again, soon. */
export function later() {
  clearTimeout(timer);
  timer = setTimeout(() => reload(new AbortController().signal), TOGETHER_MS);
}

/** @param {AbortSignal} abort */
async function reload(abort) {
  const index = indexName.peek();
  try {
    const all = new Map();
    for (let offset = 0; offset < MOST; offset += PAGE) {
      const query = { ...chosenIndex(), offset, k: PAGE };
      /** @type {import("./wire.js").MarksAnswer} */
      const page = await api.get("marks", { query, signal: abort });
      for (const mark of page.results) all.set(mark.row, mark);
      if (index !== indexName.peek()) return;
      marksState.value = { index, total: page.rows_total, counts: page.counts, problem: null };
      if (offset + PAGE >= page.rows_total) break;
    }
    marks.value = all;
  } catch (problem) {
    if (abort.aborted) return;
    marksState.value = { ...marksState.peek(), index, problem: /** @type {Error} */ (problem) };
  }
}

/**
 * Mark rows, as far as nobody else has changed them since they were shown here.
 * @param {number[]} rows @param {Kind} kind
 * @param {{label?: number | null, note?: string | undefined}} [more] note: none: that of the first row's mark stays
 */
export function mark(rows, kind, { label = null, note } = {}) {
  return inTurn(() => {
    const kept = note ?? marks.peek().get(rows[0] ?? -1)?.note ?? null;
    const body = { ...chosenIndex(), rows, mark: kind, expected: expected(rows), ...given({ label, note: kept }) };
    return changing(rows, kind, () => api.put("marks", body));
  });
}

/** Take marks away. @param {number[]} rows */
export function unmark(rows) {
  const body = { ...chosenIndex(), rows };
  return inTurn(() => changing(rows, null, () => api.delete("marks", { body: { ...body, expected: expected(rows) } })));
}

/** Undo the latest change of this page. @returns {Promise<number | undefined>} its first row, if it is undone */
export const undo = () => inTurn(undone);

async function undone() {
  const last = done.peek().at(-1);
  if (!last || last.index !== indexName.peek()) return void toast("There is nothing to undo.");
  done.value = done.peek().slice(0, -1);
  try {
    take(await api.act("marks/undo", { ...chosenIndex(), change: last.change }));
    toast(
      last.rows.length === 1 ? `Undone: row ${count(last.rows[0] ?? 0)}` : `Undone: ${plural(last.rows.length, "row")}`,
    );
    return last.rows[0];
  } catch (problem) {
    refused(/** @type {Error} */ (problem));
  }
}

/** @type {Promise<any>} */
let before = Promise.resolve();

/** One change after another: each expects what the one before it left. @template T @param {() => Promise<T>} act @returns {Promise<T>} */
function inTurn(act) {
  const now = before.then(act);
  before = now.catch(() => {});
  return now;
}

export const canUndo = () => done.value.some(({ index }) => index === indexName.value);

/** @param {number[]} rows @param {Kind | null} kind null: no mark @param {() => Promise<any>} act */
async function changing(rows, kind, act) {
  const index = indexName.peek();
  try {
    const answer = await act();
    if (index !== indexName.peek()) return true;
    take(answer);
    forget(rows);
    if (answer.change !== null) done.value = [...done.peek(), { change: answer.change, rows, index }].slice(-200);
    return true;
  } catch (problem) {
    refused(/** @type {Error} */ (problem), kind);
    return false;
  }
}

/** @param {{results: Mark[], unmarked: number[]}} answer */
function take({ results, unmarked }) {
  const next = new Map(marks.peek());
  for (const row of unmarked) next.delete(row);
  for (const mark of results) next.set(mark.row, mark);
  const counts = /** @type {Record<string, number>} */ ({});
  for (const { mark } of next.values()) counts[mark] = (counts[mark] ?? 0) + 1;
  marks.value = next;
  const whole = next.size < MOST; // else only the service knows
  if (whole) marksState.value = { ...marksState.peek(), total: next.size, counts };
}

/** @param {Error} problem @param {Kind | null} [kind] that was to be set; none: an undo */
function refused(problem, kind) {
  /** @type {Conflict[]} */
  const theirs = problem instanceof Problem && problem.status === 409 ? (problem.document.conflicts ?? []) : [];
  if (!theirs.length) return toast(`Not kept: ${problem.message}`);
  take({
    results: theirs.flatMap(({ mark }) => (mark ? [mark] : [])),
    unmarked: theirs.filter(({ mark }) => !mark).map(({ row }) => row),
  });
  if (kind === undefined) return toast("Not undone: somebody has changed it since.");
  const next = new Map(conflicts.peek());
  for (const { row, mark } of theirs) next.set(row, { theirs: mark, mine: kind });
  conflicts.value = next;
}

/** The conflict has been seen. @param {number[]} rows */
export function forget(rows) {
  if (!rows.some((row) => conflicts.peek().has(row))) return;
  conflicts.value = new Map([...conflicts.peek()].filter(([row]) => !rows.includes(row)));
}

/** @param {number[]} rows */
function expected(rows) {
  return Object.fromEntries(rows.map((row) => [String(row), marks.peek().get(row)?.version ?? 0]));
}

/** @param {Record<string, unknown>} fields */
function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null && value !== ""));
}
