// The views of the page, in the order of the navigation. People begin with a question: the modules of the other views are
// read after it, or when they are shown.
import { later } from "./later.js";
import { Ask, askRowsAhead } from "./views/ask.js";

/**
 * @typedef {{params: URLSearchParams, details: import("./wire.js").IndexDetails}} ViewProps
 * @typedef {{name: string, title: string, component: (props: ViewProps) => any, hidden?: boolean,
 *   scope?: "query" | "admin", ahead?: (params: URLSearchParams) => Promise<void>}} View
 *   hidden: reached from another view, not from the navigation.  scope: of the key that it needs.  ahead: asks for what
 *   it shows first, where the page begins with it, and resolves once that is there
 */

/** @type {View[]} */
export const VIEWS = [
  { name: "ask", title: "Ask", component: Ask, ahead: askRowsAhead },
  {
    name: "answer",
    title: "Answer",
    component: later(() => import("./views/answer.js").then(({ Answer }) => Answer)),
    hidden: true,
  },
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
