// The classes: how many rows, how well they are predicted.
import { link } from "../../address.js";
import { Label } from "../../components/label.js";
import { count, measured, percent } from "../../format.js";
import { html, useState } from "../../lib.js";
import { chosenIndex } from "../../service.js";

const SHOWN = 20;

/** @param {{labels: import("../../wire.js").OverviewAnswer["labels"]}} props */
export function Classes({ labels }) {
  const [all, setAll] = useState(false);
  const shown = all ? labels : labels.slice(0, SHOWN);
  const most = Math.max(...labels.map(({ mean_loss: loss }) => loss ?? 0), 0);
  return html`<section class="panel" aria-label="Classes"><h2>Classes of the training rows</h2>
    <div class="scrolls" tabindex="0" role="region" aria-label="Table of classes"><table class="ov-classes"><thead><tr><th scope="col">Class</th><th scope="col">Rows</th><th scope="col">Correct</th><th scope="col" colspan="2">Mean loss</th></tr></thead>
    <tbody>${shown.map(
      ({
        label,
        label_name: name,
        rows,
        correct,
        mean_loss: loss,
      }) => html`<tr><th scope="row"><a href=${link("clean", { ...chosenIndex(), by: "disagree", class: label })} title="Rows that are predicted as another class"><${Label} label=${label} name=${name} /></a></th>
        <td class="number">${count(rows)}</td><td class="number">${correct === null ? "–" : percent(correct / rows)}</td><td class="number">${measured(loss)}</td>
        <td class="ov-bar" aria-hidden="true"><i class="ov-bar-fill" style=${{ width: `${most > 0 ? (100 * (loss ?? 0)) / most : 0}%` }}></i></td></tr>`,
    )}</tbody></table></div>
    ${labels.length > SHOWN && html`<button type="button" class="button" onClick=${() => setAll(!all)}>${all ? "Fewer" : `All ${count(labels.length)}`}</button>`}
  </section>`;
}
