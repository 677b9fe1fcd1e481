import { address } from "./address.js";
import { Shell } from "./components/shell.js";
import { readAhead } from "./later.js";
import { html, render } from "./lib.js";
import { askDetailsAhead } from "./service.js";
import { VIEWS } from "./views.js";

const DRAWING_MS = 300;

askDetailsAhead();
const { view, params } = address.peek();
const shown = VIEWS.find(({ name }) => name === view)?.ahead?.(params);

const root = document.getElementById("page");
if (root) render(html`<${Shell} />`, root);
void Promise.resolve(shown).then(() => setTimeout(readAhead, DRAWING_MS));
