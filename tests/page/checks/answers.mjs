// Answers: as they arrive, token by token, and as text.

import assert from "node:assert/strict";
import { MARKDOWN, TOKENS } from "../scripted.mjs";
import { check, counters, focused, text } from "./check.mjs";

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
  assert.match(await counters(answers.first()), /about \d+ tokens at [\d.]+\/s/);
});

check("the stop button stops before the first token", async ({ page, answers, send }) => {
  await send("script:silent", { wait: false });
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  await answers.first().getByText("Stopped before the first token.").waitFor();
  assert.equal(await focused(page), "input");
});

check("counters come from usage and the page's clock", async ({ answers, send }) => {
  await send("script:paced");
  const line = await counters(answers.first());
  const [, first, speed] =
    /^123 prompt tokens \(100 cached\) · first after (\d+) ms · 21 tokens at ([\d.]+)\/s$/.exec(line) ?? [];
  assert.ok(first >= 190 && first < 2000, line);
  assert.ok(speed > 5 && speed < 41, line);
});

check("the stream may be cut anywhere", async ({ answers, send }) => {
  await send("script:bytes");
  assert.equal(await text(answers.first()), "Grüße 你好 👋");
});

check("finished answers are read out once", async ({ page, send }) => {
  await page.evaluate(() => {
    globalThis.said = [];
    const status = document.querySelector("#announcements");
    new MutationObserver(() => status.textContent && globalThis.said.push(status.textContent)).observe(status, {
      childList: true,
    });
  });
  await send("script:paced");
  await page.waitForTimeout(200);
  assert.deepEqual(await page.evaluate(() => globalThis.said), ["tick ".repeat(21).trim()]);
});

check("the page follows a long answer until the reader scrolls", async ({ page, send, settled }) => {
  const distance = () =>
    page.evaluate(() => {
      const { scrollTop, clientHeight, scrollHeight } = document.querySelector("#scroller");
      return scrollHeight - clientHeight - scrollTop;
    });
  await send("script:long");
  assert.ok((await distance()) < 2);
  await send("script:long", { wait: false });
  const last = page.locator(".message.assistant").last();
  await last.getByText("Paragraph 40.").waitFor();
  await page.locator("#scroller").hover();
  await page.mouse.wheel(0, -600);
  await settled();
  assert.ok((await distance()) > 600);
  await page.getByRole("button", { name: "Jump to the end" }).click();
  assert.ok((await distance()) < 2);
});

check("an answer goes on while another conversation is open", async ({ page, answers, send }) => {
  await send("script:paced");
  await page.keyboard.press("Alt+n");
  await send("script:slow", { wait: false });
  // Tokens that arrive meanwhile must not eat the click.
  await page.locator(".conversation", { hasText: "script:paced" }).click({ delay: 150 });
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("tick"));
  assert.equal(await page.locator(".live-dot").count(), 1);
  await page.locator(".conversation", { hasText: "script:slow" }).click();
  await page.waitForFunction(() => document.querySelector(".message.assistant .body")?.textContent.includes("word40"));
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  await answers.first().getByText("Stopped.").waitFor();
});

check(
  "tokens show their alternatives to the mouse and the keyboard",
  async ({ page, proxy, answers, send, shot, accessible }) => {
    await page.keyboard.press("Alt+p");
    await send("script:tokens");
    assert.equal(proxy.requests[0].body.logprobs, true);
    assert.equal(proxy.requests[0].body.top_logprobs, 5);
    const tokens = answers.first().locator(".token");
    assert.equal(await tokens.count(), TOKENS.length + 3);
    assert.deepEqual(
      await tokens.evaluateAll((all) => all.map((token) => Number(token.dataset.p))),
      [0, 1, 2, 3, 4, 5, 0, 0, 2, 2, 0],
    );
    // A character in two pieces stands in the second.
    assert.deepEqual((await tokens.allTextContents()).slice(-3), ["·", "é", "<extra_id_9>"]);
    const tip = page.locator("#token-tip");
    await tokens.nth(5).hover();
    assert.deepEqual(
      await tip
        .locator("tr")
        .allInnerTexts()
        .then((rows) => rows.map((row) => row.trim().split(/\s+/).slice(0, 2).join(" "))),
      ["␣Paris 81.9", "␣the 11.1", "␣surely 3.3"],
    );
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
    await page.keyboard.press("ArrowLeft");
    assert.match(await tip.innerText(), /Part of a character: bytes A9/);
    await page.keyboard.press("Escape");
    await tip.waitFor({ state: "hidden" });
    // One stop of the Tab key for all of them.
    assert.equal(await answers.first().locator('.token[tabindex="0"]').count(), 1);
    await page.keyboard.press("Alt+p");
    assert.equal((await text(answers.first())).trim(), "The capital of France is surely Paris.\né");
  },
);

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
  const links = await body
    .locator("a")
    .evaluateAll((all) => all.map(({ href, rel, target }) => ({ href, rel, target })));
  assert.deepEqual(
    links.map(({ href }) => href),
    [
      "https://example.com/a_(b)",
      "https://example.com/auto",
      "https://example.com/bare",
      "https://example.com/picture.png",
    ],
  );
  for (const { rel, target } of links) assert.ok(rel.includes("noopener") && target === "_blank");
  assert.equal(await body.locator("pre code").innerText(), MARKDOWN.split("```rust\n")[1].split("\n```")[0]);
  assert.ok(
    (await count(".code-keyword")) >= 2 && (await count(".code-comment")) === 1 && (await count(".code-string")) === 1,
  );
  await page.evaluate(() => document.querySelector("#scroller").scrollTo(0, 0));
  await shot("markdown-light");
  await page.locator("#theme").click();
  await shot("markdown-dark");
});

