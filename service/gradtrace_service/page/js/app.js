import { address } from "./address.js";
import { Shell } from "./components/shell.js";
import { html, render } from "./lib.js";
import { readAhead, VIEWS } from "./views.js";

// Its rows, beside the index's details, on which the view itself waits.
const { view, params } = address.peek();
VIEWS.find(({ name }) => name === view)?.ahead?.(params);

const root = document.getElementById("page");
if (root) render(html`<${Shell} />`, root);
void readAhead();
