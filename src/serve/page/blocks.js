// The block structure of Markdown: paragraphs, headings, lists, tables, quotes, code.
//
// This is CommonMark with GitHub's tables and task lists, less what models do not write (indented code, HTML, reference
// links), and with three liberties: a line break in a paragraph is kept, since models write poems; a list that is
// indented by two columns is nested, whatever the width of the marker above; and `---` is always a rule.
// Each line is looked at a bounded number of times per level of nesting, and levels are bounded.

/**
 * @typedef {{type: "paragraph", text: string}} Paragraph
 * @typedef {{type: "heading", level: number, text: string}} Heading
 * @typedef {{type: "code", language: string, text: string}} Code
 * @typedef {{type: "rule"}} Rule
 * @typedef {{type: "quote", blocks: Block[]}} Quote
 * @typedef {{checked: boolean | null, blocks: Block[]}} Item checked: of a task; null for other items
 * @typedef {{type: "list", start: number | null, loose: boolean, items: Item[]}} List start: null for bullets
 * @typedef {"left" | "center" | "right" | null} Alignment
 * @typedef {{type: "table", alignments: Alignment[], head: string[], rows: string[][]}} Table
 * @typedef {Paragraph | Heading | Code | Rule | Quote | List | Table} Block
 */

/** Deeper quotes and lists are paragraphs. */
const MAX_DEPTH = 12;

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const UNDERLINE = /^ {0,3}=+[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|)$/;
const TASK = /^\[([ xX])\][ \t]+/;
const DELIMITER_CELL = /^:?-+:?$/;

/**
 * The blocks of a text, each with the lines it was read from.
 *
 * @param {string} text
 * @returns {{block: Block, source: string}[]}
 */
export function parseBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  return read(lines, 0).map(({ block, from, to }) => ({ block, source: lines.slice(from, to).join("\n") }));
}

/**
 * @param {string[]} lines
 * @param {number} depth
 * @returns {{block: Block, from: number, to: number}[]} with the range of lines of each
 */
function read(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const { block, to } = readBlock(lines, at, depth);
    blocks.push({ block, from: at, to });
    at = to;
  }
  return blocks;
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {{block: Block, to: number}} */
function readBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return readCode(lines, at);
  const heading = HEADING.exec(line);
  if (heading) {
    return { block: { type: "heading", level: heading[1].length, text: withoutClosing(heading[2] ?? "") }, to: at + 1 };
  }
  if (RULE.test(line)) return { block: { type: "rule" }, to: at + 1 };
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return readQuote(lines, at, depth);
    if (ITEM.test(line)) return readList(lines, at, depth);
  }
  return readTable(lines, at) ?? readParagraph(lines, at, depth);
}

/** @param {string} line */
function isBlank(line) {
  return line.trim() === "";
}

/** @param {string} line */
function indentOf(line) {
  return line.length - line.trimStart().length;
}

/** A heading without the number signs that may close it. @param {string} text */
function withoutClosing(text) {
  const trimmed = text.trim();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end -= 1;
  return end === 0 || trimmed[end - 1] === " " ? trimmed.slice(0, end).trimEnd() : trimmed;
}

/** Whether a line ends the paragraph above it. @param {string} line @param {number} depth */
function interrupts(line, depth) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  if (depth >= MAX_DEPTH) return false;
  const item = ITEM.exec(line);
  // A number at the start of a line of prose is rarely a list, unless it is the first.
  return QUOTE.test(line) || (item !== null && item[4] !== undefined && !/^(?!0*1[.)])\d/.test(item[2]));
}

