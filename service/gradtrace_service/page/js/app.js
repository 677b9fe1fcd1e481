import { Shell } from "./components/shell.js";
import { html, render } from "./lib.js";

const root = document.getElementById("page");
if (root) render(html`<${Shell} />`, root);
