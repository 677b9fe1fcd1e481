// The views of the page, in the order of the navigation. People begin with a question and its answer: the modules of the
// other views are read after these, or when they are shown.
import { Failed, Skeleton } from "./components/states.js";
import { html, signal, useEffect } from "./lib.js";
import { Answer } from "./views/answer.js";
import { Ask, askRowsAhead } from "./views/ask.js";

/**
 * @typedef {{params: URLSearchParams, details: import("./wire.js").IndexDetails}} ViewProps
 * @typedef {{name: string, title: string, component: (props: ViewProps) => any, hidden?: boolean,
 *   scope?: "query" | "admin", ahead?: (params: URLSearchParams) => void}} View
 *   hidden: reached from another view, not from the navigation.  scope: of the key that it needs.  ahead: asks for what
 *   it shows first, where the page begins with it
 */

const AHEAD_MS = 3_000; // by then, the first pictures are there

/** @type {(() => Promise<void>)[]} */
const unread = [];

/** @param {() => Promise<(props: ViewProps) => any>} load @returns {(props: ViewProps) => any} */
function later(load) {
  const component = signal(/** @type {((props: ViewProps) => any) | null} */ (null));
  const problem = signal(/** @type {Error | null} */ (null));
  const read = () =>
    load().then(
      (view) => {
        component.value = view;
      },
      (error) => {
        problem.value = error;
      },
    );
  unread.push(read);
  return (props) => {
    useEffect(() => {
      problem.value = null;
      if (!component.peek()) read();
    }, []);
    if (component.value) return html`<${component.value} ...${props} />`;
    if (!problem.value) return html`<${Skeleton} lines=${6} height="3rem" label="Loading the view" />`;
    return html`<${Failed} problem=${problem.value} retry=${() => location.reload()} title="This view could not be loaded" page />`;
  };
}

/** Have all views read while people look at the first, so that none keeps them waiting, or is missing once the service is. */
export async function readAhead() {
  await new Promise((resolve) => setTimeout(resolve, AHEAD_MS));
  for (const read of unread) await read(); // one by one: what people do meanwhile goes first
}

/** @type {View[]} */
export const VIEWS = [
  { name: "ask", title: "Ask", component: Ask, ahead: askRowsAhead },
  { name: "answer", title: "Answer", component: Answer, hidden: true },
  {
    name: "compare",
    title: "Compare",
    component: later(() => import("./views/compare.js").then(({ Compare }) => Compare)),
  },
  { name: "clean", title: "Clean", component: later(() => import("./views/clean.js").then(({ Clean }) => Clean)) },
  {
    name: "overview",
    title: "Overview",
    component: later(() => import("./views/overview.js").then(({ Overview }) => Overview)),
  },
  {
    name: "operate",
    title: "Operate",
    component: later(() => import("./views/operate.js").then(({ Operate }) => Operate)),
    scope: "admin",
  },
];
