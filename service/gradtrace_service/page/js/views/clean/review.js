// Rows one after another: a list, the row that is looked at, and what it is marked as.
import { address, change, numberIn } from "../../address.js";
import { Pager } from "../../components/pager.js";
import { Empty, Failed, Notice, Skeleton } from "../../components/states.js";
import { plural } from "../../format.js";
import { html, useEffect, useMemo, useRef, useState } from "../../lib.js";
import { conflicts, KINDS, mark, marks, marksState, undo } from "../../marks.js";
import { who } from "../../service.js";
import { Current } from "./current.js";
import { Filters, Order } from "./filters.js";
import { CandidateList } from "./list.js";
import { Progress } from "./progress.js";
import { LISTED, useRanking } from "./ranking.js";

/** @typedef {import("./ranking.js").Candidate} Candidate */

/** @param {import("../../views.js").ViewProps} props */
export function Review({ params, details }) {
  const ranking = useRanking(params, details);
  const { list, hidden, refresh } = useListed(ranking.data?.candidates ?? null, params);
  const [said, say] = useState("");
  const at = Math.max(list?.findIndex(({ row }) => row === numberIn(params, "row", -1)) ?? 0, 0);
  const acts = useActs(list, say);
  useKeys(params.get("keys") !== "off", acts);
  return html`<div class="stack">
    <${Order} params=${params} details=${details} />
    <${Filters} params=${params} details=${details} />
    ${ranking.data?.note && html`<p class="small soft">${ranking.data.note}</p>`}
    <p class="hidden" role="status">${said}</p>
    ${
      ranking.problem
        ? html`<div class="panel"><${Failed} problem=${ranking.problem} retry=${ranking.reload} /></div>`
        : !ranking.data || !list
          ? html`<${Skeleton} lines=${5} height="5rem" label="Ordering the rows" />`
          : html`${list.length > 0 && html`<${Progress} list=${list} listed=${ranking.data.candidates.length} />`}
            <${Pages} ranking=${ranking.data} />
            ${hidden > 0 && html`<${Notice}>${plural(hidden, "row")} of this list ${hidden === 1 ? "has" : "have"} another mark by now. <button type="button" class="button" onClick=${refresh}>List again</button><//>`}
            ${
              list.length
                ? html`<div class="clean-review">
                <section class="stack" aria-label="Rows to look at"><${CandidateList} list=${list} at=${at} details=${details} /><${Further} ranking=${ranking.data} /></section>
                <${Current} candidate=${list[at]} total=${ranking.data.total} params=${params} details=${details} acts=${acts} />
              </div>`
                : html`<${Empty} title=${emptyTitle(ranking.data, params)} icon="search"><button type="button" class="button"
                onClick=${() => change({ show: null, class: null, wrong: null, slice: null, row: null, offset: null })}>Show all rows</button><//>`
            }`
    }
  </div>`;
}

/** @param {import("./ranking.js").Ranking} ranking */
const isPart = ({ offset, candidates, total }) => offset > 0 || offset + candidates.length < total;

/** @param {import("./ranking.js").Ranking} ranking @param {URLSearchParams} params */
function emptyTitle(ranking, params) {
  const kind = KINDS.find((known) => known.kind === params.get("show"));
  return `${isPart(ranking) ? "None of these rows" : "No row"} is ${kind ? `marked ${kind.title.toLowerCase()}` : "like this"}`;
}

/** @param {number} offset */
const show = (offset) => change({ offset: offset || null, row: null });

/** Which rows of the whole order are listed. @param {{ranking: import("./ranking.js").Ranking}} props */
function Pages({ ranking }) {
  if (!isPart(ranking)) return null;
  return html`<${Pager} offset=${ranking.offset} size=${LISTED} total=${ranking.total} show=${show} />`;
}

/** At the end of the list: the way on. @param {{ranking: import("./ranking.js").Ranking}} props */
function Further({ ranking: { offset, candidates, total } }) {
  const next = offset + candidates.length;
  if (next >= total) return null;
  const further = () => {
    show(next);
    scrollTo(0, 0);
  };
  return html`<div><button type="button" class="button" onClick=${further}>The next ${plural(Math.min(LISTED, total - next), "row")}</button></div>`;
}

