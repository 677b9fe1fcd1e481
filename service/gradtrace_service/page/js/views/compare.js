// Compare: two answers side by side, and how far they agree over all training rows.
import { changed, link } from "../address.js";
import { Icon } from "../components/icons.js";
import { html } from "../lib.js";
import { Agreement } from "./compare/agreement.js";
import { useComparison } from "./compare/asking.js";
import { Form } from "./compare/form.js";
import { sideOf, swapped } from "./compare/side.js";
import { Sides } from "./compare/sides.js";

/** @param {import("../views.js").ViewProps} props */
export function Compare({ params, details }) {
  const first = sideOf(params, details, 1);
  const second = sideOf(params, details, 2);
  const exchange = swapped(first, second);
  const asked = useComparison(first, second, details.generation);
  return html`<div class="title"><h1>Compare two answers</h1>
      <p class="soft">Two methods, checkpoints, indexes or queries: which rows do they agree on?</p>
      ${exchange && html`<a class="button" href=${link("compare", changed(exchange))}><${Icon} name="swap" /> Swap</a>`}</div>
    <div class="cmp-forms">
      <${Form} side=${first} details=${details} params=${params} result=${asked.first.data?.results[0] ?? null} />
      <${Form} side=${second} details=${details} params=${params} result=${asked.second.data?.results[0] ?? null} />
    </div>
    <${Agreement} asked=${asked} first=${first} second=${second} />
    <${Sides} asked=${asked} first=${first} second=${second} />`;
}
