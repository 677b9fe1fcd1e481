// A canvas to draw on, by a pointer or by keys: arrows move the pen, Space puts a dot, with Shift it draws along.
import { example as fetchExample } from "../../examples.js";
import { html, useEffect, useRef, useState } from "../../lib.js";

const SIZE = 256;
const PEN = 22;
const STEP = 8;

/** @param {{draw: (drawing: HTMLCanvasElement) => void, clear: () => void, details: import("../../wire.js").IndexDetails}} props */
export function Drawing({ draw, clear, details }) {
  const canvas = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  const last = useRef(/** @type {[number, number]} */ ([SIZE / 2, SIZE / 2]));
  const [dark, setDark] = useState(true);
  const [pen, setPen] = useState(/** @type {[number, number] | null} */ (null));
  const ink = dark ? "#fff" : "#000";
  const wipe = () => fill(canvas.current, dark ? "#000" : "#fff");
  useEffect(wipe, [dark]);
  useEffect(() => {
    const abort = new AbortController();
    isDark(details, abort.signal).then(setDark, () => {});
    return () => abort.abort();
  }, []);
  /** @param {[number, number]} to @param {boolean} along */
  const stroke = (to, along) => {
    line(canvas.current, along ? last.current : to, to, ink);
    last.current = to;
    if (canvas.current) draw(canvas.current);
  };
  /** @param {PointerEvent} event */
  const point = (event) => {
    if (!(event.buttons & 1)) return;
    const box = /** @type {HTMLElement} */ (event.currentTarget).getBoundingClientRect();
    stroke(
      [((event.clientX - box.left) / box.width) * SIZE, ((event.clientY - box.top) / box.height) * SIZE],
      event.type === "pointermove",
    );
  };
  /** @param {KeyboardEvent} event */
  const type = (event) => {
    const [x, y] = last.current;
    const steps = /** @type {Record<string, [number, number]>} */ ({
      ArrowLeft: [-STEP, 0],
      ArrowRight: [STEP, 0],
      ArrowUp: [0, -STEP],
      ArrowDown: [0, STEP],
    });
    const step = steps[event.key];
    if (!step && event.key !== " ") return;
    event.preventDefault();
    const to = /** @type {[number, number]} */ ([clamp(x + (step?.[0] ?? 0)), clamp(y + (step?.[1] ?? 0))]);
    if (event.key === " " || event.shiftKey) stroke(to, event.key !== " ");
    last.current = to;
    setPen(to);
  };
  const restart = () => {
    wipe();
    clear();
  };
  const swap = () => {
    setDark(!dark);
    clear();
  };
  return html`<section class="stack" aria-label="Drawing"><h2>Or draw it</h2>
    <div class="drawing-place">
      <canvas class="drawing" ref=${canvas} width=${SIZE} height=${SIZE} tabindex="0" role="application"
        aria-label="Drawing: arrow keys move the pen, Space puts a dot, Shift and arrows draw"
        onPointerDown=${point} onPointerMove=${point} onKeyDown=${type} onBlur=${() => setPen(null)}></canvas>
      ${pen && html`<i class="pen" style=${{ left: `${(pen[0] / SIZE) * 100}%`, top: `${(pen[1] / SIZE) * 100}%` }}></i>`}
    </div>
    <div class="row"><button type="button" class="button" onClick=${restart}>Clear</button>
      <button type="button" class="button" onClick=${swap}>${dark ? "Black on white" : "White on black"}</button></div>
  </section>`;
}

/** @param {number} at */
const clamp = (at) => Math.min(Math.max(at, 0), SIZE);

/** @param {HTMLCanvasElement | null} canvas @param {string} paper */
function fill(canvas, paper) {
  const context = canvas?.getContext("2d");
  if (!context) return;
  context.fillStyle = paper;
  context.fillRect(0, 0, SIZE, SIZE);
}

/** @param {HTMLCanvasElement | null} canvas @param {[number, number]} from @param {[number, number]} to @param {string} ink */
function line(canvas, from, to, ink) {
  const context = canvas?.getContext("2d");
  if (!context) return;
  Object.assign(context, { strokeStyle: ink, lineWidth: PEN, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  context.stroke();
}

/** Whether the training pictures are light on dark: by the border of the first. @param {import("../../wire.js").IndexDetails} details @param {AbortSignal} signal */
async function isDark(details, signal) {
  const { example } = await fetchExample(details.query_rows ? "query" : "train", 0, signal);
  const image = new Image();
  image.src = String(example?.image ?? "");
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), {
    width: image.naturalWidth,
    height: image.naturalHeight,
  });
  const context = canvas.getContext("2d");
  context?.drawImage(image, 0, 0);
  const pixels = context?.getImageData(0, 0, canvas.width, 1).data ?? [];
  const mean = [...pixels].reduce((sum, value, at) => sum + (at % 4 === 3 ? 0 : value), 0) / (pixels.length * 0.75);
  return mean < 128;
}
