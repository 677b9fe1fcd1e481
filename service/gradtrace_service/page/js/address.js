// What the page shows is in its address, after the #: a link shows the same thing, and back and forward work. The part
// after the # is never sent to a server.
import { signal } from "./lib.js";

/**
 * @typedef {string | number | boolean | null | undefined} Value
 * @typedef {Record<string, Value | readonly (string | number)[]>} Parameters
 *   Null, undefined, false, "" and [] leave a parameter out; a list repeats it.
 * @typedef {{view: string, params: URLSearchParams}} Address
 */

const FIRST = "ask";

/** The address now. Replaced, never changed. */
export const address = signal(parsed(location.hash));

addEventListener("hashchange", () => {
  if (location.hash !== written(address.peek())) address.value = parsed(location.hash);
});
addEventListener("popstate", () => {
  if (location.hash !== written(address.peek())) address.value = parsed(location.hash);
});

/**
 * The address of a view, for `href`.
 * @param {string} view
 * @param {Parameters | URLSearchParams} [params]
 */
export function link(view, params = {}) {
  return written({
    view,
    params: params instanceof URLSearchParams ? params : searched(new URLSearchParams(), params),
  });
}

/**
 * Go to a view, as by a click on its link.
 * @param {string} view
 * @param {Parameters | URLSearchParams} [params]
 */
export function go(view, params = {}) {
  show(link(view, params), false);
}

/**
 * Change some parameters of the address, and keep the others.
 * @param {Parameters} changes
 * @param {{keep?: boolean}} [options] keep: whether the back button leads to the address before
 */
export function change(changes, { keep = false } = {}) {
  const { view, params } = address.peek();
  show(written({ view, params: searched(new URLSearchParams(params), changes) }), !keep);
}

/** The parameters of the address with some changed. @param {Parameters} changes */
export function changed(changes) {
  return searched(new URLSearchParams(address.value.params), changes);
}

/**
 * @param {URLSearchParams} params
 * @param {string} name
 * @param {number} otherwise
 */
export function numberIn(params, name, otherwise) {
  const value = Number(params.get(name) ?? Number.NaN);
  return Number.isFinite(value) ? value : otherwise;
}

/** Row ids of a parameter such as 3,14,15. @param {URLSearchParams} params @param {string} name */
export function rowsIn(params, name) {
  const rows = (params.get(name) ?? "").split(",").filter((part) => /^\d{1,15}$/.test(part));
  return rows.map(Number);
}

/** @param {string} hash @param {boolean} replace */
function show(hash, replace) {
  if (hash === location.hash) return;
  history[replace ? "replaceState" : "pushState"](null, "", hash);
  address.value = parsed(hash);
  if (!replace) scrollTo(0, 0);
}

/** @param {string} hash @returns {Address} */
function parsed(hash) {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  return { view: path || FIRST, params: new URLSearchParams(query) };
}

/** @param {Address} address */
function written({ view, params }) {
  // Commas are legal there, and lists of rows are full of them.
  const query = params.toString().replaceAll("%2C", ",");
  return `#/${view}${query && `?${query}`}`;
}

/** @param {URLSearchParams} params @param {Parameters} changes */
function searched(params, changes) {
  for (const [name, value] of Object.entries(changes)) {
    params.delete(name);
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== false && item !== "") params.append(name, String(item));
    }
  }
  return params;
}
