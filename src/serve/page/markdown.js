// Shows Markdown as DOM nodes. Only the elements below are ever made, and text becomes text nodes.

import { parseBlocks } from "./blocks.js";
import { copyText, element, icon } from "./dom.js";
import { highlight } from "./highlight.js";
import { parseInline } from "./inline.js";

/** @typedef {import("./blocks.js").Block} Block */
/** @typedef {import("./inline.js").Inline} Inline */

/** Text runs from right to left where it begins with such a script. */
const AUTO = { dir: "auto" };

/** The sources of the blocks that an element shows. @type {WeakMap<Element, string[]>} */
const shown = new WeakMap();

/**
 * Shows `text` in `container`, which nothing else may write to. Blocks that are as they were keep their nodes, so that
 * an answer that grows costs its last block only, and a selection in it lasts.
 *
 * @param {Element} container
 * @param {string} text
 */
export function showMarkdown(container, text) {
  const blocks = parseBlocks(text);
  const before = shown.get(container) ?? [];
  let same = 0;
  while (same < blocks.length && same < before.length && blocks[same].source === before[same]) same += 1;
  while (container.childNodes.length > same) container.lastChild?.remove();
  container.append(...blocks.slice(same).map(({ block }) => blockNode(block)));
  shown.set(
    container,
    blocks.map(({ source }) => source),
  );
}

/** @param {Block} block @returns {Node} */
function blockNode(block) {
  switch (block.type) {
    case "paragraph":
      return element("p", AUTO, ...inlineNodes(block.text));
    case "heading":
      // The page has a heading of level 1, and each message one of level 2.
      return element(`h${Math.min(block.level + 2, 6)}`, AUTO, ...inlineNodes(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(blockNode));
    case "code":
      return codeNode(block.text, block.language);
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block);
  }
}

/** @param {import("./blocks.js").List} list */
function listNode({ start, loose, items }) {
  const attributes = start !== null && start !== 1 ? { start } : {};
  return element(
    start === null ? "ul" : "ol",
    attributes,
    ...items.map(({ checked, blocks }) => {
      const box =
        checked !== null &&
        element("input", { type: "checkbox", disabled: true, checked, "aria-label": checked ? "done" : "to do" });
      const content = blocks.flatMap((block) =>
        // The lines of a tight list stand without paragraphs.
        block.type === "paragraph" && !loose ? inlineNodes(block.text) : [blockNode(block)],
      );
      return element("li", { ...AUTO, class: checked !== null && "task" }, box, ...content);
    }),
  );
}

/** @param {import("./blocks.js").Table} table */
function tableNode({ alignments, head, rows }) {
  /** @param {string} name @param {string[]} cells @param {object} [attributes] */
  const row = (name, cells, attributes = {}) =>
    element(
      "tr",
      {},
      ...cells.map((cell, i) =>
        element(
          name,
          { ...AUTO, class: alignments[i] && `align-${alignments[i]}`, ...attributes },
          ...inlineNodes(cell),
        ),
      ),
    );
  return element(
    "div",
    { class: "table", tabindex: 0, role: "region", "aria-label": "Table" },
    element(
      "table",
      {},
      element("thead", {}, row("th", head, { scope: "col" })),
      element("tbody", {}, ...rows.map((cells) => row("td", cells))),
    ),
  );
}

/** @param {string} code @param {string} language */
function codeNode(code, language) {
  const copy = element(
    "button",
    {
      type: "button",
      class: "icon-button",
      "aria-label": "Copy code",
      title: "Copy code",
      onclick: () => copyText(code, copy),
    },
    icon("copy"),
  );
  const pieces = highlight(code, language).map(([kind, text]) =>
    kind ? element("span", { class: `code-${kind}` }, text) : text,
  );
  return element(
    "div",
    { class: "code" },
    element("div", { class: "code-head" }, element("span", {}, language || "code"), copy),
    element(
      "pre",
      { tabindex: 0, role: "region", "aria-label": language ? `Code in ${language}` : "Code" },
      element("code", {}, ...pieces),
    ),
  );
}

/** @param {string} text */
function inlineNodes(text) {
  return parseInline(text).map(inlineNode);
}

/** @param {Inline} inline @returns {Node} */
function inlineNode(inline) {
  switch (inline.type) {
    case "text":
      return document.createTextNode(inline.text);
    case "code":
      return element("code", {}, inline.text);
    case "break":
      return element("br");
    case "link":
      return element(
        "a",
        { href: inline.href, target: "_blank", rel: "noopener noreferrer nofollow" },
        ...inline.children.map(inlineNode),
      );
    default:
      return element(inline.type, {}, ...inline.children.map(inlineNode));
  }
}
