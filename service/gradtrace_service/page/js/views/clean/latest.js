// What was marked last, by whom.
import { link } from "../../address.js";
import { ago, count } from "../../format.js";
import { html, useEffect, useState } from "../../lib.js";
import { marks } from "../../marks.js";
import { chosenIndex } from "../../service.js";
import { MarkChip } from "./mark-chip.js";

const SHOWN = 5;

export function Latest() {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 20_000);
    return () => clearInterval(timer);
  }, []);
  const last = [...marks.value.values()].sort((a, b) => Date.parse(b.when) - Date.parse(a.when)).slice(0, SHOWN);
  if (!last.length) return null;
  return html`<section class="panel clean-latest" aria-label="Marked last"><h2>Marked last</h2><ul class="stack tight">${last.map(
    (mark) => html`<li class="row small" key=${mark.row}><${MarkChip} mark=${mark} />
      <a href=${link("answer", { ...chosenIndex(), train: mark.row })}>row ${count(mark.row)}</a>
      <span class="soft">${mark.who ?? "somebody"} · ${ago(mark.when, Math.max(now, Date.parse(mark.when)))}</span></li>`,
  )}</ul></section>`;
}
