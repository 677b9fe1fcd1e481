// Components whose modules are not waited for before the page shows its first view.
import { Failed, Skeleton } from "./components/states.js";
import { html, signal, useEffect } from "./lib.js";

/** @type {(() => Promise<void>)[]} */
const unread = [];

/** @template {(props: any) => any} View @param {() => Promise<View>} load */
export function later(load) {
  const component = signal(/** @type {View | null} */ (null));
  const problem = signal(/** @type {Error | null} */ (null));
  const read = () =>
    load().then(
      (shown) => {
        component.value = shown;
      },
      (error) => {
        problem.value = error;
      },
    );
  unread.push(read);
  return (/** @type {Parameters<View>[0]} */ props) => {
    useEffect(() => {
      problem.value = null;
      if (!component.peek()) read();
    }, []);
    if (component.value) return html`<${component.value} ...${props} />`;
    if (!problem.value) return html`<${Skeleton} lines=${6} height="3rem" label="Loading the view" />`;
    return html`<${Failed} problem=${problem.value} retry=${() => location.reload()} title="This view could not be loaded" page />`;
  };
}

/** Have all of them read while people look at the first view, so that none keeps them waiting, or is missing once the service is. */
export async function readAhead() {
  for (const read of unread) await read(); // one by one: what people do meanwhile goes first
}
