// The libraries of the page, from the one place that knows where they lie.
import htm from "../vendor/htm.js";
import { h } from "../vendor/preact.js";

export { createContext, Fragment, h, render } from "../vendor/preact.js";
export {
  useCallback,
  useContext,
  useEffect,
  useErrorBoundary,
  useId,
  useLayoutEffect,
  useMemo,
  useRef,
  useState,
} from "../vendor/preact-hooks.js";
export { batch, computed, effect, signal, untracked, useComputed, useSignal } from "../vendor/signals.js";

/** JSX without a build step. What stands in ${...} is text or a component, never markup. */
export const html = htm.bind(h);
