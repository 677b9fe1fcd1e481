// How much rows had to be learnt by heart.
import { link } from "../../address.js";
import { api } from "../../api.js";
import { Bars, histogramOf } from "../../components/bars.js";
import { Failed, Skeleton } from "../../components/states.js";
import { count, measured, plural } from "../../format.js";
import { html, useMemo } from "../../lib.js";
import { useResource } from "../../resource.js";
import { chosenIndex, turn } from "../../service.js";

/** @param {{details: import("../../wire.js").IndexDetails}} props */
export function SelfInfluence({ details }) {
  const key = JSON.stringify([chosenIndex(), details.generation, turn.value]);
  const query = { ...chosenIndex(), names: ["self_influence"], k: 100_000 };
  /** @type {import("../../resource.js").Resource<import("../../wire.js").ColumnsAnswer>} */
  const columns = useResource(key, (signal) => api.get("columns/train", { query, signal }));
  const histogram = useMemo(() => {
    const values = columns.data?.columns.self_influence ?? [];
    return histogramOf(/** @type {number[]} */ (values.filter((value) => typeof value === "number")));
  }, [columns.data]);
  return html`<section class="panel" aria-label="Self-influence"><h2>Self-influence</h2>
    ${
      columns.problem
        ? html`<${Failed} problem=${columns.problem} retry=${columns.reload} />`
        : !columns.data
          ? html`<${Skeleton} height="10rem" label="Computing self-influence" />`
          : histogram
            ? html`<${Bars} histogram=${histogram} format=${measured} label=${`Self-influence of ${count(columns.data.rows.length)} training rows, from ${measured(histogram.edges[0])} to ${measured(histogram.edges.at(-1))}`} />
              <p class="small soft">${plural(columns.data.rows.length, "row")}${columns.data.sampled ? `, evenly spaced among ${count(columns.data.rows_total)},` : ""} by tracin. Those on the right are unusual or mislabelled: <a href=${link("clean", chosenIndex())}>look at them</a>.</p>`
            : html`<p class="small soft">It is not known of any row.</p>`
    }</section>`;
}
