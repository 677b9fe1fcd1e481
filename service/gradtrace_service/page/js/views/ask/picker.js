// The rows of a data set, to choose one from by a click, or several for their mean.
import { change, changed, link, rowsIn } from "../../address.js";
import { Example, featureText, kindOf, notRendered } from "../../components/example.js";
import { Check, Choice, ClassChoice } from "../../components/fields.js";
import { Icon } from "../../components/icons.js";
import { Label } from "../../components/label.js";
import { Empty, Failed, Notice } from "../../components/states.js";
import { VirtualList } from "../../components/virtual.js";
import { examples, example as fetchExample, listOf } from "../../examples.js";
import { count, labelText, measured, plural, present, sentence } from "../../format.js";
import { html, useEffect, useRef, useState } from "../../lib.js";
import { MOST_QUERIES } from "../../question.js";
import { useResource } from "../../resource.js";
import { turn } from "../../service.js";

/**
 * @typedef {import("../../wire.js").Example} Row
 * @typedef {import("../../views.js").ViewProps & {split: import("../../wire.js").Split}} PickerProps
 */

const TYPING_MS = 250;
const LOOK_AGAIN_MS = 2000; // at predictions that are still being computed
const GRID = { itemWidth: 92, itemHeight: 140 };
const LINES = { itemHeight: 68 };

/** @param {PickerProps} props */
export function Picker({ params, details, split }) {
  const [total, setTotal] = useState(/** @type {number | null} */ (null));
  const [note, setNote] = useState(/** @type {string | null} */ (null));
  const [pending, setPending] = useState(0);
  const [look, setLook] = useState(0);
  useEffect(() => {
    if (!pending) return;
    const timer = setTimeout(() => setLook(look + 1), LOOK_AGAIN_MS);
    return () => clearTimeout(timer);
  }, [pending, look]);
  const list = listOf(params);
  const several = params.has("several");
  const chosen = rowsIn(params, split);
  const kind = useKind(split, details);
  const id = JSON.stringify([params.get("index"), split, list, turn.value, details.generation]);
  /** @param {number} offset @param {number} k @param {AbortSignal} signal */
  const load = async (offset, k, signal) => {
    const page = await examples(split, list, offset, k, signal);
    setNote(page.note ?? null);
    setPending(page.pending ?? 0);
    return { total: page.rows_total, items: page.results };
  };
  /** @param {number} row */
  const toggle = (row) => {
    const rows = chosen.includes(row) ? chosen.filter((other) => other !== row) : [...chosen, row].slice(-MOST_QUERIES);
    change({ [split]: rows.join(",") });
  };
  /** @param {Row | null} row @param {number} _at @param {any} focus */
  const render = (row, _at, focus) => {
    if (!row) return html`<div class="skeleton filled" aria-hidden="true"></div>`;
    const content = kind === "image" ? html`<${Tile} row=${row} />` : html`<${Line} row=${row} />`;
    const shape = `pick ${kind === "image" ? "tile" : "line"}`;
    if (!several)
      return html`<a class=${shape} ...${focus} href=${link("answer", changed({ [split]: row.row, example: null, kept: null }))}>${content}</a>`;
    return html`<button type="button" class=${shape} ...${focus} aria-pressed=${chosen.includes(row.row)} onClick=${() => toggle(row.row)}>${content}</button>`;
  };
  return html`<${Filters} params=${params} details=${details} split=${split} kind=${kind} total=${total} />
    ${note && html`<${Notice}>${sentence(note)}<//>`}
    ${kind === "none" && notRendered}
    ${
      kind &&
      html`<${VirtualList} id=${id} look=${look} load=${load} render=${render} onTotal=${setTotal}
      label=${split === "query" ? "Rows of the query set" : "Rows of the training set"} ...${kind === "image" ? GRID : LINES}
      empty=${html`<${Empty} title="No row is like this" icon="search">${showAll}<//>`}
      failed=${(/** @type {Error} */ problem, /** @type {() => void} */ retry) => html`<${Failed} problem=${problem} retry=${retry}>${filtered(params) && showAll}<//>`} />`
    }
    ${several && html`<${Slice} params=${params} split=${split} chosen=${chosen} load=${load} />`}`;
}

const FILTERS = ["class", "wrong", "text", "order", "only"];

/** @param {URLSearchParams} params */
const filtered = (params) => FILTERS.some((name) => params.has(name));

const showAll = html`<button type="button" class="button" onClick=${() => change(Object.fromEntries(FILTERS.map((name) => [name, null])))}>Show all rows</button>`;

/** How rows are shown: as the task's input says, or the first row. @param {string} split @param {PickerProps["details"]} details */
function useKind(split, details) {
  const known = details.input?.kind;
  const asked = !known || known === "other";
  const first = useResource(asked ? split : null, (signal) =>
    fetchExample(split === "query" ? "query" : "train", 0, signal),
  );
  if (!asked) return known;
  if (first.problem) return "other";
  return first.data ? kindOf(first.data.example) : null;
}

/** @param {PickerProps & {kind: string | null, total: number | null}} props */
function Filters({ params, details, split, kind, total }) {
  const names = details.class_names;
  const words = split === "query" ? details.query_rows : present(details);
  return html`<search class="filters">
    ${(kind === "text" || kind === "features") && html`<${Words} params=${params} />`}
    ${names && html`<${ClassChoice} name="Class" names=${names} chosen=${params.getAll("class").map(Number)} choose=${(/** @type {number[]} */ next) => change({ class: next })} />`}
    <${Choice} name="Order" value=${params.get("order") ?? "row"} choose=${(/** @type {string} */ order) => change({ order: order === "row" ? null : order })}
      options=${[
        ["row", "As stored"],
        ["-row", "Last first"],
        ["-loss", "Highest loss first"],
        ["loss", "Lowest loss first"],
      ]} />
    <div class="row ends">
      ${names && html`<${Check} name="Wrong only" checked=${params.has("wrong")} set=${(/** @type {boolean} */ on) => change({ wrong: on })} />`}
      <button type="button" class="button" aria-pressed=${params.has("several")}
        onClick=${() => change({ several: !params.has("several"), query: null, train: null })}><${Icon} name="layers" /> Choose several</button>
      <span class="soft small number" role="status">${total === null ? "" : total === words ? plural(total, "row") : `${count(total)} of ${count(words)} rows`}</span>
    </div>
  </search>`;
}

/** @param {{params: URLSearchParams}} props */
function Words({ params }) {
  const inAddress = params.get("text") ?? "";
  const [text, setText] = useState(inAddress);
  const timer = useRef(0);
  useEffect(() => setText(inAddress), [inAddress]);
  useEffect(() => () => clearTimeout(timer.current), []);
  /** @param {any} event */
  const type = ({ target }) => {
    setText(target.value);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => change({ text: target.value.trim() }), TYPING_MS);
  };
  return html`<div class="field"><label class="name" for="search-text">Search</label>
    <input class="input" id="search-text" type="search" placeholder="Words of an example" value=${text} onInput=${type} /></div>`;
}

