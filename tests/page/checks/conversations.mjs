// Branches, settings, and what the browser keeps.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { TOKENS } from "../scripted.mjs";
import { check, focused, text } from "./check.mjs";

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

check(
  "an edited message is a branch, and each branch keeps what follows",
  async ({ page, proxy, answers, send, settled }) => {
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
  },
);

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
  assert.deepEqual(messages, [
    { role: "system", content: "Answer in capitals." },
    { role: "user", content: "script:paced" },
  ]);
  assert.deepEqual(settings, {
    temperature: 0.7,
    top_p: 0.9,
    top_k: 40,
    min_p: 0.05,
    seed: 7,
    max_tokens: 64,
    stop: ["END", "\n\n"],
    repetition_penalty: 1.1,
    presence_penalty: 0.5,
    frequency_penalty: -0.5,
  });
  await page.reload();
  await ready();
  await page.keyboard.press("Alt+Comma");
  for (const [label, value] of Object.entries(values))
    assert.equal(await page.locator("#settings").getByLabel(label).inputValue(), value);
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
  for (const [label, wrong] of [
    ["Top-p", "1.5"],
    ["Top-k", "2.5"],
    ["Temperature", "warm"],
  ]) {
    await page.locator("#settings").getByLabel(label).fill(wrong);
    assert.equal(await page.locator("#settings").getByLabel(label).getAttribute("aria-invalid"), "true");
  }
  await page.getByText("Not used: it must be a number from 0 to 1.").waitFor();
  await page.keyboard.press("Escape");
  await send("script:paced");
  assert.deepEqual(Object.keys(proxy.requests[0].body).sort(), ["messages", "model", "stream", "stream_options"]);
});

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

check("an export can be imported elsewhere, once", async ({ page, answers, send }) => {
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
  assert.equal(await answers.locator(".token").count(), TOKENS.length + 3);

  const asFile = (value) => ({
    name: "x.json",
    mimeType: "application/json",
    buffer: Buffer.from(typeof value === "string" ? value : JSON.stringify(value)),
  });
  await page.keyboard.press("Alt+Comma");
  const change = (edit) => {
    const copy = structuredClone(exported);
    edit(copy);
    return asFile(copy);
  };
  assert.match(await import_(asFile("{")), /^The file is not JSON/);
  assert.match(await import_(asFile([])), /not an export of this page/);
  assert.match(await import_(change((file) => (file.version = 9))), /version 9/);
  assert.match(
    await import_(change((file) => (file.conversations[0].messages[0].role = "system"))),
    /conversations\[0\]\.messages\[0\]\.role/,
  );
  assert.match(await import_(change((file) => file.conversations[0].messages.reverse())), /comes before its parent/);
  assert.match(
    await import_(change((file) => (file.conversations[0].messages[1].answer.tokens = [1]))),
    /tokens\[0\] is not an object/,
  );
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
  await answers.first().getByText("Incomplete: the page was closed").waitFor();
  assert.match(await text(answers.first()), /^word1 word2 /);
});
