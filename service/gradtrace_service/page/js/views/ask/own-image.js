// A picture: from a file, dropped, pasted, or drawn; brought to the size that the task takes.
import { Example } from "../../components/example.js";
import { Icon } from "../../components/icons.js";
import { Notice } from "../../components/states.js";
import { html, useEffect, useRef, useState } from "../../lib.js";
import { Drawing } from "./drawing.js";

const LARGEST_DRAWN = 64; // pixels: larger pictures are photographs

/** @param {import("./own.js").InputProps} props */
export function OwnImage({ example, give, details }) {
  const size = details.input?.kind === "image" ? details.input : { height: 32, width: 32, channels: 3 };
  const [fault, setFault] = useState("");
  /** @param {Blob | null | undefined} file */
  const take = async (file) => {
    if (!file) return;
    try {
      const picture = await createImageBitmap(file);
      give({ image: sized(picture, size) });
      setFault("");
    } catch {
      setFault("This file is not a picture that the browser can read. Give a PNG, JPEG or WebP.");
    }
  };
  /** @param {CanvasImageSource} drawing */
  const draw = (drawing) => give({ image: sized(drawing, size) });
  return html`<div class="own-image">
    <${DropPlace} take=${take} />
    ${Math.max(size.height, size.width) <= LARGEST_DRAWN && html`<${Drawing} draw=${draw} clear=${() => give(null)} details=${details} />`}
    <section class="stack" aria-label="What the model is given"><h2>What the model is given</h2>
      ${example ? html`<div class="preview"><${Example} example=${example} alt="the picture at the model's size" /></div>` : html`<p class="soft small">Nothing yet.</p>`}
      <p class="soft small">${size.width} × ${size.height} pixels, ${size.channels === 1 ? "grey" : "colour"}.</p>
    </section>
  </div>
  ${fault && html`<${Notice} kind="danger">${fault}<//>`}`;
}

/** @param {{take: (file: Blob | null | undefined) => void}} props */
function DropPlace({ take }) {
  const [over, setOver] = useState(false);
  const input = useRef(/** @type {HTMLInputElement | null} */ (null));
  useEffect(() => {
    /** @param {ClipboardEvent} event */
    const paste = (event) =>
      take([...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/")));
    addEventListener("paste", paste);
    return () => removeEventListener("paste", paste);
  }, []);
  /** @param {DragEvent} event */
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    take(event.dataTransfer?.files[0]);
  };
  /** @param {DragEvent} event */
  const enter = (event) => {
    event.preventDefault();
    setOver(true);
  };
  return html`<div class=${`drop${over ? " over" : ""}`} onDragOver=${enter} onDragLeave=${() => setOver(false)} onDrop=${drop}>
    <${Icon} name="upload" />
    <p>Drop a picture here, paste one, or</p>
    <button type="button" class="button" onClick=${() => input.current?.click()}>Choose a file</button>
    <input ref=${input} class="hidden" type="file" accept="image/*" tabindex="-1" aria-label="Picture file"
      onChange=${(/** @type {any} */ event) => take(event.target.files[0])} />
  </div>`;
}

/**
 * A PNG of the task's size, as a data URL: the middle of the picture.
 * @param {CanvasImageSource & {width?: any, height?: any}} picture @param {{height: number, width: number}} size
 */
function sized(picture, { height, width }) {
  let source = squeezed(picture, picture.width, picture.height, width / height);
  // By halves: browsers average over few pixels, and a large step would skip most.
  while (source.width >= 2 * width && source.height >= 2 * height)
    source = scaled(source, source.width >> 1, source.height >> 1);
  return scaled(source, width, height).toDataURL("image/png");
}

/** The largest part of that shape. @param {CanvasImageSource} picture @param {number} width @param {number} height @param {number} shape */
function squeezed(picture, width, height, shape) {
  const across = Math.round(Math.min(width, height * shape));
  const down = Math.round(Math.min(height, width / shape));
  const canvas = Object.assign(document.createElement("canvas"), { width: across, height: down });
  canvas
    .getContext("2d")
    ?.drawImage(picture, (width - across) / 2, (height - down) / 2, across, down, 0, 0, across, down);
  return canvas;
}

/** @param {HTMLCanvasElement} source @param {number} width @param {number} height */
function scaled(source, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  if (context) {
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, width, height);
  }
  return canvas;
}
