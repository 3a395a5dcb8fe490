// The checks, each with a fresh profile. What the server must say itself comes from the server; the rest is scripted.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { HOSTILE, MARKDOWN, TOKENS } from "./scripted.mjs";

export const checks = [];

/** @param {string} name @param {any} options of the browser's context, or the check */
function check(name, options, run) {
  checks.push(run ? { name, options, run } : { name, run: options });
}

const PHONE = { viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true, deviceScaleFactor: 2 };
const text = (locator) => locator.locator(".body").innerText();
const focused = (page) => page.evaluate(() => document.activeElement?.getAttribute("aria-label") || document.activeElement?.id);

// The server.

check("headers keep scripts of others out", async ({ page, proxy }) => {
  const response = await page.request.get(proxy.url);
  const policy = response.headers()["content-security-policy"] ?? "";
  assert.match(policy, /default-src 'self'|default-src 'none'/);
  assert.doesNotMatch(policy, /unsafe|\*|https?:/);
  assert.match(policy, /frame-ancestors 'none'/);
  assert.match(policy, /base-uri 'none'/);
  assert.equal(response.headers()["x-content-type-options"], "nosniff");
  assert.match(response.headers()["content-type"], /text\/html; *charset=utf-8/i);
});

check("every file is served with its type", async ({ page, proxy }) => {
  const html = await (await page.request.get(proxy.url)).text();
  const files = [...html.matchAll(/(?:href|src)="(page\/[^"]+)"/g)].map((match) => match[1]);
  assert.ok(files.length > 10);
  const types = { js: /^text\/javascript/, css: /^text\/css/, svg: /^image\/svg\+xml/ };
  for (const file of files) {
    const response = await page.request.get(proxy.url + file);
    assert.equal(response.status(), 200, file);
    assert.match(response.headers()["content-type"], types[file.split(".").pop()], file);
  }
});

check("the empty page names the model and offers three examples", async ({ page, proxy, shot, accessible }) => {
  const { data } = await (await page.request.get(`${proxy.url}v1/models`)).json();
  const { version } = await (await page.request.get(`${proxy.url}version`)).json();
  assert.ok((await page.title()).includes(data[0].id));
  assert.equal(await page.locator("#empty-title").innerText(), data[0].id);
  assert.equal(await page.locator(".example").count(), 3);
  await page.waitForFunction((text) => document.querySelector("#about")?.textContent === text, `aotron ${version}`);
  assert.equal(await focused(page), "input");
  await accessible();
  await shot("empty-light");
});

check("an example is answered by the model, with counters", async ({ page, proxy, answers, settled, shot }) => {
  const { data } = await (await page.request.get(`${proxy.url}v1/models`)).json();
  await page.locator(".example").first().click();
  await answers.first().waitFor();
  await settled();
  assert.notEqual((await text(answers.first())).trim(), "");
  const { body } = proxy.requests[0];
  assert.equal(body.model, data[0].id);
  assert.equal(body.stream, true);
  assert.deepEqual(body.stream_options, { include_usage: true });
  // Nothing is sent that nobody set.
  assert.deepEqual(Object.keys(body).sort(), ["messages", "model", "stream", "stream_options"]);
  assert.match(await answers.first().locator(".counters").innerText(), /\d prompt tokens?.* · first token after .* · \d+ tokens?/);
  if (data[0].max_model_len) assert.match(await page.locator("#context").innerText(), /^\d+ of [\d,]+ tokens$/);
  await page.waitForFunction(() => document.title.startsWith("What is the capital of France? · "));
  await shot("answer-light");
});

check("the server gives probabilities of its tokens", async ({ page, answers, send }) => {
  await page.getByLabel("Token probabilities", { exact: true }).click();
  await send("What is the capital of France?");
  const tokens = answers.first().locator(".token");
  assert.ok((await tokens.count()) > 0);
  await tokens.first().hover();
  await page.locator("#token-tip").waitFor();
  assert.ok((await page.locator("#token-tip tr").count()) >= 5);
  // The tokens together are the text, apart from spaces at the ends.
  const plain = (await tokens.allTextContents()).join("").replaceAll("·", "").trim();
  await page.getByLabel("Token probabilities", { exact: true }).click();
  assert.equal((await text(answers.first())).trim(), plain);
});

check("a second message is sent with the first", async ({ proxy, answers, send }) => {
  await send("What is 17 + 25?");
  const first = (await text(answers.first())).trim();
  await send("What is the capital of France?");
  const { messages } = proxy.requests[1].body;
  assert.deepEqual(messages.map(({ role }) => role), ["user", "assistant", "user"]);
  assert.equal(messages[1].content.trim(), first);
});

