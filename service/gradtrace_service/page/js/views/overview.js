// Overview: an index at a glance.
import { api } from "../api.js";
import { Failed, Notice, Skeleton } from "../components/states.js";
import { plural } from "../format.js";
import { html, useEffect } from "../lib.js";
import { useResource } from "../resource.js";
import { chosenIndex, turn } from "../service.js";
import { Classes } from "./overview/classes.js";
import { Facts } from "./overview/facts.js";
import { HeatMap } from "./overview/heat-map.js";
import { Influential } from "./overview/influential.js";
import { CheckpointLosses, LossDistribution } from "./overview/losses.js";
import { GroundMap } from "./overview/map.js";
import { SelfInfluence } from "./overview/self-influence.js";

const AGAIN_MS = 2_000;

/** @param {import("../views.js").ViewProps} props */
export function Overview({ params, details }) {
  const key = JSON.stringify([chosenIndex(), details.generation, turn.value]);
  /** @type {import("../resource.js").Resource<import("../wire.js").OverviewAnswer>} */
  const overview = useResource(key, (signal) => api.get("overview", { query: chosenIndex(), signal }));
  const { data } = overview;
  useEffect(() => {
    if (!data?.pending) return;
    const timer = setTimeout(overview.reload, AGAIN_MS);
    return () => clearTimeout(timer);
  }, [data]);
  const head = html`<div class="title"><h1>Overview</h1><p class="soft">What the index holds, which classes help or hurt which, and the rows that matter most.</p></div>`;
  if (overview.problem)
    return html`${head}<div class="panel"><${Failed} problem=${overview.problem} retry=${overview.reload} /></div>`;
  return html`${head}
    ${(data?.pending ?? 0) > 0 && html`<div class="ov-note"><${Notice}>The mean loss at ${plural(data?.pending ?? 0, "checkpoint")} is still being computed.<//></div>`}
    <div class="ov">
      <section class="panel" aria-label="The index"><h2>The index</h2><${Facts} details=${details} /></section>
      <section class="panel" aria-label="Loss by checkpoint"><h2>Loss by checkpoint</h2>
        ${data ? html`<${CheckpointLosses} losses=${data.loss_by_checkpoint} />` : html`<${Skeleton} height="10rem" />`}</section>
      <section class="panel" aria-label="Losses"><h2>Losses of the training rows</h2>
        ${data ? html`<${LossDistribution} histogram=${data.loss_histogram} />` : html`<${Skeleton} height="10rem" />`}</section>
      <${SelfInfluence} details=${details} />
      ${data?.coordinates && html`<${GroundMap} params=${params} details=${details} coordinates=${data.coordinates} />`}
      ${(data?.labels.length ?? 0) > 0 && details.query_rows > 0 && html`<${HeatMap} params=${params} details=${details} labels=${data?.labels ?? []} />`}
      ${(data?.labels.length ?? 0) > 0 && html`<${Classes} labels=${data?.labels ?? []} />`}
      <${Influential} params=${params} details=${details} half=${Boolean(data?.coordinates)} />
    </div>`;
}
