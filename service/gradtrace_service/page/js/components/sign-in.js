// Asks for an API key when the service wants one.
import { html, useId, useState } from "../lib.js";
import { declineSignIn, signIn, signInWanted } from "../session.js";
import { Dialog } from "./dialog.js";
import { Notice } from "./states.js";

export function SignIn() {
  if (signInWanted.value === null) return null;
  return html`<${SignInDialog} reason=${signInWanted.value.reason} />`;
}

/** @param {{reason: string}} props */
function SignInDialog({ reason }) {
  const [key, setKey] = useState("");
  const field = useId();
  /** @param {Event} event */
  const submit = (event) => {
    event.preventDefault();
    if (key.trim()) signIn(key.trim());
  };
  return html`<${Dialog} title="Sign in" close=${declineSignIn}>
    <p class="soft">This service asks for an API key. It is kept in this tab alone, and forgotten when the tab is closed.</p>
    ${reason && html`<${Notice} kind="danger">The service did not accept the key: ${reason}<//>`}
    <form class="stack" onSubmit=${submit}>
      <div class="field"><label class="name" for=${field}>API key</label>
        <input class="input" id=${field} type="password" autocomplete="off" spellcheck="false" value=${key} autofocus
          onInput=${(/** @type {any} */ event) => setKey(event.target.value)} /></div>
      <div class="actions">
        <button type="button" class="button" onClick=${declineSignIn}>Not now</button>
        <button class="button primary" disabled=${!key.trim()}>Sign in</button>
      </div>
    </form>
  <//>`;
}