check("the server's limit of tokens is said", async ({ page, answers, send }) => {
  await page.keyboard.press("Alt+Comma");
  await page.getByLabel("Max tokens", { exact: true }).fill("1");
  await page.keyboard.press("Escape");
  await send("Count from one to a hundred");
  await answers.first().getByText("The answer reached its limit of 1 token.").waitFor();
});

// Streaming.

check("text is shown while it arrives, and Esc stops it", async ({ page, answers, send, shot }) => {
  await send("script:slow", { wait: false });
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("word10"));
  assert.equal(await answers.first().getAttribute("aria-busy"), "true");
  assert.equal(await page.locator("#announcements").innerText(), "", "tokens are not read out");
  await shot("streaming");
  await page.keyboard.press("Escape");
  await answers.first().getByText("Stopped.").waitFor();
  const before = await text(answers.first());
  await page.waitForTimeout(200);
  assert.equal(await text(answers.first()), before);
  assert.match(await answers.first().locator(".counters").innerText(), /about \d+ tokens at [\d.]+ tokens\/s/);
});

check("the stop button stops before the first token", async ({ page, answers, send }) => {
  await send("script:silent", { wait: false });
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  await answers.first().getByText("Stopped before the first token.").waitFor();
  assert.equal(await focused(page), "input");
});

check("counters come from usage and the page's clock", async ({ answers, send }) => {
  await send("script:paced");
  const counters = await answers.first().locator(".counters").innerText();
  const [, first, speed] = /^123 prompt tokens, 100 cached · first token after (\d+) ms · 21 tokens at ([\d.]+) tokens\/s$/.exec(counters) ?? [];
  assert.ok(first >= 190 && first < 2000, counters);
  assert.ok(speed > 5 && speed < 41, counters);
});

check("the stream may be cut anywhere", async ({ answers, send }) => {
  await send("script:bytes");
  assert.equal(await text(answers.first()), "Grüße 你好 👋");
});

check("finished answers are read out once", async ({ page, send }) => {
  await page.evaluate(() => {
    globalThis.said = [];
    const status = document.querySelector("#announcements");
    new MutationObserver(() => status.textContent && globalThis.said.push(status.textContent)).observe(status, { childList: true });
  });
  await send("script:paced");
  await page.waitForTimeout(200);
  assert.deepEqual(await page.evaluate(() => globalThis.said), ["tick ".repeat(21).trim()]);
});

check("the page follows a long answer until the reader scrolls", async ({ page, send }) => {
  const distance = () => page.evaluate(() => {
    const { scrollTop, clientHeight, scrollHeight } = document.querySelector("#scroller");
    return scrollHeight - clientHeight - scrollTop;
  });
  await send("script:long");
  assert.ok((await distance()) < 2);
  await page.locator("#scroller").hover();
  await page.mouse.wheel(0, -600);
  await page.getByRole("button", { name: "Jump to the end" }).click();
  assert.ok((await distance()) < 2);
});

check("an answer goes on while another conversation is open", async ({ page, answers, send }) => {
  await send("script:slow", { wait: false });
  await page.keyboard.press("Alt+n");
  await send("script:paced");
  assert.equal(await page.locator(".live-dot").count(), 1);
  await page.locator(".conversation", { hasText: "script:slow" }).click();
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("word30"));
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  await answers.first().getByText("Stopped.").waitFor();
});

// Branches.

check("another answer is a branch", async ({ page, proxy, answers, send, settled, shot, accessible }) => {
  await send("script:paced");
  await answers.first().getByLabel("Another answer").click();
  await settled();
  assert.equal(await answers.count(), 1);
  await answers.getByText("2 / 2").waitFor();
  assert.deepEqual(proxy.requests[1].body.messages, proxy.requests[0].body.messages);
  await answers.getByLabel("Previous branch").click();
  await answers.getByText("1 / 2").waitFor();
  assert.equal(await focused(page), "Previous branch");
  await page.keyboard.press("Alt+r");
  await settled();
  await answers.getByText("3 / 3").waitFor();
  await accessible();
  await shot("branches");
});

