// Copies the page's libraries from node_modules into the page, as ES modules that import each other by relative
// addresses: a browser resolves no bare names without an import map, which the page's Content-Security-Policy forbids.
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const modules = join(here, "node_modules");
const out = join(here, "../gradtrace_service/page/vendor");

/** Vendored name: the package's file. */
const FILES = {
  "preact.js": "preact/dist/preact.mjs",
  "preact-hooks.js": "preact/hooks/dist/hooks.mjs",
  "signals-core.js": "@preact/signals-core/dist/signals-core.mjs",
  "signals.js": "@preact/signals/dist/signals.mjs",
  "htm.js": "htm/dist/htm.mjs",
  "uplot.js": "uplot/dist/uPlot.iife.min.js",
  "uplot.css": "uplot/dist/uPlot.min.css",
};
const ADDRESSES = {
  preact: "./preact.js",
  "preact/hooks": "./preact-hooks.js",
  "@preact/signals-core": "./signals-core.js",
};
/** For the type checker: what a vendored module is called where its types lie. */
const TYPES = {
  "preact.d.ts": 'export * from "preact";',
  "preact-hooks.d.ts": 'export * from "preact/hooks";',
  "signals.d.ts": 'export * from "@preact/signals";',
  "htm.d.ts": 'export { default } from "htm";',
  "uplot.d.ts": 'export { default } from "uplot";',
};
const PACKAGES = ["preact", "@preact/signals-core", "@preact/signals", "htm", "uplot"];

function asModule(name, text) {
  const plain = text.replace(/\n?\/\/# sourceMappingURL=.*\s*$/, "\n");
  if (name === "uplot.js") return `${plain.trimEnd()}\nexport default uPlot;\n`; // its own module build is not minified
  return plain.replace(/from"([^".][^"]*)"/g, (_, bare) => {
    if (!(bare in ADDRESSES)) throw new Error(`${name} imports ${bare}, which is not vendored`);
    return `from"${ADDRESSES[bare]}"`;
  });
}

function write(name, text) {
  mkdirSync(dirname(join(out, name)), { recursive: true });
  writeFileSync(join(out, name), text);
}

rmSync(out, { recursive: true, force: true });
for (const [name, source] of Object.entries(FILES)) {
  write(name, asModule(name, readFileSync(join(modules, source), "utf8")));
}
for (const [name, text] of Object.entries(TYPES)) write(name, `${text}\n`);
const versions = {};
for (const name of PACKAGES) {
  const { version, license } = JSON.parse(readFileSync(join(modules, name, "package.json"), "utf8"));
  versions[name] = { version, license };
  write(
    `licenses/${name.replace("@", "").replace("/", "-")}.txt`,
    readFileSync(join(modules, name, "LICENSE"), "utf8"),
  );
}
write("VERSIONS.json", `${JSON.stringify(versions, null, 2)}\n`);

const names = readdirSync(out, { recursive: true, withFileTypes: true })
  .filter((entry) => entry.isFile())
  .map((entry) => join(entry.parentPath, entry.name).slice(out.length + 1))
  .sort();
const sums = names.map(
  (name) =>
    `${createHash("sha256")
      .update(readFileSync(join(out, name)))
      .digest("hex")}  ${name}`,
);
write("SHA256SUMS", `${sums.join("\n")}\n`);
