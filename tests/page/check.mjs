// Checks the page in a browser against a running server:
//
//     node check.mjs http://127.0.0.1:8000 [FOLDER [NAME]]
//
// Screenshots go to FOLDER, by default screenshots/. NAME runs only the checks whose names contain it. CHROMIUM names the
// browser, by default /usr/bin/chromium.

import assert from "node:assert/strict";
import { mkdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";
import { startProxy } from "./scripted.mjs";
import { checks } from "./checks/check.mjs";
import "./checks/server.mjs";
import "./checks/answers.mjs";
import "./checks/conversations.mjs";
import "./checks/failures.mjs";
import "./checks/use.mjs";

const [base, folder = "screenshots", only = ""] = process.argv.slice(2);
if (!base) {
  console.error("usage: node check.mjs URL [FOLDER [NAME]]");
  process.exit(2);
}
await mkdir(folder, { recursive: true });
const proxy = await startProxy(base);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP aotron.test 127.0.0.1",
  ],
});
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Errors of the page that no check expects: scripts that fail, and what the Content-Security-Policy stopped. */
function watch(page, url, problems) {
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => {
    if (message.type() !== "error" && message.type() !== "warning") return;
    // The browser notes every response that is not a success, which some checks ask for.
    if (!message.text().startsWith("Failed to load resource")) problems.push(message.text());
  });
  page.on("request", (request) => {
    const { origin, protocol } = new URL(request.url());
    if (protocol.startsWith("http") && `${origin}/` !== url) problems.push(`the page asked ${request.url()}`);
  });
}

/** What a check works with: a fresh browser profile with the page open. */
async function open(options = {}) {
  const problems = [];
  const { path = "", host, script, ...contextOptions } = options;
  const url = host ? proxy.url.replace("127.0.0.1", host) : proxy.url;
  const context = await browser.newContext({
    viewport: { width: 1200, height: 800 },
    permissions: ["clipboard-read", "clipboard-write"],
    reducedMotion: "no-preference",
    ...contextOptions,
  });
  context.setDefaultTimeout(8000);
  context.on("page", (page) => watch(page, url, problems));
  if (script) await context.addInitScript(script);
  const page = await context.newPage();
  await page.goto(url + path);
  const answers = page.locator(".message.assistant");
  const tools = {
    page,
    context,
    proxy,
    problems,
    answers,
    /** Sends a message and, unless told otherwise, waits for the end of its answer. */
    async send(text, { wait = true } = {}) {
      const before = await answers.count();
      await page.locator("#input").fill(text);
      await page.keyboard.press("Enter");
      await answers.nth(before).waitFor();
      if (wait) await tools.settled();
      return answers.nth(before);
    },
    settled: () => page.locator("#stop").waitFor({ state: "hidden" }),
    ready: () => page.waitForFunction(() => document.title.includes("·")),
    shot: (name) => page.screenshot({ path: `${folder}/${name}.png` }),
    /** Problems of accessibility that axe-core finds. */
    async accessible() {
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => globalThis.axe.run());
      const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ target }) => target).join(", ")}`);
      assert.deepEqual(found, []);
    },
  };
  return tools;
}

let failed = 0;
for (const { name, options = {}, run } of checks.filter((check) => check.name.includes(only))) {
  proxy.requests.length = 0;
  proxy.override.clear();
  let tools;
  try {
    options.before?.(proxy);
    const { before, ...contextOptions } = options;
    tools = await open(contextOptions);
    if (!before) await tools.ready();
    await run(tools);
    assert.deepEqual(tools.problems, [], "errors in the browser");
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n        ${String(error.stack).replace(/\n/g, "\n        ")}`);
    await tools?.page.screenshot({ path: `${folder}/failed-${name.replace(/\W+/g, "-")}.png` }).catch(() => {});
  } finally {
    await tools?.context.close();
  }
}
await browser.close();
proxy.close();
console.log(failed ? `${failed} failed` : "all passed");
process.exit(failed ? 1 : 0);
