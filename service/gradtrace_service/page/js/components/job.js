// A job: what it does, how far it is, how it ended.
import { ago, clock, percent } from "../format.js";
import { jobText } from "../jobs.js";
import { html } from "../lib.js";
import { Notice } from "./states.js";

/** @param {{job: import("../wire.js").Job}} props */
export function JobCard({ job }) {
  const running = job.state === "running";
  const bad = job.state === "failed" || job.state === "interrupted";
  const lost = Object.entries(job.lost_methods ?? {});
  return html`<article class=${`job ${job.state}`} aria-label=${jobText(job)}>
    <header class="row"><strong>${jobText(job)}</strong>
      <span class=${`tag ${bad ? "danger" : ""}`}>${running ? `running, ${percent(job.progress)}` : job.state}</span>
      <span class="small soft" title=${clock(job.created)}>${ago(job.created)}${job.who ? ` by ${job.who}` : ""}${job.attempts > 1 ? ` · attempt ${job.attempts}` : ""} · generation ${job.generation}</span></header>
    ${(job.interruptions ?? 0) > 0 && html`<p class="small soft">Interrupted by the end of the service ${job.interruptions === 1 ? "" : `${job.interruptions} times `}and resumed when it was started again.</p>`}
    ${running && html`<progress class="job-progress" aria-label="Progress" value=${job.progress > 0 ? job.progress : undefined} max="1"></progress>`}
    ${job.error && html`<${Notice} kind="danger">${job.error}<//>`}
    ${lost.length > 0 && html`<${Notice} kind="warning">Methods that the index no longer offers: ${lost.map(([name, remedy]) => `${name} (${remedy})`).join(", ")}<//>`}
  </article>`;
}
