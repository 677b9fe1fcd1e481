// uPlot as a component: fits its place, and is drawn anew in the other scheme.
import uPlot from "../../vendor/uplot.js";
import { html, useEffect, useRef } from "../lib.js";
import { colour, theme } from "../theme.js";

/**
 * @typedef {import("../../vendor/uplot.js").default.Options} PlotOptions
 * @param {{options: (colour: (token: string) => string) => Omit<PlotOptions, "width" | "height">, data: any, height?: number | null, label: string}} props
 *   options: gets a function from tokens to colours.  data: as uPlot takes it; a new array is drawn.  height: in pixels; null: of its place.  label: what the
 *   chart shows, in words, for whoever cannot see it
 */
export function Chart({ options, data, height = 140, label }) {
  const place = useRef(/** @type {HTMLDivElement | null} */ (null));
  useEffect(() => {
    const element = place.current;
    if (!element) return;
    const size = () => ({ width: Math.max(element.clientWidth, 80), height: height ?? element.clientHeight });
    const plot = new uPlot({ legend: { show: false }, ...options(colour), ...size() }, data, element);
    const watch = new ResizeObserver(() => plot.setSize(size()));
    watch.observe(element);
    return () => {
      watch.disconnect();
      plot.destroy();
    };
  }, [data, theme.value, height]);
  return html`<div class="chart" role="img" aria-label=${label} style=${{ height: height === null ? "100%" : `${height}px` }} ref=${place}></div>`;
}

/** Options of an axis in the page's colours and type. @param {(token: string) => string} paint @param {object} [more] */
export function axis(paint, more = {}) {
  const grid = { stroke: paint("--line"), width: 1 };
  return {
    stroke: paint("--ink-soft"),
    font: "12px system-ui, sans-serif",
    grid,
    ticks: { ...grid, size: 4 },
    gap: 4,
    ...more,
  };
}
