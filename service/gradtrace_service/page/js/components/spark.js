// Small bars around zero, such as a score by checkpoint.
import { signed } from "../format.js";
import { html } from "../lib.js";

/**
 * @param {{values: [string, number][], largest?: number, width?: number, height?: number, title: string}} props
 *   values: name and value of each bar.  largest: of the scale. Default: the largest absolute value
 */
export function Spark({ values, largest, width = 96, height = 28, title }) {
  const scale = largest ?? Math.max(...values.map(([, value]) => Math.abs(value)), 0);
  const low = values.some(([, value]) => value < 0);
  const high = values.some(([, value]) => value > 0);
  const zero = low && high ? height / 2 : low ? 0 : height;
  const room = low && high ? height / 2 : height;
  const step = width / Math.max(values.length, 1);
  const gap = step > 4 ? 1 : 0;
  const words = values.map(([name, value]) => `${name}: ${signed(value)}`).join(", ");
  return html`<svg class="spark" width=${width} height=${height} role="img" aria-label=${`${title}: ${words}`}>
    ${values.map(([name, value], at) => {
      const size = scale > 0 ? Math.max((Math.abs(value) / scale) * room, value ? 0.75 : 0) : 0;
      return html`<g><rect class="spark-hover" x=${at * step} y="0" width=${step} height=${height} fill="transparent"><title>${name}: ${signed(value)}</title></rect>
        <rect class=${value < 0 ? "negative" : "positive"} x=${at * step} y=${value < 0 ? zero : zero - size} width=${Math.max(step - gap, 0.5)} height=${size} pointer-events="none" /></g>`;
    })}
    <line class="zero" x1="0" x2=${width} y1=${zero} y2=${zero} />
  </svg>`;
}
