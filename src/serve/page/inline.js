// The inline structure of Markdown: emphasis, code, links. CommonMark's algorithm, in time about linear in the text, with
// two liberties: a line break is kept, and `**` beside a word may end behind punctuation, as models write it in languages
// without spaces.

/**
 * @typedef {{type: "text", text: string}} Text
 * @typedef {{type: "code", text: string}} CodeSpan
 * @typedef {{type: "break"}} Break
 * @typedef {{type: "em" | "strong" | "del", children: Inline[]}} Emphasis
 * @typedef {{type: "link", href: string, children: Inline[]}} Link
 * @typedef {Text | CodeSpan | Break | Emphasis | Link} Inline
 */

/**
 * A run of `*`, `_` or `~`. `closes` and `opens` are the elements that end and begin here, in the order of the text; what
 * is left of the run stands between them.
 *
 * @typedef {object} Delimiter
 * @property {"delimiter"} type
 * @property {string} character
 * @property {number} length of the run in the text
 * @property {number} left characters that belong to no element yet
 * @property {boolean} canOpen
 * @property {boolean} canClose
 * @property {("em" | "strong" | "del")[]} closes
 * @property {("em" | "strong" | "del")[]} opens
 */
/**
 * A `[`. It opens a link once its `]` is found.
 *
 * @typedef {object} Bracket
 * @property {"bracket"} type
 * @property {string} text
 * @property {string | null} href
 * @property {number} delimiters number of delimiters on the stack before it
 */
/** @typedef {Text | CodeSpan | Break | Link | Delimiter | Bracket | {type: "close"}} Piece */

