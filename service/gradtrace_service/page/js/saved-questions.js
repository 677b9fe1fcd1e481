// Questions that people saved: kept by the service, for all who use it.
import { go } from "./address.js";
import { api } from "./api.js";
import { chosenIndex } from "./service.js";

/** @param {{title: string, note: string, address: string}} question @returns {Promise<import("./wire.js").SavedQuestion>} */
export function saveQuestion({ note, ...question }) {
  return api.act("questions", { ...question, ...(note && { note }) });
}

/** @param {number} offset @param {number} k @param {AbortSignal} signal @returns {Promise<import("./wire.js").SavedQuestions>} */
export function savedQuestions(offset, k, signal) {
  return api.get("questions", { query: { offset, k }, signal });
}

/** @param {number} id */
export function deleteQuestion(id) {
  return api.delete(`questions/${id}`);
}

/** The way to the list of them, for a toast. */
export function toAll() {
  return { title: "Show all", run: () => go("ask", { ...chosenIndex(), from: "saved" }) };
}
