// Where the rows of a table lie, coloured by what they are.
import { change, go } from "../../address.js";
import { api } from "../../api.js";
import { Choice } from "../../components/fields.js";
import { Scatter } from "../../components/scatter.js";
import { Failed, Skeleton } from "../../components/states.js";
import { count, measured } from "../../format.js";
import { html, useMemo } from "../../lib.js";
import { useResource } from "../../resource.js";
import { chosenIndex, turn } from "../../service.js";

const POINTS = 20_000;
const STEPS = 7; // colours, each of as many rows
const COLUMNS = /** @type {[string, string][]} */ ([
  ["self_influence", "Self-influence"],
  ["loss", "Loss"],
  ["label", "Value"],
  ["prediction", "Prediction"],
]);

/** @param {import("../../views.js").ViewProps & {coordinates: [string, string]}} props */
export function GroundMap({ params, details, coordinates }) {
  const name = COLUMNS.find(([column]) => column === params.get("colour"))?.[0] ?? "self_influence";
  const [x, y] = coordinates;
  const names = [`feature:${x}`, `feature:${y}`, name];
  const key = JSON.stringify([chosenIndex(), names, details.generation, turn.value]);
  /** @type {import("../../resource.js").Resource<import("../../wire.js").ColumnsAnswer>} */
  const columns = useResource(key, (signal) =>
    api.get("columns/train", { query: { ...chosenIndex(), names, k: POINTS }, signal }),
  );
  const drawn = useMemo(() => columns.data && pointsOf(columns.data, names), [columns.data]);
  const words = COLUMNS.find(([column]) => column === name)?.[1] ?? name;
  return html`<section class="panel ov-half ov-map" aria-label="Map"><div class="ov-head"><h2>Where the rows lie</h2>
      <${Choice} name="Coloured by" value=${name} options=${COLUMNS} choose=${(/** @type {string} */ next) => change({ colour: next === "self_influence" ? null : next })} /></div>
    ${
      columns.problem
        ? html`<${Failed} problem=${columns.problem} retry=${columns.reload} />`
        : !drawn
          ? html`<${Skeleton} height="34rem" label="Drawing the map" />`
          : html`<div class=${`ov-map-place${columns.busy ? " stale" : ""}`}><${Scatter} points=${drawn.points} styles=${STYLES} x=${x} y=${y} height=${null}
              label=${`Map of ${count(drawn.points.length)} training rows by ${x} and ${y}, coloured by ${words.toLowerCase()}`}
              say=${(/** @type {any} */ point) => `row ${count(point.row)}: ${words.toLowerCase()} ${measured(point.value)}`}
              pick=${(/** @type {any} */ point) => go("answer", { ...chosenIndex(), train: point.row })} /></div>
            <div class="ov-legend small"><span class="soft">${words}</span>${drawn.edges.map(
              (edge, at) =>
                html`<span class="ov-legend-step"><i class=${`ov-dot step-${at}`}></i><span class="number">${at === 0 ? `below ${measured(drawn.edges[1])}` : `from ${measured(edge)}`}</span></span>`,
            )}</div>
            <p class="small soft">${columns.data?.sampled ? `${count(drawn.points.length)} rows, evenly spaced among ${count(columns.data.rows_total)}; each` : "Each"} colour has as many rows as the others. A click explains a row.</p>`
    }</section>`;
}

/** @type {import("../../components/scatter.js").Styles} */
const STYLES = Object.fromEntries(
  Array.from({ length: STEPS }, (_, at) => [`step-${at}`, { token: `--scale-${at}`, size: at === STEPS - 1 ? 5 : 4 }]),
);

/** @param {import("../../wire.js").ColumnsAnswer} data @param {string[]} names x, y and colour */
function pointsOf({ rows, columns }, names) {
  const [xs, ys, values] = names.map((name) => columns[name] ?? []);
  const sorted = Float64Array.from((values ?? []).filter((value) => typeof value === "number")).sort();
  const edges = Array.from({ length: STEPS }, (_, at) => sorted[Math.floor((at * sorted.length) / STEPS)] ?? 0);
  const points = rows.flatMap((row, at) => {
    const [x, y, value] = [xs?.[at], ys?.[at], values?.[at]];
    if (typeof x !== "number" || typeof y !== "number" || typeof value !== "number") return [];
    const step = Math.max(
      edges.findLastIndex((edge) => value >= edge),
      0,
    );
    return [{ x, y, row, value, style: `step-${step}` }];
  });
  return { points, edges };
}
