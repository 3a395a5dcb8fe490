// What goes wrong, and what the page says.

import assert from "node:assert/strict";
import { check, focused, text } from "./check.mjs";

check(
  "an error in the middle keeps the text and offers another try",
  async ({ page, answers, send, shot, accessible }) => {
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
  },
);

check("refusals say what the server said", async ({ answers, send, page, proxy }) => {
  await send("script:refused");
  await answers.first().getByText("The prompt has 5000 tokens; the model takes 4096.").waitFor();
  await send("script:failed");
  await answers.nth(1).getByText("The server answered 502 Bad Gateway.").waitFor();
  // Answers without text are not sent, and the roles alternate.
  assert.deepEqual(proxy.requests[1].body.messages, [{ role: "user", content: "script:refused\n\nscript:failed" }]);
  assert.deepEqual(
    proxy.requests[1].body.messages.map(({ role }) => role),
    ["user"],
  );
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

check(
  "an API key is asked for and kept for the tab",
  async ({ page, proxy, answers, send, settled, accessible, shot }) => {
    await send("script:key");
    await answers.first().getByText("The server asks for an API key.").waitFor();
    await answers.first().getByRole("button", { name: "Enter an API key" }).click();
    await accessible();
    await shot("key-light");
    await page.locator("#key-input").fill("two words");
    await page.keyboard.press("Enter");
    await page.getByText("A key has only ASCII letters").waitFor();
    await page.locator("#key-input").fill("right-key");
    await page.keyboard.press("Enter");
    await page.waitForFunction(
      () => document.querySelector(".message.assistant .body")?.textContent === "The key fits.",
    );
    await settled();
    assert.equal(proxy.requests[1].headers.authorization, "Bearer right-key");
    assert.equal(await page.evaluate(() => JSON.stringify(localStorage).includes("right-key")), false);
    assert.equal(await page.evaluate(() => Object.values(sessionStorage).includes("right-key")), true);
    await page.keyboard.press("Alt+Comma");
    await page.getByRole("button", { name: "Forget" }).click();
    assert.equal(await page.evaluate(() => sessionStorage.length), 0);
  },
);

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
    await page.locator("#key").getByText("The server asks for an API key.").waitFor();
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
    await page.locator(".example").nth(1).click();
    assert.equal(await page.locator("#input").inputValue(), "What is 17 + 25?");
    await accessible();
    await shot("loading-light");
    await page.locator("#banner").getByRole("button", { name: "Try again" }).click();
    await ready();
    await page.locator("#banner").waitFor({ state: "hidden" });
  },
);

check(
  "a model that cannot be loaded is named",
  {
    before: (proxy) =>
      proxy.override.set("/ready", (_, response) => {
        response.writeHead(503, { "Content-Type": "application/json" });
        response.end(JSON.stringify({ ready: false, models: [{ name: "big", state: "failed" }] }));
      }),
  },
  async ({ page }) => {
    await page.getByText("The model big cannot be loaded. The server’s log has the reason.").waitFor();
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

check(
  "one of several models is chosen, and kept",
  {
    before: (proxy) =>
      proxy.override.set("/v1/models", (_, response) => {
        response.writeHead(200, { "Content-Type": "application/json" });
        response.end(JSON.stringify({ data: [{ id: "first" }, { id: "second" }] }));
      }),
  },
  async ({ page, proxy, ready, send, accessible }) => {
    await ready();
    await page.getByLabel("Model", { exact: true }).selectOption("second");
    await page.reload();
    await ready();
    await accessible();
    await send("script:paced");
    assert.equal(proxy.requests[0].body.model, "second");
    assert.equal(await page.locator("#context").innerText(), "");
  },
);

check("the page works below a path", { path: "below/" }, async ({ page, answers, send }) => {
  assert.equal(new URL(page.url()).pathname, "/below/");
  await send("script:bytes");
  assert.equal(await text(answers.first()), "Grüße 你好 👋");
});

const withoutDatabase = () =>
  (IDBFactory.prototype.open = () => {
    throw new DOMException("closed", "SecurityError");
  });
check(
  "without a database the page works until it is closed",
  { script: withoutDatabase },
  async ({ page, answers, send }) => {
    await page.locator("#no-conversations", { hasText: "This browser keeps no conversations" }).waitFor();
    await send("script:paced");
    await page.keyboard.press("Alt+n");
    await send("script:bytes");
    await page.locator(".conversation", { hasText: "script:paced" }).click();
    await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("tick"));
    assert.equal(await answers.count(), 1);
  },
);

const withFullDatabase = () =>
  (IDBObjectStore.prototype.put = () => {
    throw new DOMException("no space left", "QuotaExceededError");
  });
check("a conversation that cannot be kept is said", { script: withFullDatabase }, async ({ page, answers, send }) => {
  await send("script:paced");
  await page.getByText("The browser cannot keep this conversation (no space left).").waitFor();
  assert.match(await text(answers.first()), /^tick/);
});
