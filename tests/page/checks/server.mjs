// What the server itself must do: nothing here is scripted.

import assert from "node:assert/strict";
import { check, counters, focused, text } from "./check.mjs";

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

check("the documentation shows every route and type", { path: "docs", before: () => {} }, async ({ page, proxy, shot, accessible }) => {
  const { paths, components } = await (await page.request.get(`${proxy.url}openapi.json`)).json();
  await page.locator(".route").first().waitFor();
  const operations = Object.values(paths).flatMap((methods) => Object.keys(methods));
  assert.equal(await page.locator("[id^=route-].route").count(), operations.length);
  assert.equal(await page.locator("[id^=schema-].route").count(), Object.keys(components.schemas).length);
  const broken = await page.evaluate(() =>
    [...document.querySelectorAll('a[href^="#"]')].filter((link) => !document.querySelector(link.getAttribute("href") ?? "")),
  );
  assert.equal(broken.length, 0);
  const chat = page.locator("#route-post_v1_chat_completions");
  assert.match(await chat.innerText(), /curl '.*\/v1\/chat\/completions'.*-d '\{"messages"/s);
  assert.match(await chat.locator("tr", { hasText: "temperature" }).innerText(), /number.*\(0 to 100\)/s);
  await page.getByRole("link", { name: "/v1/models", exact: true }).click();
  assert.match(page.url(), /#route-get_v1_models$/);
  await accessible();
  await shot("docs");
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
  assert.match(await counters(answers.first()), /\d prompt tokens?.* · first after .* · \d+ tokens?/);
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
  assert.deepEqual(
    messages.map(({ role }) => role),
    ["user", "assistant", "user"],
  );
  assert.equal(messages[1].content.trim(), first);
});

check("the server's limit of tokens is said", async ({ page, answers, send }) => {
  await page.keyboard.press("Alt+Comma");
  await page.getByLabel("Max tokens", { exact: true }).fill("1");
  await page.keyboard.press("Escape");
  await send("Count from one to a hundred");
  await answers.first().getByText("The answer reached its limit of 1 token.").waitFor();
});
