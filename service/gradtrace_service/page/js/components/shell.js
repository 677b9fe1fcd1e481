// What every view stands in: the header, the banner of a busy service, dialogs and toasts.

import { address, go, link } from "../address.js";
import { patience, returned, stopWaiting } from "../api.js";
import { html, useEffect, useErrorBoundary, useRef, useState } from "../lib.js";
import { useResource } from "../resource.js";
import { indexes, indexName, loadDetails, mayI, turn, wasRestarted, who } from "../service.js";
import { apiKey, askToSignIn, signOut } from "../session.js";
import { switchTheme, theme } from "../theme.js";
import { VIEWS } from "../views.js";
import { Icon } from "./icons.js";
import { SignIn } from "./sign-in.js";
import { Empty, Failed, Skeleton } from "./states.js";
import { Toasts } from "./toast.js";

const TOLD_MS = 8_000; // of a restart

export function Shell() {
  const { view } = address.value;
  const key = JSON.stringify([indexName.value, turn.value, apiKey.value]);
  const details = useResource(key, loadDetails);
  const main = useRef(/** @type {HTMLElement | null} */ (null));
  const shown = VIEWS.find(({ name }) => name === view);
  useEffect(() => {
    document.title = shown ? `${shown.title} · Gradtrace` : "Gradtrace";
  }, [view]);
  const skip = () => main.current?.focus();
  return html`
    <button type="button" class="button primary skip" onClick=${skip}>Skip to content</button>
    <${Header} view=${view} />
    <${Patience} />
    <main class="main" ref=${main} tabindex="-1"><${Content} view=${shown} details=${details} /></main>
    <${SignIn} /><${Toasts} />`;
}

/** @param {{view: import("../views.js").View | undefined, details: import("../resource.js").Resource<any>}} props */
function Content({ view, details }) {
  const [error, forget] = useErrorBoundary();
  useEffect(forget, [address.value.view]);
  if (error) return html`<${Failed} problem=${error} retry=${forget} title="This view failed" page />`;
  if (!view)
    return html`<${Empty} title="There is no such view" page><a class="button" href=${link("ask")}>Ask a question</a><//>`;
  if (details.problem) return html`<${Failed} problem=${details.problem} retry=${details.reload} page />`;
  if (!details.data) return html`<${Skeleton} lines=${6} height="3rem" label="Loading the index" />`;
  if (view.scope && !mayI(view.scope)) {
    return html`<${Empty} title=${`${view.title} needs a key of scope ${view.scope}`} icon="alert" page>
      <p>${who.value.name ? `The key ${who.value.name}` : "Your key"} is for ${who.value.scopes.join(" and ") || "nothing"}. Generations, jobs and metrics are for those who keep the service running.</p>
      <button type="button" class="button" onClick=${() => askToSignIn("")}>Use another key</button><//>`;
  }
  return html`<${view.component} key=${view.name} params=${address.value.params} details=${details.data} />`;
}

/** @param {{view: string}} props */
function Header({ view }) {
  const index = indexName.value;
  const current = view === "answer" ? "ask" : view;
  return html`<header class="header">
    <a class="brand" href=${link("ask", { index })}><img src=${iconAddress} alt="" />Gradtrace</a>
    <nav aria-label="Views"><div class="tabs">
      ${VIEWS.filter(({ hidden, scope }) => !hidden && (!scope || mayI(scope))).map(
        ({ name, title }) =>
          html`<a class="tab" href=${link(name, { index })} aria-current=${name === current ? "page" : null}>${title}</a>`,
      )}
    </div></nav>
    <div class="ends"><${IndexChoice} /><${Account} /><${ThemeSwitch} />
      <a class="button plain" href="docs" title="The API, described">API</a></div>
  </header>`;
}

const iconAddress = new URL("../../icon.svg", import.meta.url).href;

function IndexChoice() {
  if (indexes.value.length < 2) return null;
  /** @param {any} event */
  const choose = (event) =>
    go(address.peek().view === "answer" ? "ask" : address.peek().view, { index: event.target.value });
  return html`<select class="input which" aria-label="Index" onChange=${choose} value=${indexName.value ?? indexes.value[0]?.name}>
    ${indexes.value.map(({ name }) => html`<option value=${name}>${name}</option>`)}</select>`;
}

function Account() {
  if (apiKey.value === "") return null;
  return html`<button type="button" class="button plain" onClick=${signOut} title="Forget the key">
    <${Icon} name="key" /> ${who.value.name ?? "Sign out"}</button>`;
}

function ThemeSwitch() {
  const dark = theme.value === "dark";
  return html`<button type="button" class="button plain icon" onClick=${switchTheme} aria-label=${dark ? "Light colours" : "Dark colours"}>
    <${Icon} name=${dark ? "sun" : "moon"} /></button>`;
}

function Patience() {
  const restarted = useRestarted();
  return html`<div role="status" aria-live="polite">${
    patience.value
      ? html`<div class="banner"><span class="spinner" aria-hidden="true"></span><span>Waiting for the service: ${patience.value.reason}</span>
      <button type="button" class="button" onClick=${stopWaiting}>Stop</button></div>`
      : restarted && html`<div class="banner good">The service was restarted. It answers again.</div>`
  }</div>`;
}

/** Whether the service was restarted, for a while after it came back. */
function useRestarted() {
  const [restarted, setRestarted] = useState(false);
  useEffect(() => {
    if (!returned.value) return;
    let timer = 0;
    let gone = false;
    wasRestarted().then(
      (yes) => {
        if (gone) return;
        setRestarted(yes);
        timer = setTimeout(setRestarted, TOLD_MS, false);
      },
      () => {}, // it is missed again
    );
    return () => {
      gone = true;
      clearTimeout(timer);
      setRestarted(false);
    };
  }, [returned.value]);
  return restarted;
}
