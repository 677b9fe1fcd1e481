// The views of the page, in the order of the navigation.
import { Answer } from "./views/answer.js";
import { Ask, askRowsAhead } from "./views/ask.js";
import { Clean } from "./views/clean.js";
import { Compare } from "./views/compare.js";
import { Operate } from "./views/operate.js";
import { Overview } from "./views/overview.js";

/**
 * @typedef {{params: URLSearchParams, details: import("./wire.js").IndexDetails}} ViewProps
 * @typedef {{name: string, title: string, component: (props: ViewProps) => any, hidden?: boolean,
 *   scope?: "query" | "admin", ahead?: (params: URLSearchParams) => void}} View
 *   hidden: reached from another view, not from the navigation.  scope: of the key that it needs.  ahead: asks for what
 *   it shows first, where the page begins with it
 */

/** @type {View[]} */
export const VIEWS = [
  { name: "ask", title: "Ask", component: Ask, ahead: askRowsAhead },
  { name: "answer", title: "Answer", component: Answer, hidden: true },
  { name: "compare", title: "Compare", component: Compare },
  { name: "clean", title: "Clean", component: Clean },
  { name: "overview", title: "Overview", component: Overview },
  { name: "operate", title: "Operate", component: Operate, scope: "admin" },
];
