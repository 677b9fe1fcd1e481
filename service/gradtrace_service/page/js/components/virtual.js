// A list or grid of any length, of which only what is visible is fetched and drawn. It scrolls with the page.
import { html, useEffect, useLayoutEffect, useRef, useState } from "../lib.js";

export const PAGE = 60; // items fetched at a time
const KEPT_PAGES = 60;
const AHEAD = 600; // pixels drawn beyond the window
const LOOK_MS = 50; // what is further away after that time was only scrolled past, and is not fetched
const STEP = 100; // pixels: shorter ways need no other cells

/**
 * @template T
 * @typedef {{total: number, items: T[]}} Fetched
 */

/**
 * @template T
 * @param {{id: string, load: (offset: number, count: number, signal: AbortSignal) => Promise<Fetched<T>>,
 *   render: (item: T | null, at: number, focus: {tabindex: number, "data-at": number}) => any, itemHeight: number,
 *   itemWidth?: number, gap?: number, look?: number, label: string, onTotal?: (total: number) => void, empty?: any,
 *   failed?: (problem: Error, retry: () => void) => any, at?: number, onMove?: (at: number) => void}} props
 *   id: of the list; another one begins at its top.  render: an item, null while it is fetched; its link or button
 *   takes the `focus` properties, by which arrow keys move.  itemWidth: at least, of a grid's cells; none: one a line.  look: a
 *   new number has what is shown fetched again, in its place.  at: the item that is looked at, where something outside
 *   the list moves it too; onMove: when the list moves it
 */