check("an edited message is a branch, and each branch keeps what follows", async ({ page, proxy, answers, send, settled }) => {
  await send("script:length");
  await send("script:bytes");
  const users = page.locator(".message.user");
  await users.first().hover();
  await users.first().getByLabel("Edit message").click();
  await page.keyboard.press("Control+A");
  await page.keyboard.type("script:markdown");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll(".message").length === 2);
  await settled();
  assert.deepEqual(proxy.requests[2].body.messages, [{ role: "user", content: "script:markdown" }]);
  await users.first().getByText("2 / 2").waitFor();
  await users.first().getByLabel("Previous branch").click();
  assert.equal(await answers.count(), 2);
  assert.equal(await text(answers.nth(1)), "Grüße 你好 👋");
  await page.reload();
  await answers.nth(1).waitFor();
  await users.first().getByText("1 / 2").waitFor();
});

check("an answer can be edited, and Esc leaves it as it was", async ({ page, proxy, answers, send }) => {
  await send("script:bytes");
  await answers.first().getByLabel("Edit answer").click();
  await page.keyboard.press("Escape");
  assert.equal(await text(answers.first()), "Grüße 你好 👋");
  assert.equal(await focused(page), "Edit answer");
  await answers.first().getByLabel("Edit answer").click();
  await page.keyboard.press("Control+A");
  await page.keyboard.type("Mine");
  await page.getByRole("button", { name: "Save" }).click();
  assert.equal(await text(answers.first()), "Mine");
  await answers.first().getByText("2 / 2").waitFor();
  await send("script:paced");
  assert.equal(proxy.requests[1].body.messages[1].content, "Mine");
});

// Settings.

check("settings and the system message are sent, and kept", async ({ page, proxy, send, shot, accessible, ready }) => {
  await page.locator("#show-settings").click();
  const values = {
    "System message": "Answer in capitals.",
    Temperature: "0.7",
    "Top-p": "0.9",
    "Top-k": "40",
    "Min-p": "0.05",
    Seed: "7",
    "Max tokens": "64",
    "Stop strings": "END\n\\n\\n",
    Repetition: "1.1",
    Presence: "0.5",
    Frequency: "-0.5",
  };
  for (const [label, value] of Object.entries(values)) await page.locator("#settings").getByLabel(label).fill(value);
  await accessible();
  await shot("settings-light");
  await page.keyboard.press("Escape");
  assert.match(await page.locator("#in-use").innerText(), /^system message · temperature 0.7 · top-p 0.9 · /);
  await send("script:paced");
  const { messages, model, stream, stream_options, ...settings } = proxy.requests[0].body;
  assert.deepEqual(messages, [{ role: "system", content: "Answer in capitals." }, { role: "user", content: "script:paced" }]);
  assert.deepEqual(settings, {
    temperature: 0.7, top_p: 0.9, top_k: 40, min_p: 0.05, seed: 7, max_tokens: 64, stop: ["END", "\n\n"],
    repetition_penalty: 1.1, presence_penalty: 0.5, frequency_penalty: -0.5,
  });
  await page.reload();
  await ready();
  await page.keyboard.press("Alt+Comma");
  for (const [label, value] of Object.entries(values)) assert.equal(await page.locator("#settings").getByLabel(label).inputValue(), value);
  await page.getByRole("button", { name: "Use the server’s defaults" }).click();
  assert.equal(await page.getByLabel("Temperature").inputValue(), "");
  await page.keyboard.press("Escape");
  await page.keyboard.press("Alt+n");
  await send("script:paced");
  // The system message is the other conversation's.
  assert.deepEqual(Object.keys(proxy.requests[1].body).sort(), ["messages", "model", "stream", "stream_options"]);
  assert.equal(proxy.requests[1].body.messages.length, 1);
});

check("a setting that is not allowed is explained and not sent", async ({ page, proxy, send }) => {
  await page.keyboard.press("Alt+Comma");
  for (const [label, wrong] of [["Top-p", "1.5"], ["Top-k", "2.5"], ["Temperature", "warm"]]) {
    await page.locator("#settings").getByLabel(label).fill(wrong);
    assert.equal(await page.locator("#settings").getByLabel(label).getAttribute("aria-invalid"), "true");
  }
  await page.getByText("Not used: it must be a number from 0 to 1.").waitFor();
  await page.keyboard.press("Escape");
  await send("script:paced");
  assert.deepEqual(Object.keys(proxy.requests[0].body).sort(), ["messages", "model", "stream", "stream_options"]);
});

// Probabilities.

