// What is shown where there is no data: not yet, none, or something went wrong.
import { Problem } from "../api.js";
import { sentence } from "../format.js";
import { html } from "../lib.js";
import { Icon } from "./icons.js";

/** @param {{lines?: number, height?: string, label?: string}} props */
export function Skeleton({ lines = 1, height = "1rem", label = "Loading" }) {
  return html`<div class="stack" role="status"><span class="hidden">${label}</span>
    ${Array.from({ length: lines }, () => html`<div class="skeleton" style=${{ height }} aria-hidden="true"></div>`)}</div>`;
}

/** @param {{title: string, children?: any, icon?: "empty" | "search" | "alert", page?: boolean}} props page: it is all of the page */
export function Empty({ title, children, icon = "empty", page = false }) {
  return html`<div class="state"><${Icon} name=${icon} class="picture" /><${page ? "h1" : "h2"}>${title}<//>${children}</div>`;
}

/** @param {{problem: Error, retry?: () => void, title?: string, page?: boolean, children?: any}} props page: it is all of the page.  children: other ways on */
export function Failed({ problem, retry, title, page = false, children }) {
  const named = problem instanceof Problem ? problem : new Problem(String(problem));
  const fields = named.errors.filter(({ detail }) => !named.message.includes(detail)); // of one field, it is the message
  const again = named.status !== 400 && named.status !== 422; // else the answer would be the same
  return html`<div class="state" role="alert">
    <${Icon} name="alert" class="picture" />
    <${page ? "h1" : "h2"}>${title ?? titleOf(named)}<//>
    <p>${sentence(named.message)}</p>
    ${fields.length > 0 && html`<ul>${fields.map((error) => html`<li><code>${error.field}</code> ${error.detail}</li>`)}</ul>`}
    ${named.requestId && html`<p class="small">Request ${named.requestId}, by which the service's log names it.</p>`}
    ${retry && again && html`<button type="button" class="button" onClick=${retry}>Try again</button>`}
    ${children}
  </div>`;
}

/** @param {{kind?: "info" | "warning" | "danger", children?: any}} props */
export function Notice({ kind = "info", children }) {
  return html`<div class=${`notice ${kind}`}><${Icon} name="alert" /><div>${children}</div></div>`;
}

/** @param {Problem} problem */
function titleOf({ status, kind }) {
  if (kind === "unreachable") return "No answer from the service";
  if (kind === "stopped") return "Not answered";
  if (status === 401) return "Sign in to look at this";
  if (status === 403) return "Your key does not allow this";
  if (status === 404) return "There is no such thing";
  if (status === 422 || status === 400) return "This cannot be asked";
  if (status === 503) return "The service is not ready";
  return "Something went wrong";
}
