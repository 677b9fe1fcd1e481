// Operate: what changes an index, and how the service is doing.
import { html } from "../lib.js";
import { Generations } from "./operate/generations.js";
import { Indexes } from "./operate/indexes.js";
import { Jobs } from "./operate/jobs.js";
import { Metrics } from "./operate/metrics.js";

/** @param {import("../views.js").ViewProps} props */
export function Operate({ details }) {
  return html`<div class="title"><h1>Operate</h1><p class="soft">Generations of the index, the jobs that make them, and the service at a glance.</p></div>
    <div class="op">
      <${Generations} details=${details} />
      <${Jobs} />
      <${Metrics} />
      <${Indexes} />
    </div>`;
}