check("tokens show their alternatives to the mouse and the keyboard", async ({ page, proxy, answers, send, shot, accessible }) => {
  await page.keyboard.press("Alt+p");
  await send("script:tokens");
  assert.equal(proxy.requests[0].body.logprobs, true);
  assert.equal(proxy.requests[0].body.top_logprobs, 5);
  const tokens = answers.first().locator(".token");
  assert.equal(await tokens.count(), TOKENS.length + 2);
  assert.deepEqual(await tokens.evaluateAll((all) => all.map((token) => Number(token.dataset.p))), [0, 1, 2, 3, 4, 5, 0, 0, 2, 2]);
  // A character in two pieces stands in the second.
  assert.deepEqual((await tokens.allTextContents()).slice(-2), ["·", "é"]);
  const tip = page.locator("#token-tip");
  await tokens.nth(5).hover();
  assert.deepEqual(await tip.locator("tr").allInnerTexts().then((rows) => rows.map((row) => row.trim().split(/\s+/).slice(0, 2).join(" "))), ["␣Paris 81.9", "␣the 11.1", "␣surely 3.3"]);
  assert.equal(await tip.locator(".chosen .alternative").innerText(), "␣surely");
  await accessible();
  await shot("hover-light");
  await page.mouse.move(0, 0);
  await tip.waitFor({ state: "hidden" });
  await tokens.first().focus();
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), " of");
  await tip.waitFor();
  assert.match(await focused(page), /^␣of, 67.0 %; instead of ␣in 27.3 %$/);
  await page.keyboard.press("End");
  assert.match(await tip.innerText(), /Part of a character: bytes A9/);
  await page.keyboard.press("Escape");
  await tip.waitFor({ state: "hidden" });
  // One stop of the Tab key for all of them.
  assert.equal(await answers.first().locator('.token[tabindex="0"]').count(), 1);
  await page.keyboard.press("Alt+p");
  assert.equal((await text(answers.first())).trim(), "The capital of France is surely Paris.\né");
});

// Text.

check("Markdown is shown as what it means", async ({ page, answers, send, shot }) => {
  await send("script:markdown");
  const body = answers.first().locator(".body");
  const count = (selector) => body.locator(selector).count();
  assert.equal(await body.locator("h3").innerText(), "A heading");
  assert.deepEqual(await body.locator("em").allInnerTexts(), ["emphasis", "both", "item"]);
  assert.deepEqual(await body.locator("strong").allInnerTexts(), ["strong text", "both", "b"]);
  assert.equal(await body.locator("del").innerText(), "struck");
  assert.equal(await body.locator("p code").innerText(), "inline code");
  assert.ok((await body.innerText()).includes("snake_case_words"));
  assert.equal(await count("ol > li"), 3);
  assert.deepEqual(await body.locator("ol > li > ul > li").allInnerTexts(), ["nested item", "another"]);
  assert.equal(await count(".task input:checked"), 1);
  assert.deepEqual(await body.locator("tbody tr").first().locator("td").allInnerTexts(), ["one | bar", "1", "a"]);
  assert.equal(await count("td.align-right"), 2);
  assert.equal(await body.locator("blockquote").innerText(), "A quote\nof two lines");
  assert.equal(await count("hr"), 1);
  const links = await body.locator("a").evaluateAll((all) => all.map(({ href, rel, target }) => ({ href, rel, target })));
  assert.deepEqual(links.map(({ href }) => href), ["https://example.com/a_(b)", "https://example.com/auto", "https://example.com/bare", "https://example.com/picture.png"]);
  for (const { rel, target } of links) assert.ok(rel.includes("noopener") && target === "_blank");
  assert.equal(await body.locator("pre code").innerText(), MARKDOWN.split("```rust\n")[1].split("\n```")[0]);
  assert.ok((await count(".code-keyword")) >= 2 && (await count(".code-comment")) === 1 && (await count(".code-string")) === 1);
  await page.evaluate(() => document.querySelector("#scroller").scrollTo(0, 0));
  await shot("markdown-light");
  await page.locator("#theme").click();
  await shot("markdown-dark");
});

check("code and answers are copied as they were written", async ({ page, answers, send }) => {
  await send("script:markdown");
  const clipboard = () => page.evaluate(() => navigator.clipboard.readText());
  await answers.first().getByLabel("Copy code").click();
  await page.waitForTimeout(100);
  assert.equal(await clipboard(), MARKDOWN.split("```rust\n")[1].split("\n```")[0]);
  await answers.first().getByLabel("Copy answer").click();
  await page.waitForTimeout(100);
  assert.equal(await clipboard(), MARKDOWN);
  await page.evaluate(() => navigator.clipboard.writeText(""));
  await page.keyboard.press("Alt+c");
  await page.waitForTimeout(100);
  assert.equal(await clipboard(), MARKDOWN);
});