export function VirtualList({
  id,
  load,
  render,
  itemHeight,
  itemWidth,
  gap = 8,
  look = 0,
  label,
  onTotal,
  empty,
  failed,
  at: wanted,
  onMove,
}) {
  const place = useRef(/** @type {HTMLDivElement | null} */ (null));
  const [view, setView] = useState({ top: 0, bottom: 1200, width: 0 });
  const [current, setCurrent] = useState(wanted ?? 0);
  const reached = useRef(0); // where the list moved, or was moved, last
  const toFocus = useRef(/** @type {number | null} */ (null)); // once it is fetched
  const placing = useRef(false); // the list itself gives the focus, to where it has moved already
  const drawn = useRef(/** @type {Map<number, any>} */ (new Map()));
  const { pages, total, problem, want, retry } = usePages(id, look, load, onTotal);
  useLayoutEffect(() => watchedWindow(place, setView), []);
  useEffect(() => setCurrent(wanted ?? 0), [id]);

  const columns = itemWidth ? Math.max(1, Math.floor((view.width + gap) / (itemWidth + gap))) : 1;
  const lineHeight = itemHeight + gap;
  const length = total ?? Math.min(PAGE, columns * 8);
  const lines = Math.ceil(length / columns);
  const first = Math.max(0, Math.floor((view.top - AHEAD) / lineHeight)) * columns;
  const end = Math.min(length, Math.ceil((view.bottom + AHEAD) / lineHeight) * columns);
  useLayoutEffect(() => want(first, end), [id, first, end]); // not after the next frame: it may have come ahead

  /** @param {number} next */
  const moveTo = (next) => {
    reached.current = next;
    setCurrent(next);
    onMove?.(next);
  };
  useEffect(() => {
    if (wanted === undefined || !view.width || wanted === reached.current) return;
    reached.current = wanted;
    setCurrent(wanted);
    if (place.current?.contains(document.activeElement)) toFocus.current = wanted;
    scrollIntoWindow(place, Math.floor(wanted / columns) * lineHeight, itemHeight);
  }, [wanted, id, view.width > 0]);

  /** @param {KeyboardEvent} event */
  const move = (event) => {
    const steps = /** @type {Record<string, number>} */ ({
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: columns,
      ArrowUp: -columns,
      PageDown: columns * 4,
      PageUp: -columns * 4,
      Home: -length,
      End: length,
    });
    const step = steps[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const next = Math.min(Math.max(current + step, 0), length - 1);
    toFocus.current = next;
    moveTo(next);
    scrollIntoWindow(place, Math.floor(next / columns) * lineHeight, itemHeight);
  };
  useLayoutEffect(() => {
    if (toFocus.current === null) return;
    placing.current = true;
    if (givenFocus(place, toFocus.current)) toFocus.current = null;
    placing.current = false;
  });

  if (problem && failed) return failed(problem, retry);
  if (total === 0) return empty ?? null;
  const width = (view.width - gap * (columns - 1)) / columns;
  const cells = new Map();
  for (let at = first; at < end; at++) {
    const item = pages.get(Math.floor(at / PAGE))?.[at % PAGE] ?? null;
    const corner = { top: Math.floor(at / columns) * lineHeight, left: (at % columns) * (width + gap) };
    const props = { render, item, at, length, current: at === current, ...corner, width, height: itemHeight };
    cells.set(at, cellOf(drawn.current.get(at), props));
  }
  drawn.current = cells;
  return html`<div class="virtual" ref=${place} role="list" tabindex="-1" aria-label=${label} aria-busy=${total === null} onKeyDown=${move}
    onFocusIn=${(/** @type {any} */ event) => placing.current || moveTo(Number(event.target.closest("[data-at]")?.dataset.at ?? current))}
    style=${{ height: `${Math.max(lines * lineHeight - gap, 0)}px` }}>${[...cells.values()]}</div>`;
}

/**
 * The cell that was drawn last where nothing of it has changed: it is then not looked at, so that scrolling costs what
 * comes into view, not what is there.
 * @typedef {{render: (item: any, at: number, focus: {tabindex: number, "data-at": number}) => any, item: any, at: number,
 *   length: number, current: boolean, top: number, left: number, width: number, height: number}} CellProps
 * @param {any} last @param {CellProps} props
 */
function cellOf(last, props) {
  const same = last && Object.entries(props).every(([name, value]) => last.props[name] === value);
  return same ? last : html`<${Cell} key=${props.at} ...${props} />`;
}

/** A component, so that it is drawn again when a signal changes that `render` reads. @param {CellProps} props */
function Cell({ render, item, at, length, current, top, left, width, height }) {
  const style = { top: `${top}px`, left: `${left}px`, width: `${width}px`, height: `${height}px` };
  const focus = { tabindex: current ? 0 : -1, "data-at": at };
  return html`<div class="cell" role="listitem" aria-setsize=${length} aria-posinset=${at + 1} style=${style}>${render(item, at, focus)}</div>`;
}

/**
 * The pages that were fetched, and a function that fetches those of a range.
 * @template T
 * @param {string} id @param {number} look
 * @param {(offset: number, count: number, signal: AbortSignal) => Promise<Fetched<T>>} load
 * @param {((total: number) => void) | undefined} onTotal
 */
function usePages(id, look, load, onTotal) {
  const fresh = () => ({
    id,
    pages: /** @type {Map<number, T[]>} */ (new Map()),
    asked: new Set(),
    total: /** @type {number | null} */ (null),
    problem: /** @type {Error | null} */ (null),
    abort: new AbortController(),
    range: [0, PAGE],
    timer: 0,
  });
  const kept = useRef(fresh());
  const [, redraw] = useState(0);
  if (kept.current.id !== id) {
    kept.current.abort.abort();
    clearTimeout(kept.current.timer);
    kept.current = fresh();
  }
  useEffect(
    () => () => {
      kept.current.abort.abort();
      clearTimeout(kept.current.timer);
    },
    [],
  );
  useEffect(() => {
    if (!look) return;
    list.asked.clear();
    if (list.total) fetchRange();
    else fetchPage(0);
  }, [look]);
  const list = kept.current;

  /** @param {number} page */
  const fetchPage = async (page) => {
    list.asked.add(page);
    try {
      const { total, items } = await load(page * PAGE, PAGE, list.abort.signal);
      if (list.abort.signal.aborted) return;
      list.pages.set(page, items);
      if (list.total !== total) onTotal?.(total);
      list.total = total;
      const [oldest] = list.pages.keys();
      if (list.pages.size > KEPT_PAGES && oldest !== undefined) {
        list.pages.delete(oldest);
        list.asked.delete(oldest);
      }
    } catch (problem) {
      if (list.abort.signal.aborted) return;
      list.problem = /** @type {Error} */ (problem);
    }
    redraw((turn) => turn + 1);
  };
  const fetchRange = () => {
    const [first = 0, end = 0] = list.range;
    for (let page = Math.floor(first / PAGE); page * PAGE < end; page++) {
      if (!list.asked.has(page)) fetchPage(page);
    }
  };
  /** @param {number[]} before the range at the last look */
  const fetchSeen = ([first = 0, end = 0]) => {
    const [nowFirst = 0, nowEnd = 0] = list.range;
    const stays = nowFirst < end && first < nowEnd;
    list.timer = stays ? 0 : setTimeout(fetchSeen, LOOK_MS, list.range);
    if (stays) fetchRange();
  };
  /** @param {number} first @param {number} end */
  const want = (first, end) => {
    const before = list.range;
    list.range = [first, end];
    if (list.asked.size) list.timer ||= setTimeout(fetchSeen, LOOK_MS, before);
    else fetchPage(0); // the first page tells how many there are
  };
  const retry = () => {
    list.problem = null;
    list.asked = new Set(list.pages.keys());
    fetchRange();
    redraw((turn) => turn + 1);
  };
  return { pages: list.pages, total: list.total, problem: list.problem, want, retry };
}

/** @typedef {{top: number, bottom: number, width: number}} View */

/** @param {{current: HTMLDivElement | null}} place @param {(next: (last: View) => View) => void} setView */
function watchedWindow(place, setView) {
  let frame = 0;
  const look = () => {
    frame = 0;
    const box = place.current?.getBoundingClientRect();
    if (!box) return;
    const top = Math.floor(-box.top / STEP) * STEP;
    const next = { top, bottom: top + Math.ceil(innerHeight / STEP + 1) * STEP, width: box.width };
    setView((last) =>
      next.top === last.top && next.bottom === last.bottom && next.width === last.width ? last : next,
    );
  };
  const later = () => {
    frame ||= requestAnimationFrame(look);
  };
  look();
  const resize = new ResizeObserver(later);
  if (place.current?.parentElement) resize.observe(place.current.parentElement);
  addEventListener("scroll", later, { passive: true });
  addEventListener("resize", later);
  return () => {
    cancelAnimationFrame(frame);
    resize.disconnect();
    removeEventListener("scroll", later);
    removeEventListener("resize", later);
  };
}

/** @param {{current: HTMLDivElement | null}} place @param {number} top of the item @param {number} height */
function scrollIntoWindow(place, top, height) {
  const box = place.current?.getBoundingClientRect();
  if (!box) return;
  const above = box.top + top - 140; // the header and the filters lie there
  const below = box.top + top + height + 16 - innerHeight;
  if (above < 0) scrollBy(0, above);
  else if (below > 0) scrollBy(0, below);
}

/**
 * Whether the item has the focus now, or somebody has moved it elsewhere. Until the item is there, the list has it, so
 * that keys are still heard.
 * @param {{current: HTMLDivElement | null}} place @param {number} at
 */
function givenFocus(place, at) {
  const focused = document.activeElement;
  if (focused !== document.body && !place.current?.contains(focused)) return true;
  /** @type {HTMLElement | null | undefined} */
  const item = place.current?.querySelector(`[data-at="${at}"]`);
  (item ?? place.current)?.focus({ preventScroll: true });
  return Boolean(item);
}