/** @param {{row: Row}} props */
function Tile({ row }) {
  return html`<span class="tile-picture"><${Example} example=${row.example} alt=${`row ${row.row}`} /></span>
    <span class="tile-words"><${Verdict} row=${row} /></span>`;
}

/** @param {{row: Row}} props */
function Line({ row }) {
  const features = row.example?.features;
  return html`<span class="line-row soft number">${count(row.row)}</span>
    ${
      features
        ? html`<span class="line-features">${Object.entries(features).map(([name, value]) => html`<span title=${name}><span class="name">${name}</span> ${featureText(value)}</span>`)}</span>`
        : html`<span class="line-example"><${Example} example=${row.example} lines=${2} otherwise=${html`<span class="small soft number">${numbersOf(row)}</span>`} /></span>`
    }
    <span class="line-words"><${Label} label=${row.label} name=${row.label_name} /><${Verdict} row=${row} short /></span>`;
}

/** All that is known of a row which the task does not render. @param {Row} row */
function numbersOf({ loss, prediction, prediction_name: name, correct }) {
  const predicted = prediction === null || correct === false ? [] : [`predicted ${labelText(prediction, name)}`];
  return [...(loss === null ? [] : [`loss ${measured(loss)}`]), ...predicted].join(" · ");
}

/** The label, and the prediction where it differs. @param {{row: Row, short?: boolean}} props */
function Verdict({ row, short = false }) {
  const label = labelText(row.label, row.label_name);
  const wrong = row.correct === false;
  if (!wrong) return short ? null : html`<span>${label}</span>`;
  const predicted = labelText(row.prediction, row.prediction_name);
  return html`<span class="wrong">${short ? "" : label} <span class="predicted">→ ${predicted}</span><span class="hidden"> is what the model predicts, wrongly</span></span>`;
}

/** @param {{params: URLSearchParams, split: string, chosen: number[], load: (offset: number, k: number, signal: AbortSignal) => Promise<{items: Row[]}>}} props */
function Slice({ params, split, chosen, load }) {
  const all = async () => {
    const { items } = await load(0, MOST_QUERIES, new AbortController().signal);
    change({ [split]: items.map(({ row }) => row).join(",") });
  };
  return html`<div class="slice" role="region" aria-label="Chosen rows"><span role="status">${chosen.length ? `${plural(chosen.length, "row")} chosen` : "Choose rows, to explain their mean"}</span>
    <span class="row">
      <button type="button" class="button" onClick=${all}>First ${MOST_QUERIES} of the list</button>
      ${
        chosen.length > 0 &&
        html`<button type="button" class="button" onClick=${() => change({ [split]: null })}>None</button>
      <a class="button primary" href=${link("answer", new URLSearchParams([...params].filter(([name]) => name !== "several")))}>Explain ${chosen.length === 1 ? "it" : "their mean"}</a>`
      }
    </span></div>`;
}