check("nothing in an answer becomes active", async ({ page, answers, send }) => {
  await send("script:hostile");
  await page.waitForTimeout(200);
  assert.equal(await page.evaluate(() => globalThis.hacked), undefined);
  const body = answers.first().locator(".body");
  assert.equal(await body.locator("img, script, iframe, style, svg[onload], [onerror], [onmouseover]").count(), 0);
  const links = await body.locator("a").evaluateAll((all) => all.map(({ protocol }) => protocol));
  assert.ok(links.every((protocol) => protocol === "https:"), String(links));
  assert.ok((await body.innerText()).includes('<img src=x onerror="window.hacked = 1">'));
  assert.ok((await body.innerText()).includes("[click](javascript:window.hacked=1)"));
  assert.ok(HOSTILE.length > 0);
});

check("random text makes only known elements, in little time", async ({ page }) => {
  const slowest = await page.evaluate(async () => {
    const { showMarkdown } = await import(new URL("page/markdown.js", document.baseURI).href);
    const known = new Set("P H3 H4 H5 H6 HR BLOCKQUOTE DIV SPAN BUTTON PRE CODE UL OL LI INPUT TABLE THEAD TBODY TR TH TD A BR EM STRONG DEL svg use".split(" "));
    const parts = ["*", "**", "_", "~~", "`", "```", "\n", "\n\n", " ", "    ", "[", "](", ")", "https://a.b/", "<br>", "<", ">", "> ", "- ", "1. ", "# ", "|", "|---|", "---", "\\", "a", "word ", "é", "👋", "[ ] ", "===", "!", "\t", "\r"];
    let seed = 1;
    const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
    let worst = 0;
    const measure = (text) => {
      const box = document.createElement("div");
      const start = performance.now();
      showMarkdown(box, text);
      worst = Math.max(worst, performance.now() - start);
      for (const node of box.querySelectorAll("*")) {
        if (!known.has(node.tagName)) throw new Error(`<${node.tagName}> from ${JSON.stringify(text)}`);
        if (node.tagName === "A" && !/^(https?|mailto):/.test(node.href)) throw new Error(node.href);
      }
      return box;
    };
    for (let i = 0; i < 1500; i += 1) {
      const text = Array.from({ length: 1 + random(60) }, () => parts[random(parts.length)]).join("");
      const whole = measure(text).innerHTML;
      // Growing piece by piece ends at the same.
      const grown = document.createElement("div");
      for (let end = 0; end <= text.length; end += 9) showMarkdown(grown, text.slice(0, end));
      showMarkdown(grown, text);
      if (grown.innerHTML !== whole) throw new Error(`growing differs for ${JSON.stringify(text)}`);
    }
    worst = 0;
    for (const part of parts) measure(part.repeat(20000 / part.length));
    for (const pair of ["*a_", "[a](", "![a](b \"", "`a``b", "a**b_c ", "- \n", "> - ", "|a", "<a", "[[a]("]) measure(pair.repeat(20000 / pair.length));
    return worst;
  });
  assert.ok(slowest < 1500, `20,000 characters took ${slowest} ms`);
});

// Conversations.

check("conversations are kept, renamed and deleted", async ({ page, answers, send, shot, accessible }) => {
  await send("script:bytes");
  await page.keyboard.press("Alt+n");
  await send("script:paced");
  const items = page.locator(".conversation");
  assert.deepEqual(await items.allInnerTexts(), ["script:paced", "script:bytes"]);
  await page.reload();
  await answers.first().waitFor();
  assert.match(await text(answers.first()), /^tick/);
  await items.nth(1).click();
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("Grüße"));
  await page.goBack();
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("tick"));

  await page.getByLabel("Actions for “script:bytes”").click();
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Rename");
  await accessible();
  await shot("menu-light");
  await page.keyboard.press("Enter");
  await page.keyboard.type("Greetings");
  await page.keyboard.press("Enter");
  await items.filter({ hasText: "Greetings" }).waitFor();

  await page.getByLabel("Actions for “Greetings”").click();
  await page.keyboard.press("ArrowUp");
  await page.keyboard.press("Enter");
  await page.getByText("Delete “Greetings”?").waitFor();
  await accessible();
  await page.keyboard.press("Escape");
  assert.equal(await items.count(), 2);
  await page.getByLabel("Actions for “Greetings”").click();
  await page.getByRole("menuitem", { name: "Delete" }).click();
  await page.locator("#confirm-yes").click();
  await page.waitForFunction(() => document.querySelectorAll(".conversation").length === 1);
  await page.reload();
  await answers.first().waitFor();
  assert.deepEqual(await items.allInnerTexts(), ["script:paced"]);
});