const p = (html) => `<p>${html}</p>`;
const CASES = [
  ["a\nb", p("a<br>b")],
  ["a\\\nb<br>c", p("a<br>b<br>c")],
  ["\\*a\\* 2 * 3 * 4", p("*a* 2 * 3 * 4")],
  ["snake_case_word __init__", p("snake_case_word <strong>init</strong>")],
  ["**a*b*c** ***x** y*", p("<strong>a<em>b</em>c</strong> <em><strong>x</strong> y</em>")],
  ["**注意：**文字", p("<strong>注意：</strong>文字")],
  ["**open and `code **", p("**open and `code **")],
  ["``a`b`` `x|y`", p("<code>a`b</code> <code>x|y</code>")],
  ["&lt;b&gt; &amp;amp; &#233; &#xD800; &nope;", p("&lt;b&gt; &amp;amp; é \uFFFD &amp;nope;")],
  ["# H #\n#no", `<h3>H</h3>${p("#no")}`],
  ["A\n===\n---", "<h3>A</h3><hr>"],
  ["2020. was\n\n- - -", '<ol start="2020"><li>was</li></ol><hr>'],
  ["say\n2. no\n- yes", `${p("say<br>2. no")}<ul><li>yes</li></ul>`],
  ["1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"],
  ["- a\n\n- b", `<ul><li>${p("a")}</li><li>${p("b")}</li></ul>`],
  ["> a\nb\n\nc", `<blockquote>${p("a<br>b")}</blockquote>${p("c")}`],
  [
    "a | b\n--- | ---\n1",
    "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody></tbody></table></div>" + p("1"),
  ],
  ['[a](http://x.y/ "t") [b](c) [d](ftp://e)', p('<a href="http://x.y/">a</a> [b](c) [d](ftp://e)')],
  ["(https://x.y/a_b_c).", p('(<a href="https://x.y/a_b_c">https://x.y/a_b_c</a>).')],
  ["~~a~~ ~b~", p("<del>a</del> ~b~")],
];

check("Markdown's corners are what models mean", async ({ page }) => {
  const shown = await page.evaluate(
    async (sources) => {
      const { showMarkdown } = await import(new URL("page/markdown.js", document.baseURI).href);
      return sources.map((source) => {
        const box = document.createElement("div");
        showMarkdown(box, source);
        for (const node of box.querySelectorAll("*")) {
          for (const { name } of [...node.attributes])
            if (name !== "href" && name !== "start") node.removeAttribute(name);
        }
        return box.innerHTML;
      });
    },
    CASES.map(([source]) => source),
  );
  CASES.forEach(([source, html], i) => assert.equal(shown[i], html, source));
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

check(
  "over HTTP from another machine it works, and copies",
  { host: "aotron.test" },
  async ({ page, answers, send }) => {
    assert.equal(await page.evaluate(() => globalThis.isSecureContext), false);
    await send("script:bytes");
    await answers.first().getByLabel("Copy answer").click();
    await page.locator("#input").focus();
    await page.keyboard.press("Control+V");
    assert.equal(await page.locator("#input").inputValue(), "Grüße 你好 👋");
  },
);

check("nothing in an answer becomes active", async ({ page, answers, send }) => {
  await send("script:hostile");
  await page.waitForTimeout(200);
  assert.equal(await page.evaluate(() => globalThis.hacked), undefined);
  const body = answers.first().locator(".body");
  assert.equal(await body.locator("img, script, iframe, style, svg[onload], [onerror], [onmouseover]").count(), 0);
  const links = await body.locator("a").evaluateAll((all) => all.map(({ protocol }) => protocol));
  assert.ok(
    links.every((protocol) => protocol === "https:"),
    String(links),
  );
  assert.ok((await body.innerText()).includes('<img src=x onerror="window.hacked = 1">'));
  assert.ok((await body.innerText()).includes("[click](javascript:window.hacked=1)"));
});

check("random text makes only known elements, in little time", async ({ page }) => {
  const slowest = await page.evaluate(async () => {
    const { showMarkdown } = await import(new URL("page/markdown.js", document.baseURI).href);
    const known = new Set(
      "P H3 H4 H5 H6 HR BLOCKQUOTE DIV SPAN BUTTON PRE CODE UL OL LI INPUT TABLE THEAD TBODY TR TH TD A BR EM STRONG DEL svg use".split(
        " ",
      ),
    );
    const parts = [
      "*",
      "**",
      "_",
      "~~",
      "`",
      "```",
      "\n",
      "\n\n",
      " ",
      "    ",
      "[",
      "](",
      ")",
      "https://a.b/",
      "<br>",
      "&lt;",
      "<",
      ">",
      "> ",
      "- ",
      "1. ",
      "# ",
      "|",
      "|---|",
      "---",
      "\\",
      "a",
      "word ",
      "é",
      "👋",
      "[ ] ",
      "===",
      "!",
      "\t",
      "\r",
    ];
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
    for (const pair of ["*a_", "[a](", '![a](b "', "`a``b", "a**b_c ", "- \n", "> - ", "|a", "<a", "[[a]("])
      measure(pair.repeat(20000 / pair.length));
    return worst;
  });
  assert.ok(slowest < 1500, `20,000 characters took ${slowest} ms`);
});
