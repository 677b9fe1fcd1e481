// The row that is looked at, large, with its buttons.
import { change, link } from "../../address.js";
import { Example, kindOf, notRendered } from "../../components/example.js";
import { Check, Choice, Entry } from "../../components/fields.js";
import { Icon } from "../../components/icons.js";
import { Label } from "../../components/label.js";
import { Notice } from "../../components/states.js";
import { example } from "../../examples.js";
import { count, labelText, measured } from "../../format.js";
import { html, useRef } from "../../lib.js";
import { canUndo, conflicts, forget, KINDS, marks, unmark } from "../../marks.js";
import { useResource } from "../../resource.js";
import { chosenIndex, who } from "../../service.js";
import { Latest } from "./latest.js";
import { markText } from "./mark-chip.js";
import { rankingOf } from "./ranking.js";

/**
 * @typedef {import("./ranking.js").Candidate} Candidate
 * @typedef {import("./review.js").Acts} Acts
 */

/**
 * @param {import("../../views.js").ViewProps & {candidate: Candidate, total: number, acts: Acts}} props
 *   total: rows of the order in which the candidate has its rank
 */
export function Current({ candidate, total, params, details, acts }) {
  const { row } = candidate;
  const shown = useResource(JSON.stringify([row, chosenIndex(), details.generation]), (signal) =>
    example("train", row, signal),
  );
  const mark = marks.value.get(row);
  const keys = params.get("keys") !== "off";
  return html`<aside class="clean-current" aria-label="The row that is looked at"><div class="panel stack tight">
    <div class="clean-example" ...${scrolling(shown.data?.example)}><${Example} example=${shown.data?.example ?? null} alt=${`training row ${row}`} otherwise=${shown.data && notRendered} /></div>
    <div class="stack tight clean-facts">
      <h2 class="row"><span>Row ${count(row)}</span><span class="small soft number">${count(candidate.rank)} of ${count(total)}</span></h2>
      <p class="row"><${Label} label=${candidate.label} name=${candidate.label_name} />
        ${candidate.prediction !== null && html`<span class="soft">predicted</span> <${Label} label=${candidate.prediction} name=${candidate.prediction_name} />`}</p>
      <p class="small soft number">${[...new Set([rankingOf(params).score(candidate), `loss ${measured(candidate.loss)}`])].join(" · ")}</p>
    </div>
    <${Conflict} row=${row} acts=${acts} />
    <${Buttons} mark=${mark} acts=${acts} keys=${keys} />
    <p class="small clean-mark" aria-live="polite">${mark ? html`Marked <strong>${markText(mark)}</strong>` : html`<span class="soft">Not marked</span>`}</p>
    <${More} key=${row} candidate=${candidate} mark=${mark} details=${details} acts=${acts} />
    <div class="row clean-ends">
      <button type="button" class="button" disabled=${!canUndo()} onClick=${acts.back}><${Icon} name="reset" /> Undo ${keys && html`<kbd>z</kbd>`}</button>
      ${mark && html`<button type="button" class="button" disabled=${who.value.read_only} onClick=${() => unmark([row])}>Clear</button>`}
      <a class="button" href=${link("answer", { ...chosenIndex(), train: row })}>Why?</a>
    </div>
    <div class="clean-keys"><${Check} name="Quick keys: w r u x, z undo, j k move" checked=${keys} set=${(/** @type {boolean} */ on) => change({ keys: on ? null : "off" })} /></div>
  </div><${Latest} /></aside>`;
}

/** What may be longer than its place is scrolled by keys, too. @param {import("../../wire.js").Payload | null | undefined} example */
const scrolling = (example) =>
  kindOf(example) === "image" ? {} : { tabindex: 0, role: "region", "aria-label": "The example" };

/** @param {{mark: import("../../marks.js").Mark | undefined, acts: Acts, keys: boolean}} props */
function Buttons({ mark, acts, keys }) {
  return html`<div class="clean-buttons" role="group" aria-label="Mark this row">${KINDS.map(
    ({
      kind,
      key,
      title,
      meaning,
    }) => html`<button type="button" class=${`button mark-button mark-${kind}`} title=${meaning}
      aria-pressed=${mark?.mark === kind} aria-keyshortcuts=${keys ? key : null} disabled=${who.value.read_only} onClick=${() => acts.judge(kind)}>
      ${title} ${keys && html`<kbd>${key}</kbd>`}</button>`,
  )}</div>`;
}

/** For quick keys, which a field would take as its own. */
function focusRow() {
  /** @type {HTMLElement | null} */
  const row = document.querySelector('.clean-review [aria-current="true"]');
  if (row) row.focus({ preventScroll: true });
  else if (document.activeElement instanceof HTMLElement) document.activeElement.blur(); // it was scrolled away
}

/** Suggested label and note. @param {{candidate: Candidate, mark: import("../../marks.js").Mark | undefined, details: import("../../wire.js").IndexDetails, acts: Acts}} props */
function More({ candidate, mark, details, acts }) {
  const suggested = mark?.label ?? (candidate.correct === false ? candidate.prediction : null);
  const value = suggested === null ? "" : String(suggested);
  const readOnly = who.value.read_only;
  const steps = useRef(false); // through the labels, by keys of which each chooses one
  /** @param {string} label */
  const suggest = (label) =>
    acts.judge(mark?.mark ?? "wrong", { candidate, label: label === "" ? null : Number(label), stay: true });
  /** @param {string} label */
  const choose = (label) => {
    suggest(label);
    if (!steps.current) focusRow();
  };
  /** @param {KeyboardEvent} event */
  const press = (event) => {
    const { key, altKey, target } = event;
    const chooses = target instanceof HTMLSelectElement;
    if (key === (chooses ? "Escape" : "Enter") && !event.isComposing) {
      event.preventDefault();
      focusRow();
    }
    steps.current = chooses && !altKey && ![" ", "Enter", "Escape"].includes(key); // these open the list of labels
  };
  /** @param {string} note */
  const keep = (note) =>
    acts.judge(mark?.mark ?? "unsure", { candidate, label: mark?.label ?? null, note, stay: true });
  const names = details.class_names;
  return html`<details class="fold" open=${matchMedia("(min-width: 60rem)").matches}><summary>Label and note</summary><div class="clean-more"
    onKeyDown=${press} onPointerDown=${() => {
      steps.current = false;
    }}>
    ${
      names
        ? html`<${Choice} name="Suggested label" value=${value} choose=${choose}
          options=${[["", "none"], ...names.map((name, label) => [String(label), labelText(label, name)])]} />`
        : html`<${Entry} name="Suggested label" type="number" step="any" value=${value} disabled=${readOnly} commit=${suggest} />`
    }
    <${Entry} name="Note" maxlength="1000" placeholder="for the others" value=${mark?.note ?? ""} disabled=${readOnly} commit=${keep} />
  </div></details>`;
}

/** What somebody else set in the meantime. @param {{row: number, acts: Acts}} props */
function Conflict({ row, acts }) {
  const conflict = conflicts.value.get(row);
  if (!conflict) return null;
  const { theirs, mine } = conflict;
  const words = theirs
    ? `${theirs.who ?? "Somebody"} has set this to ${theirs.mark}`
    : "Somebody has cleared this mark";
  return html`<div role="alert"><${Notice} kind="warning"><p>${words} while you looked. Yours (${mine ?? "no mark"}) is not kept.</p>
    <div class="row"><button type="button" class="button" onClick=${() => forget([row])}>Keep theirs</button>
    <button type="button" class="button" onClick=${() => (mine === null ? unmark([row]) : acts.judge(mine, { stay: true }))}>Set mine</button></div><//></div>`;
}