check("an export can be imported elsewhere, once", async ({ page, context, answers, send }) => {
  await page.keyboard.press("Alt+p");
  await send("script:tokens");
  await page.keyboard.press("Alt+r");
  await answers.getByText("2 / 2").waitFor();
  await page.keyboard.press("Alt+n");
  await send("script:paced");
  await page.keyboard.press("Alt+Comma");
  const download = page.waitForEvent("download");
  await page.getByRole("button", { name: "Export all" }).click();
  const file = await (await download).path();
  const exported = JSON.parse(await readFile(file, "utf8"));
  assert.equal(exported.conversations.length, 2);

  const import_ = async (given) => {
    await page.locator("#import-result").evaluate((node) => (node.textContent = ""));
    await page.locator("#import-file").setInputFiles(given);
    await page.waitForFunction(() => document.querySelector("#import-result").textContent !== "");
    return page.locator("#import-result").innerText();
  };
  assert.equal(await import_(file), "Imported 0 conversations; 2 of the file’s were here already.");
  await page.getByRole("button", { name: "Delete all" }).click();
  await page.locator("#confirm-yes").click();
  await page.waitForFunction(() => document.querySelectorAll(".conversation").length === 0);
  assert.equal(await import_(file), "Imported 2 conversations.");
  await page.keyboard.press("Escape");
  await page.locator(".conversation", { hasText: "script:tokens" }).click();
  await answers.getByText("2 / 2").waitFor();
  assert.equal(await answers.locator(".token").count(), TOKENS.length + 2);

  const asFile = (value) => ({ name: "x.json", mimeType: "application/json", buffer: Buffer.from(typeof value === "string" ? value : JSON.stringify(value)) });
  await page.keyboard.press("Alt+Comma");
  const change = (edit) => {
    const copy = structuredClone(exported);
    edit(copy);
    return asFile(copy);
  };
  assert.match(await import_(asFile("{")), /^The file is not JSON/);
  assert.match(await import_(asFile([])), /not an export of this page/);
  assert.match(await import_(change((file) => (file.version = 9))), /version 9/);
  assert.match(await import_(change((file) => (file.conversations[0].messages[0].role = "system"))), /conversations\[0\]\.messages\[0\]\.role/);
  assert.match(await import_(change((file) => file.conversations[0].messages.reverse())), /comes before its parent/);
  assert.match(await import_(change((file) => (file.conversations[0].messages[1].answer.tokens = [1]))), /tokens\[0\] is not an object/);
  assert.equal((await context.pages()).length, 1);
});

check("one conversation is exported by itself", async ({ page, send }) => {
  await send("script:paced");
  await page.getByLabel("Actions for “script:paced”").click();
  const download = page.waitForEvent("download");
  await page.getByRole("menuitem", { name: "Export" }).click();
  assert.equal((await download).suggestedFilename(), "script-paced.json");
});

check("another tab sees what changed", async ({ page, context, proxy, send }) => {
  const other = await context.newPage();
  await other.goto(proxy.url);
  await send("script:paced");
  await other.locator(".conversation", { hasText: "script:paced" }).click();
  await other.locator(".message.assistant").first().waitFor();
  await page.bringToFront();
  await send("script:bytes");
  await other.waitForFunction(() => document.querySelectorAll(".message").length === 4);
});

check("an answer that the page was closed on is kept as far as it came", async ({ page, answers, send }) => {
  await send("script:slow", { wait: false });
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("word40"));
  await page.reload();
  await answers.first().getByText("Interrupted, as the page was closed.").waitFor();
  assert.match(await text(answers.first()), /^word1 word2 /);
});

// Errors.

check("an error in the middle keeps the text and offers another try", async ({ page, answers, send, shot, accessible }) => {
  for (const [name, message] of [
    ["failing", "The GPU ran out of memory."],
    ["broken", "The connection ended before the answer did."],
    ["ended", "The connection ended before the answer did."],
  ]) {
    await page.keyboard.press("Alt+n");
    await send(`script:${name}`);
    await answers.first().getByText(message).waitFor();
    assert.equal(await text(answers.first()), "This answer begins");
    await answers.first().getByRole("button", { name: "Try again" }).waitFor();
  }
  await accessible();
  await shot("error-light");
});

