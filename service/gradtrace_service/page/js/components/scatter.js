// Points in a plane: uPlot draws the axes, and this the points, of which the nearest one says what it is.
import { measured } from "../format.js";
import { html, useEffect, useMemo, useRef, useState } from "../lib.js";
import { axis, Chart } from "./chart.js";

/**
 * @typedef {import("../../vendor/uplot.js").default} Plot
 * @typedef {{x: number, y: number, row: number, style?: string}} Point
 * @typedef {Record<string, {token: string, size: number, ring?: boolean}>} Styles  token: of its colour; size: in pixels
 */

/** @type {Styles} */
const PLAIN = { plain: { token: "--accent", size: 5 } };
const NEAR = 14; // pixels around the pointer

/**
 * @param {{points: Point[], x: string, y: string, styles?: Styles, height?: number | null, diagonal?: boolean, zero?: boolean,
 *   say?: (point: Point) => string, pick?: (point: Point) => void, label?: string}} props
 *   styles: by the points' style, the later ones are drawn above.  diagonal, zero: lines of equality and of zero.  height: null: of its place, which must not depend on it.
 *   pick: what a click on a point does
 */
export function Scatter({
  points,
  x,
  y,
  styles = PLAIN,
  height = 300,
  diagonal = false,
  zero = false,
  say,
  pick,
  label,
}) {
  const shown = useMemo(() => points.filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y)), [points]);
  const data = useMemo(() => {
    const xs = range(shown.map((point) => point.x));
    const ys = range(shown.map((point) => point.y));
    return [xs, ys];
  }, [shown]);
  const plot = useRef(/** @type {Plot | null} */ (null));
  const [near, setNear] = useState(/** @type {{point: Point, left: number, top: number} | null} */ (null));
  useEffect(() => setNear(null), [points]);
  /** @param {any} event */
  const look = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    setNear(nearest(plot.current, shown, event.clientX - box.left, event.clientY - box.top));
  };
  const words = label ?? `${shown.length} points: ${x} against ${y}`;
  const text =
    near && (say ? say(near.point) : `row ${near.point.row}: ${measured(near.point.x)}, ${measured(near.point.y)}`);
  return html`<div class=${`scatter${near && pick ? " picks" : ""}`} onMouseMove=${look} onMouseLeave=${() => setNear(null)}
      onClick=${() => near && pick?.(near.point)}>
    <${Chart} data=${data} height=${height} label=${words} options=${(/** @type {(token: string) => string} */ paint) =>
      options(paint, { points: shown, styles, x, y, diagonal, zero, keep: (made) => (plot.current = made) })} />
    ${near && html`<div class=${`scatter-words${near.left > 220 ? " left" : ""}`} style=${{ left: `${near.left}px`, top: `${near.top}px` }} aria-hidden="true">${text}</div>`}
  </div>`;
}

/** The ends of an axis, with some room. @param {number[]} values */
function range(values) {
  let low = Number.POSITIVE_INFINITY;
  let high = Number.NEGATIVE_INFINITY;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.04;
  return [low - room, high + room];
}

/**
 * @param {(token: string) => string} paint
 * @param {{points: Point[], styles: Styles, x: string, y: string, diagonal: boolean, zero: boolean, keep: (plot: Plot) => void}} what
 * @returns {any}
 */
function options(paint, { points, styles, x, y, diagonal, zero, keep }) {
  const colours = Object.fromEntries(Object.entries(styles).map(([name, { token }]) => [name, paint(token)]));
  const line = paint("--line-strong");
  const values = (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(measured);
  const title = { labelSize: 20, labelFont: "12px system-ui, sans-serif", labelGap: 2 };
  /** @param {Plot} plot */
  const draw = (plot) => {
    keep(plot);
    if (zero) lineOf(plot, line, "zero");
    if (diagonal) lineOf(plot, line, "diagonal");
    for (const [name, style] of Object.entries(styles)) dots(plot, points, name, style, colours[name] ?? line);
  };
  return {
    cursor: { show: false },
    scales: {
      x: {
        time: false,
        range: (/** @type {any} */ _, /** @type {number} */ low, /** @type {number} */ high) => [low, high],
      },
      y: { range: (/** @type {any} */ _, /** @type {number} */ low, /** @type {number} */ high) => [low, high] },
    },
    axes: [axis(paint, { values, label: x, ...title }), axis(paint, { values, label: y, size: 54, ...title })],
    series: [{}, { show: true, width: 0, stroke: "transparent", points: { show: false } }],
    hooks: { draw: [draw] },
  };
}

/** What draws within the axes, until it is restored. @param {Plot} plot */
function clipped({ ctx, bbox }) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  return ctx;
}

/** @param {Plot} plot @param {Point[]} points @param {string} name @param {Styles[string]} style @param {string} colour */
function dots(plot, points, name, { size, ring }, colour) {
  const ctx = clipped(plot);
  const radius = (size / 2) * devicePixelRatio;
  ctx.fillStyle = ctx.strokeStyle = colour;
  ctx.lineWidth = 1.5 * devicePixelRatio;
  ctx.globalAlpha = ring || points.length < 500 ? 0.9 : 0.6;
  for (const point of points) {
    if ((point.style ?? "plain") !== name) continue;
    ctx.beginPath();
    ctx.arc(plot.valToPos(point.x, "x", true), plot.valToPos(point.y, "y", true), radius, 0, 2 * Math.PI);
    if (ring) ctx.stroke();
    else ctx.fill();
  }
  ctx.restore();
}

/** @param {Plot} plot @param {string} colour @param {"zero" | "diagonal"} kind */
function lineOf(plot, colour, kind) {
  const { bbox } = plot;
  const ctx = clipped(plot);
  ctx.strokeStyle = colour;
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  ctx.beginPath();
  const [low = 0, high = 0] = [plot.scales.x?.min ?? 0, plot.scales.x?.max ?? 0];
  if (kind === "diagonal") {
    ctx.moveTo(plot.valToPos(low, "x", true), plot.valToPos(low, "y", true));
    ctx.lineTo(plot.valToPos(high, "x", true), plot.valToPos(high, "y", true));
  } else {
    const [left, top] = [plot.valToPos(0, "x", true), plot.valToPos(0, "y", true)];
    ctx.moveTo(left, bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.moveTo(bbox.left, top);
    ctx.lineTo(bbox.left + bbox.width, top);
  }
  ctx.stroke();
  ctx.restore();
}

/** @param {Plot | null} plot @param {Point[]} points @param {number} left @param {number} top in the chart's pixels */
function nearest(plot, points, left, top) {
  if (!plot) return null;
  const [atX, atY] = [plot.bbox.left / devicePixelRatio, plot.bbox.top / devicePixelRatio];
  let best = null;
  let least = NEAR ** 2;
  for (const point of points) {
    const [x, y] = [plot.valToPos(point.x, "x") + atX, plot.valToPos(point.y, "y") + atY];
    const distance = (x - left) ** 2 + (y - top) ** 2;
    if (distance < least) [least, best] = [distance, { point, left: x, top: y }];
  }
  return best;
}