/**
 * The candidates that the filters leave. A row that is marked stays where it is until the list is asked for again.
 * @param {Candidate[] | null} candidates @param {URLSearchParams} params
 */
function useListed(candidates, params) {
  const show = params.get("show") ?? "all";
  const wrong = params.has("wrong");
  const known = marksState.value.index !== undefined;
  const [turn, setTurn] = useState(0);
  /** @param {Candidate} candidate */
  const fits = ({ row }) => {
    const kind = marks.peek().get(row)?.mark;
    return show === "all" || (show === "open" ? !kind : kind === show);
  };
  const list = useMemo(() => {
    if (!candidates || (show !== "all" && !known)) return null;
    return candidates.filter((candidate) => (!wrong || candidate.correct === false) && fits(candidate));
  }, [candidates, show, wrong, known, turn]);
  const hidden = show === "all" || !marks.value ? 0 : (list ?? []).filter((candidate) => !fits(candidate)).length;
  return { list, hidden, refresh: () => setTurn((last) => last + 1) };
}

/**
 * @typedef {{judge: (kind: import("../../marks.js").Kind, more?: {candidate?: Candidate | undefined, label?: number | null,
 *   note?: string | undefined, stay?: boolean}) => void,
 *   back: () => void, move: (by: number) => void}} Acts
 * @param {Candidate[] | null} list @param {(words: string) => void} say @returns {Acts}
 */
function useActs(list, say) {
  const rows = useRef(list);
  rows.current = list;
  return useMemo(() => {
    /** The address is asked each time: of two quick keys, the second is about the next row. */
    const now = () => {
      const all = rows.current ?? [];
      const row = numberIn(address.peek().params, "row", -1);
      const at = Math.max(
        all.findIndex((candidate) => candidate.row === row),
        0,
      );
      return { all, at, candidate: all[at] };
    };
    /** @param {number} by */
    const move = (by) => {
      const { all, at } = now();
      const next = all[Math.min(Math.max(at + by, 0), all.length - 1)];
      if (next) change({ row: next.row });
    };
    /** @type {Acts["judge"]} */
    const judge = async (kind, { candidate = now().candidate, label, note, stay = false } = {}) => {
      if (!candidate || who.peek().read_only) return;
      const { row } = candidate;
      if (!stay) move(1); // before the answer: the next key is about the next row
      const kept = await mark([row], kind, { label: label === undefined ? suggestion(candidate, kind) : label, note });
      if (!kept && conflicts.peek().has(row)) change({ row });
      say(kept ? `Row ${row} is marked ${kind}.` : `Row ${row} is not marked.`);
    };
    const back = async () => {
      const row = await undo();
      if (row === undefined) return;
      change({ row });
      say(`Undone: row ${row}.`);
    };
    return { judge, back, move };
  }, []);
}

/**
 * The label that a mark suggests by itself: what somebody has chosen, or the class that the model predicts. A predicted
 * value is never the label, and says nothing about what the label should be.
 * @param {Candidate} candidate @param {import("../../marks.js").Kind} kind
 */
function suggestion({ row, prediction, correct }, kind) {
  if (kind === "right" || kind === "remove") return null;
  return marks.peek().get(row)?.label ?? (kind === "wrong" && correct === false ? prediction : null);
}

/** @param {boolean} on @param {Acts} acts */
function useKeys(on, acts) {
  useEffect(() => {
    if (!on) return;
    /** @param {KeyboardEvent} event */
    const press = (event) => {
      const target = /** @type {HTMLElement} */ (event.target);
      if (event.altKey || event.ctrlKey || event.metaKey || target.closest("input, textarea, select, dialog")) return;
      const key = event.key.toLowerCase();
      const kind = KINDS.find((known) => known.key === key)?.kind;
      if (kind) acts.judge(kind);
      else if (key === "z") acts.back();
      else if (key === "j" || key === "k") acts.move(key === "j" ? 1 : -1);
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, [on, acts]);
}