check("refusals say what the server said", async ({ answers, send, page, proxy }) => {
  await send("script:refused");
  await answers.first().getByText("The prompt has 5000 tokens; the model takes 4096.").waitFor();
  await send("script:failed");
  await answers.nth(1).getByText("The server answered 502 Bad Gateway.").waitFor();
  // Answers without text are not sent, and the roles alternate.
  assert.deepEqual(proxy.requests[1].body.messages, [{ role: "user", content: "script:refused\n\nscript:failed" }]);
  assert.deepEqual(proxy.requests[1].body.messages.map(({ role }) => role), ["user"]);
  await page.locator(".failure").first().waitFor();
});

check("a busy server is asked again when it wants to be", async ({ page, proxy, answers, send, settled, shot }) => {
  await send("script:busy");
  await answers.first().getByText("64 requests are waiting.").waitFor();
  const retry = answers.first().locator(".failure button");
  assert.match(await retry.innerText(), /^Try again in \d seconds?$/);
  await shot("busy-light");
  // Playwright's own click would wait until the button may be pressed.
  await retry.dispatchEvent("click");
  assert.match(await retry.innerText(), /^Try again in/, "the wait is kept");
  assert.equal(proxy.requests.length, 1);
  await answers.first().getByRole("button", { name: "Try again", exact: true }).click();
  await settled();
  assert.equal(await text(answers.first()), "There was room.");
  // The refused answer left no branch.
  assert.equal(await page.locator(".branches").count(), 0);
});

check("an unavailable server is said to be", async ({ answers, send }) => {
  await send("script:unavailable");
  await answers.first().getByText("The server is shutting down.").waitFor();
  assert.match(await answers.first().locator(".failure button").innerText(), /^Try again in (29|30) seconds$/);
});

check("an API key is asked for and kept for the tab", async ({ page, proxy, answers, send, settled, accessible, shot }) => {
  await send("script:key");
  await answers.first().getByText("The API key is missing or wrong.").waitFor();
  await answers.first().getByRole("button", { name: "Enter an API key" }).click();
  await accessible();
  await shot("key-light");
  await page.locator("#key-input").fill("two words");
  await page.keyboard.press("Enter");
  await page.getByText("A key has only ASCII letters").waitFor();
  await page.locator("#key-input").fill("right-key");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent === "The key fits.");
  await settled();
  assert.equal(proxy.requests[1].headers.authorization, "Bearer right-key");
  assert.equal(await page.evaluate(() => JSON.stringify(localStorage).includes("right-key")), false);
  assert.equal(await page.evaluate(() => Object.values(sessionStorage).includes("right-key")), true);
  await page.keyboard.press("Alt+Comma");
  await page.getByRole("button", { name: "Forget" }).click();
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
});

check(
  "a server that wants a key from the start is asked with one",
  {
    before: (proxy) =>
      proxy.override.set("/v1/models", (request, response) => {
        if (request.headers.authorization === "Bearer right-key") return false;
        response.writeHead(401, { "Content-Type": "application/json" });
        response.end(JSON.stringify({ error: { message: "An API key is needed." } }));
      }),
  },
  async ({ page, ready }) => {
    await page.locator("#key").getByText("An API key is needed.").waitFor();
    await page.locator("#key-input").fill("right-key");
    await page.keyboard.press("Enter");
    await ready();
    await page.locator("#banner").waitFor({ state: "hidden" });
  },
);

check(
  "the page waits while the model loads",
  {
    before: (proxy) => {
      let left = 2;
      proxy.override.set("/ready", (_, response) => {
        if (left-- <= 0) return false;
        response.writeHead(503, { "Content-Type": "application/json" });
        response.end(JSON.stringify({ status: "loading" }));
      });
    },
  },
  async ({ page, ready, shot, accessible }) => {
    await page.getByText("The model is loading.").waitFor();
    assert.equal(await page.locator("#send").getAttribute("aria-disabled"), "true");
    await accessible();
    await shot("loading-light");
    await page.locator("#banner").getByRole("button", { name: "Try again" }).click();
    await ready();
    await page.locator("#banner").waitFor({ state: "hidden" });
  },
);

check(
  "the page finds a server that comes back",
  {
    before: (proxy) => {
      // Longer than the browser itself tries again.
      const end = Date.now() + 1500;
      proxy.override.set("/ready", (_, response) => (Date.now() < end ? void response.destroy() : false));
    },
  },
  async ({ page, ready }) => {
    await page.getByText("The server does not answer. Is it still running?").waitFor();
    await ready();
  },
);

