// The list of checks, and what they share.

export const checks = [];

/**
 * Adds a check. Each runs with a fresh profile of the browser.
 *
 * `options` are those of Playwright's browser context, and `path` of the page, `host` under which it is asked for, `script` to run before the page's own,
 * and `before` to prepare the proxy, after which the page need not become ready by itself.
 */
export function check(name, options, run) {
  checks.push(run ? { name, options, run } : { name, run: options });
}

/** The text of a message. */
export const text = (message) => message.locator(".body").innerText();

/** The counters of an answer. */
export const counters = async (answer) => (await answer.locator(".counters").innerText()).replaceAll("\u00a0", " ");

/** The label or the id of the element that has the focus. */
export const focused = (page) =>
  page.evaluate(() => document.activeElement?.getAttribute("aria-label") || document.activeElement?.id);