/** @param {string[]} lines @param {number} at @returns {{block: Code, to: number}} */
function readCode(lines, at) {
  const [, indent, fence, info] = /** @type {RegExpExecArray} */ (FENCE.exec(lines[at]));
  const text = [];
  let closed = false;
  let to = at + 1;
  for (; to < lines.length && !closed; to += 1) {
    const line = lines[to].trim();
    closed = line.length >= fence.length && line === fence[0].repeat(line.length) && indentOf(lines[to]) <= 3;
    if (!closed) text.push(lines[to].slice(Math.min(indent.length, indentOf(lines[to]))));
  }
  // The line that is about to be written is not there yet.
  if (!closed && text.at(-1) === "") text.pop();
  return { block: { type: "code", language: info.trim().split(/\s/, 1)[0], text: text.join("\n") }, to };
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {{block: Quote, to: number}} */
function readQuote(lines, at, depth) {
  const inner = [];
  let to = at;
  for (; to < lines.length; to += 1) {
    const line = lines[to];
    if (QUOTE.test(line)) inner.push(line.replace(QUOTE, ""));
    else if (isBlank(line) || isBlank(inner.at(-1) ?? "") || interrupts(line, depth)) break;
    else inner.push(line);
  }
  return { block: { type: "quote", blocks: read(inner, depth + 1).map(({ block }) => block) }, to };
}

/** @param {string} marker */
function kind(marker) {
  return marker.length > 1 ? marker.slice(-1) : marker;
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {{block: List, to: number}} */
function readList(lines, at, depth) {
  const [, base, marker] = /** @type {RegExpExecArray} */ (ITEM.exec(lines[at]));
  /** @type {string[][]} */
  const items = [];
  let content = 0; // the column of the item's text
  let to = at;
  for (; to < lines.length; to += 1) {
    const line = lines[to];
    if (isBlank(line)) {
      items.at(-1)?.push("");
      continue;
    }
    const indent = indentOf(line);
    if (items.length && indent >= Math.min(content, base.length + 2)) {
      items.at(-1)?.push(line.slice(Math.min(indent, content)));
      continue;
    }
    const item = ITEM.exec(line);
    if (item && !RULE.test(line) && kind(item[2]) === kind(marker)) {
      const spaces = item[3]?.length ?? 1;
      content = indent + item[2].length + (spaces > 4 ? 1 : spaces);
      items.push([line.slice(content)]);
      continue;
    }
    if (items.at(-1)?.at(-1) === "" || interrupts(line, depth) || item) break;
    items.at(-1)?.push(line);
  }
  // Blank lines behind the last item belong to what follows.
  while (to > at && isBlank(lines[to - 1])) {
    to -= 1;
    items.at(-1)?.pop();
  }
  // Blank lines in a list, between items or within one, set it with more space.
  const loose = items.some((item) => item.includes("", 1));
  return {
    block: {
      type: "list",
      start: marker.length > 1 ? Number.parseInt(marker, 10) : null,
      loose,
      items: items.map((item) => readItem(item, depth)),
    },
    to,
  };
}

/** @param {string[]} lines @param {number} depth @returns {Item} */
function readItem(lines, depth) {
  const task = TASK.exec(lines[0]);
  const content = task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines;
  return {
    checked: task ? task[1] !== " " : null,
    blocks: read(content, depth + 1).map(({ block }) => block),
  };
}

/** @param {string[]} lines @param {number} at @returns {{block: Table, to: number} | null} */
function readTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return null;
  const head = cells(lines[at]);
  const delimiters = cells(lines[at + 1]);
  if (delimiters.length !== head.length || !delimiters.every((cell) => DELIMITER_CELL.test(cell))) return null;
  const rows = [];
  let to = at + 2;
  for (; to < lines.length && lines[to].includes("|") && !isBlank(lines[to]); to += 1) {
    const row = cells(lines[to]).slice(0, head.length);
    while (row.length < head.length) row.push("");
    rows.push(row);
  }
  return { block: { type: "table", alignments: delimiters.map(alignment), head, rows }, to };
}

/** @param {string} cell @returns {Alignment} */
function alignment(cell) {
  if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
  return cell.startsWith(":") ? "left" : null;
}

/** The cells of a row: what is between vertical bars that no backslash escapes. @param {string} line */
function cells(line) {
  const row = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let at = 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") {
      found[found.length - 1] += "|";
      at += 1;
    } else if (row[at] === "|") {
      found.push("");
    } else {
      found[found.length - 1] += row[at];
    }
  }
  if (found.length > 1 && isBlank(found[found.length - 1])) found.pop();
  return found.map((cell) => cell.trim());
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {{block: Paragraph | Heading, to: number}} */
function readParagraph(lines, at, depth) {
  let to = at + 1;
  while (to < lines.length && !isBlank(lines[to])) {
    if (UNDERLINE.test(lines[to])) {
      return { block: { type: "heading", level: 1, text: lines.slice(at, to).join("\n").trim() }, to: to + 1 };
    }
    if (interrupts(lines[to], depth) || (lines[to].includes("|") && readTable(lines.slice(to, to + 2), 0))) break;
    to += 1;
  }
  // Two spaces at a line's end are a line break, which every line end is here.
  const text = lines.slice(at, to).map((line) => line.trim());
  return { block: { type: "paragraph", text: text.join("\n") }, to };
}