check("the limits of length and context are said", async ({ page, answers, send, settled }) => {
  await send("script:length");
  await answers.first().getByText("The answer reached its limit of 200 tokens.").waitFor();
  await answers.first().getByRole("button", { name: "Change max tokens" }).click();
  assert.equal(await focused(page), "setting-max_tokens");
  await page.keyboard.press("Escape");
  await page.keyboard.press("Alt+n");
  await send("script:empty");
  await answers.first().getByText("The answer is empty.").waitFor();
  await settled();
});

// The keyboard, the appearance, the phone.

check("everything is reached by the keyboard", async ({ page, send, shot, accessible }) => {
  await send("script:paced");
  await page.locator(".skip").focus();
  const reached = ["Skip to the message box"];
  for (let i = 0; i < 25; i += 1) {
    await page.keyboard.press("Tab");
    const name = await page.evaluate(() => {
      const node = document.activeElement;
      return node === document.body ? "" : node.getAttribute("aria-label") || node.id || node.textContent.trim();
    });
    if (name === "") break;
    reached.push(name);
  }
  assert.deepEqual(reached.filter((name) => name !== "in-use" && name !== "Send"), [
    "Skip to the message box", "new", "script:paced", "Actions for “script:paced”", "Keyboard shortcuts",
    "Token probabilities", "Dark appearance", "Settings",
    "Copy message", "Edit message", "Copy answer", "Another answer", "Edit answer", "input",
  ]);
  await page.keyboard.press("Escape");
  assert.equal(await focused(page), "input");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("second line");
  assert.equal(await page.locator("#input").inputValue(), "\nsecond line");
  await page.locator("#input").fill("");
  await page.keyboard.press("Alt+ArrowUp");
  assert.equal(await focused(page), "Edit message");
  await page.keyboard.press("Escape");
  await page.keyboard.press("Alt+Slash");
  await page.getByRole("heading", { name: "Keyboard shortcuts" }).waitFor();
  await accessible();
  await shot("shortcuts-light");
});

check("unsent text waits in its conversation", async ({ page, send }) => {
  await send("script:paced");
  await page.locator("#input").fill("unsent");
  await page.keyboard.press("Alt+n");
  assert.equal(await page.locator("#input").inputValue(), "");
  await page.locator(".conversation").first().click();
  await page.waitForFunction(() => document.querySelector("#input").value === "unsent");
});

check("dark follows the system, and the choice is kept", { colorScheme: "dark" }, async ({ page, send, shot, accessible, ready }) => {
  const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const dark = await background();
  await shot("empty-dark");
  await send("script:markdown");
  await send("script:failing");
  await accessible();
  await shot("error-dark");
  await page.keyboard.press("Alt+p");
  await send("script:tokens");
  await accessible();
  await page.locator(".token").nth(4).hover();
  await shot("hover-dark");
  await page.locator("#theme").click();
  const light = await background();
  assert.notEqual(light, dark);
  await page.reload();
  await ready();
  assert.equal(await background(), light);
  await page.locator("#theme").click();
  assert.equal(await page.evaluate(() => localStorage.getItem("aotron.theme")), null);
  assert.equal(await background(), dark);
});

check("a phone's width is enough", PHONE, async ({ page, answers, send, shot, accessible }) => {
  const fits = async () => assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "the page scrolls sideways");
  await fits();
  await shot("phone-empty");
  const write = async (message) => {
    const before = await answers.count();
    await page.locator("#input").fill(message);
    await page.locator("#send").tap();
    await answers.nth(before).waitFor();
    await page.locator("#stop").waitFor({ state: "hidden" });
  };
  await write("script:markdown");
  await fits();
  await accessible();
  await shot("phone-answer");
  await page.locator("#probabilities").tap();
  await write("script:tokens");
  await page.locator(".token").nth(5).tap();
  await page.locator("#token-tip").waitFor();
  await fits();
  await shot("phone-hover");
  await page.getByLabel("Open the list of conversations").tap();
  await page.waitForTimeout(300);
  await fits();
  await shot("phone-list");
  await accessible();
  await page.keyboard.press("Escape");
  assert.equal(await focused(page), "Open the list of conversations");
  await page.locator("#show-settings").tap();
  await fits();
  await shot("phone-settings");
  await page.keyboard.press("Escape");
  // Enter is a new line here: the keyboard of a phone has no Shift+Enter.
  await page.locator("#input").fill("a");
  await page.locator("#input").press("Enter");
  assert.equal(await page.locator("#input").inputValue(), "a\n");
  await page.locator("#input").fill("");
  await page.getByLabel("Open the list of conversations").tap();
  await page.getByRole("button", { name: "New conversation" }).tap();
  await page.waitForFunction(() => document.querySelectorAll(".message").length === 0);
});
