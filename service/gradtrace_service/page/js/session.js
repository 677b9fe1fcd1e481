// The API key, kept for this tab alone, and whether the page waits for one.
import { signal } from "./lib.js";

const PLACE = `gradtrace-key ${location.pathname}`; // another service may lie beside this one on the same host

/** @returns {string} */
function stored() {
  try {
    return sessionStorage.getItem(PLACE) ?? "";
  } catch {
    return ""; // storage is forbidden: the key lives as long as the page
  }
}

export const apiKey = signal(stored());

/** Set while a request waits for somebody to sign in: why. */
export const signInWanted = signal(/** @type {null | {reason: string}} */ (null));

/** @type {((signedIn: boolean) => void)[]} */
let waiting = [];

/**
 * Ask for a key. Resolves to whether one was given.
 * @param {string} reason
 * @returns {Promise<boolean>}
 */
export function askToSignIn(reason) {
  signInWanted.value = { reason };
  return new Promise((resolve) => waiting.push(resolve));
}

/** @param {string} key */
export function signIn(key) {
  apiKey.value = key;
  try {
    sessionStorage.setItem(PLACE, key);
  } catch {
    // as above
  }
  settle(true);
}

export function signOut() {
  apiKey.value = "";
  try {
    sessionStorage.removeItem(PLACE);
  } catch {
    // as above
  }
}

export function declineSignIn() {
  settle(false);
}

/** @param {boolean} signedIn */
function settle(signedIn) {
  signInWanted.value = null;
  const all = waiting;
  waiting = [];
  for (const resolve of all) resolve(signedIn);
}