const MAX_NESTING = 50;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const PLAIN = /[^\\`*_~![\]<&h\n]+/y;
const RUN = /`+|\*+|_+|~+/y;
const REFERENCE = /&(?:(amp|lt|gt|quot|apos|nbsp)|#(\d{1,7})|#x([\da-f]{1,6}));/iy;
/** @type {Record<string, string>} */
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const BREAK_TAG = /<br *\/?>/iy;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const BARE_LINK = /https?:\/\/[^\s<>]{1,2000}/iy;
// The lengths are bounded so that many unfinished links do not each search to the end of the text.
const DESTINATION =
  /\([ \n]{0,9}(?:<([^<>\n]{0,2000})>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.){0,999}\)){0,2000}))(?:[ \n]{1,9}(?:"[^"]{0,300}"|'[^']{0,300}'))?[ \n]{0,9}\)/y;

/**
 * The address of a link if it is one that a page may link to (http, https, mailto), or null.
 *
 * @param {string} address
 */
export function safeAddress(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/**
 * @param {string} text
 * @returns {Inline[]}
 */
export function parseInline(text) {
  return tree(new Scanner(text).pieces());
}

class Scanner {
  /** @type {Piece[]} */
  #pieces = [];
  /** Delimiters that may still open an element. @type {Delimiter[]} */
  #delimiters = [];
  /** @type {Bracket[]} */
  #brackets = [];
  /** Lengths of runs of backticks that no later run closes. @type {Set<number>} */
  #unclosed = new Set();
  #at = 0;

  /** @param {string} text */
  constructor(text) {
    this.text = text;
  }

  pieces() {
    while (this.#at < this.text.length) this.#step();
    this.#matchEmphasis(0);
    return this.#pieces;
  }

  /** @param {RegExp} pattern a sticky one @returns {RegExpExecArray | null} */
  #match(pattern) {
    pattern.lastIndex = this.#at;
    return pattern.exec(this.text);
  }

  /** @param {string} text */
  #plain(text) {
    const last = this.#pieces.at(-1);
    if (last?.type === "text") last.text += text;
    else this.#pieces.push({ type: "text", text });
    this.#at += text.length;
  }

  #step() {
    const character = this.text[this.#at];
    switch (character) {
      case "\\":
        return this.#escape();
      case "`":
        return this.#code();
      case "*":
      case "_":
      case "~":
        return this.#delimiter(character);
      case "!":
        // An image is shown as a link: the page loads nothing from elsewhere.
        if (this.text[this.#at + 1] === "[") return this.#open("![");
        return this.#plain(character);
      case "[":
        return this.#open("[");
      case "]":
        return this.#close();
      case "<":
        return this.#angle();
      case "&":
        return this.#reference();
      case "h":
        return this.#bareLink();
      case "\n":
        this.#pieces.push({ type: "break" });
        this.#at += 1;
        return;
      default:
        return this.#plain(this.#match(PLAIN)?.[0] ?? character);
    }
  }

  #escape() {
    const next = this.text[this.#at + 1] ?? "";
    if (next === "\n") return void (this.#at += 1);
    if (!ESCAPABLE.test(next)) return this.#plain("\\");
    this.#at += 1;
    this.#plain(next);
  }

  /** A character by its name or number, such as `&lt;`. */
  #reference() {
    const found = this.#match(REFERENCE);
    if (!found) return this.#plain("&");
    const [whole, name, decimal, hexadecimal] = found;
    const code = decimal ? Number.parseInt(decimal, 10) : Number.parseInt(hexadecimal ?? "", 16);
    const isCharacter = code > 0 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
    const text = name ? NAMED[name.toLowerCase()] : isCharacter ? String.fromCodePoint(code) : "\uFFFD";
    this.#plain(text);
    this.#at += whole.length - text.length;
  }

  #code() {
    const run = /** @type {RegExpExecArray} */ (this.#match(RUN))[0];
    const end = this.#unclosed.has(run.length) ? -1 : this.#closingRun(run);
    if (end < 0) {
      this.#unclosed.add(run.length);
      return this.#plain(run);
    }
    let code = this.text.slice(this.#at + run.length, end).replace(/\n/g, " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
    this.#pieces.push({ type: "code", text: code });
    this.#at = end + run.length;
  }

  /** Where the next run of just as many backticks begins, or -1. @param {string} run */
  #closingRun(run) {
    let at = this.text.indexOf(run, this.#at + run.length);
    while (at >= 0) {
      let end = at + run.length;
      while (this.text[end] === "`") end += 1;
      if (end === at + run.length) return at;
      at = this.text.indexOf(run, end);
    }
    return -1;
  }

  /** @param {string} character */
  #delimiter(character) {
    const length = /** @type {RegExpExecArray} */ (this.#match(RUN))[0].length;
    if (character === "~" && length !== 2) return this.#plain(character.repeat(length));
    const before = [...this.text.slice(Math.max(0, this.#at - 2), this.#at)].at(-1) ?? " ";
    const after = String.fromCodePoint(this.text.codePointAt(this.#at + length) ?? 32);
    const spaceBefore = /\s/.test(before);
    const spaceAfter = /\s/.test(after);
    const markBefore = PUNCTUATION.test(before);
    const markAfter = PUNCTUATION.test(after);
    const free = character === "*" && length > 1;
    const left = !spaceAfter && (free || !markAfter || spaceBefore || markBefore);
    const right = !spaceBefore && (free || !markBefore || spaceAfter || markAfter);
    /** @type {Delimiter} */
    const delimiter = {
      type: "delimiter",
      character,
      length,
      left: length,
      // An underscore inside a word, as in snake_case, is itself.
      canOpen: character === "_" ? left && (!right || markBefore) : left,
      canClose: character === "_" ? right && (!left || markAfter) : right,
      closes: [],
      opens: [],
    };
    this.#pieces.push(delimiter);
    this.#delimiters.push(delimiter);
    this.#at += length;
  }

  /** @param {string} text */
  #open(text) {
    /** @type {Bracket} */
    const bracket = { type: "bracket", text, href: null, delimiters: this.#delimiters.length };
    this.#pieces.push(bracket);
    this.#brackets.push(bracket);
    this.#at += text.length;
  }

  #close() {
    const bracket = this.#brackets.pop();
    this.#at += 1;
    const destination = bracket && this.#match(DESTINATION);
    const href = destination && safeAddress((destination[1] ?? destination[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
    if (!bracket || !destination || !href) {
      this.#at -= 1;
      return this.#plain("]");
    }
    bracket.href = href;
    this.#matchEmphasis(bracket.delimiters);
    this.#pieces.push({ type: "close" });
    this.#at += destination[0].length;
    // Links do not nest.
    this.#brackets = [];
  }

  #angle() {
    const tag = this.#match(BREAK_TAG);
    if (tag) {
      this.#pieces.push({ type: "break" });
      this.#at += tag[0].length;
      return;
    }
    const link = this.#match(AUTOLINK);
    if (link) this.#link(link[1], link[0].length);
    else this.#plain("<");
  }

  #bareLink() {
    const link = this.#match(BARE_LINK);
    if (!link || /[\p{L}\p{N}]/u.test(this.text[this.#at - 1] ?? "")) return this.#plain("h");
    // Marks at the end belong to the sentence, and so does a parenthesis that the address did not open.
    let address = link[0];
    for (;;) {
      const last = address.at(-1) ?? "";
      const unopened = last === ")" && address.split(")").length > address.split("(").length;
      if (!unopened && !"?!.,:;*_~'\"`]".includes(last)) break;
      address = address.slice(0, -1);
    }
    this.#link(address, address.length);
  }

  /** @param {string} address @param {number} length of what is consumed */
  #link(address, length) {
    const href = safeAddress(address);
    if (!href) return this.#plain(this.text.slice(this.#at, this.#at + length));
    this.#pieces.push({ type: "link", href, children: [{ type: "text", text: address }] });
    this.#at += length;
  }

  /**
   * Pairs the delimiters above `bottom` of the stack and takes them off it.
   *
   * @param {number} bottom
   */
  #matchEmphasis(bottom) {
    const stack = this.#delimiters.splice(bottom);
    /** Delimiters that may open, in order. @type {Delimiter[]} */
    const openers = [];
    // For each kind of closer, how many openers from the bottom are known not to fit it.
    /** @type {Map<string, number>} */
    const floors = new Map();
    for (const closer of stack) {
      const key = `${closer.character}${closer.canOpen}${closer.length % 3}`;
      while (closer.canClose && closer.left > 0) {
        const floor = floors.get(key) ?? 0;
        let index = openers.length - 1;
        while (index >= floor && !fits(openers[index], closer)) index -= 1;
        if (index < floor) {
          floors.set(key, openers.length);
          break;
        }
        const opener = openers[index];
        const used = Math.min(opener.left, closer.left, 2);
        const name = closer.character === "~" ? "del" : used === 2 ? "strong" : "em";
        opener.left -= used;
        closer.left -= used;
        opener.opens.unshift(name);
        closer.closes.push(name);
        openers.length = opener.left > 0 ? index + 1 : index;
        for (const [kind, floor] of floors) floors.set(kind, Math.min(floor, openers.length));
      }
      if (closer.canOpen && closer.left > 0) openers.push(closer);
    }
  }
}

/** Whether two runs can delimit an element; CommonMark's rules 9 and 10. @param {Delimiter} opener @param {Delimiter} closer */
function fits(opener, closer) {
  if (opener.character !== closer.character) return false;
  if (!opener.canClose && !closer.canOpen) return true;
  return (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

/** @param {Piece[]} pieces @returns {Inline[]} */
function tree(pieces) {
  /** @type {Inline[]} */
  const root = [];
  const open = [root];
  // Elements beyond the deepest level are left out, and their content stands in the level above.
  let skipped = 0;
  /** @param {Emphasis | Link} node */
  const enter = (node) => {
    if (open.length > MAX_NESTING) {
      skipped += 1;
    } else {
      open[open.length - 1].push(node);
      open.push(node.children);
    }
  };
  const leave = () => {
    if (skipped > 0) skipped -= 1;
    else if (open.length > 1) open.pop();
  };
  /** @param {string} text */
  const write = (text) => {
    const level = open[open.length - 1];
    const last = level.at(-1);
    if (last?.type === "text") last.text += text;
    else if (text) level.push({ type: "text", text });
  };
  for (const piece of pieces) {
    if (piece.type === "delimiter") {
      piece.closes.forEach(leave);
      write(piece.character.repeat(piece.left));
      piece.opens.forEach((type) => enter({ type, children: [] }));
    } else if (piece.type === "bracket") {
      if (piece.href === null) write(piece.text);
      else enter({ type: "link", href: piece.href, children: [] });
    } else if (piece.type === "close") {
      leave();
    } else if (piece.type === "text") {
      write(piece.text);
    } else {
      open[open.length - 1].push(piece);
    }
  }
  return root;
}
