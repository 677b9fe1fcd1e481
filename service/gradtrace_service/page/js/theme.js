// Light or dark: as the browser says, unless somebody chose.
import { signal } from "./lib.js";

const PLACE = "gradtrace-theme";
const darkness = matchMedia("(prefers-color-scheme: dark)");

/** @returns {"light" | "dark"} */
function shown() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen === "light" || chosen === "dark") return chosen;
  return darkness.matches ? "dark" : "light";
}

/** What is shown now. Charts on a canvas are drawn again when it changes. */
export const theme = signal(shown());
darkness.addEventListener("change", () => {
  theme.value = shown();
});

export function switchTheme() {
  const next = theme.peek() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem(PLACE, next);
  } catch {
    // storage is forbidden: until the page is loaded again
  }
  theme.value = next;
}

/** A colour of the tokens as a canvas takes it. @param {string} token such as --accent */
export function colour(token) {
  const probe = document.createElement("i");
  probe.style.color = `var(${token})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
