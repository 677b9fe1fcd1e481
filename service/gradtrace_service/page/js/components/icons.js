// Line icons, 24 x 24. They are decoration: what they stand beside, or their button's label, says the words.
import { html } from "../lib.js";

const PATHS = {
  sun: "M12 4V2m0 20v-2m8-8h2M2 12h2m13.7-5.7 1.4-1.4M4.9 19.1l1.4-1.4m11.4 0 1.4 1.4M4.9 4.9l1.4 1.4M16 12a4 4 0 1 1-8 0 4 4 0 0 1 8 0Z",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5Z",
  search: "m20 20-4.5-4.5M17 10.5a6.5 6.5 0 1 1-13 0 6.5 6.5 0 0 1 13 0Z",
  left: "m14.5 6-6 6 6 6",
  right: "m9.5 6 6 6-6 6",
  close: "m6 6 12 12M18 6 6 18",
  alert: "M12 8v5m0 3.5v.01M10.3 4 2.8 17a2 2 0 0 0 1.7 3h15a2 2 0 0 0 1.7-3L13.7 4a2 2 0 0 0-3.4 0Z",
  key: "M14 10a4 4 0 1 1-1.2 2.8L6 19.5H3.5V17l6.8-6.8",
  upload: "M12 16V5m0 0L7.5 9.5M12 5l4.5 4.5M5 19h14",
  pencil: "m4 20 1-4L16 5l3 3L8 19l-4 1Z",
  layers: "m12 4 8 4.5-8 4.5-8-4.5L12 4Zm-8 9 8 4.5 8-4.5",
  empty: "M4 7h16M4 12h16M4 17h9",
  share: "M10 14a4 4 0 0 0 5.7 0l3-3A4 4 0 0 0 13 5.3l-1 1M14 10a4 4 0 0 0-5.7 0l-3 3a4 4 0 0 0 5.7 5.7l1-1",
  download: "M12 5v11m0 0 4.5-4.5M12 16l-4.5-4.5M5 20h14",
  bookmark: "M7 4h10v16l-5-4-5 4V4Z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5m3-5v5",
  swap: "M4 9h14m0 0-4-4m4 4-4 4M20 16H6m0 0 4 4m-4-4 4-4",
  reset: "M4 12a8 8 0 1 0 2.5-5.8L4 8.5M4 4v4.5h4.5",
};

/** @param {{name: keyof typeof PATHS, class?: string}} props */
export function Icon({ name, class: className = "" }) {
  return html`<svg class=${className} viewBox="0 0 24 24" width="18" height="18" fill="none" stroke="currentColor"
    stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;
}
