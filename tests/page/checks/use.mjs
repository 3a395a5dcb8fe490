// The keyboard, the appearance, the phone.

import assert from "node:assert/strict";
import { check, focused } from "./check.mjs";

const PHONE = { viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true, deviceScaleFactor: 2 };

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
  assert.deepEqual(
    reached.filter((name) => name !== "in-use" && name !== "Send"),
    [
      "Skip to the message box",
      "new",
      "script:paced",
      "Actions for “script:paced”",
      "Keyboard shortcuts",
      "Token probabilities",
      "Dark appearance",
      "Settings",
      "Copy message",
      "Edit message",
      "Copy answer",
      "Another answer",
      "Edit answer",
      "input",
    ],
  );
  await page.keyboard.press("Escape");
  assert.equal(await focused(page), "input");
  // Enter that accepts an input method's suggestion does not send.
  await page.locator("#input").fill("日本");
  await page.locator("#input").dispatchEvent("keydown", { key: "Enter", isComposing: true });
  assert.equal(await page.locator("#input").inputValue(), "日本");
  await page.locator("#input").fill("");
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

check(
  "dark follows the system, and the choice is kept",
  { colorScheme: "dark" },
  async ({ page, send, shot, accessible, ready }) => {
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
  },
);

check("a phone's width is enough", PHONE, async ({ page, answers, send, shot, accessible }) => {
  const fits = async () =>
    assert.ok(
      await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth),
      "the page scrolls sideways",
    );
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
