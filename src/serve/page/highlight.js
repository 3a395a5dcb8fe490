// Colours code by four kinds of tokens that nearly all languages share: comments, strings, numbers, keywords.

/** @typedef {"comment" | "string" | "number" | "keyword" | null} Kind null: anything else */

const C_LIKE = String.raw`(?<comment>\/\/[^\n]*|\/\*[^]*?(?:\*\/|$))`;
const HASH = String.raw`(?<comment>#[^\n]*)`;
const STRINGS = String.raw`(?<string>"(?:[^"\\\n]|\\[^])*"?|'(?:[^'\\\n]|\\[^])*'?)`;
const TEMPLATES = String.raw`(?<string>"(?:[^"\\\n]|\\[^])*"?|'(?:[^'\\\n]|\\[^])*'?|` + "`(?:[^`\\\\]|\\\\[^])*`?)";
// A single quote in Rust begins a character or a lifetime.
const RUST_STRINGS = String.raw`(?<string>b?"(?:[^"\\]|\\[^])*"?|b?'(?:[^'\\\n]|\\[^'\n]{1,9}|\\')')`;
const PYTHON_STRINGS = String.raw`(?<string>[rbfuRBFU]{0,2}(?:"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:[^"\\\n]|\\[^])*"?|'(?:[^'\\\n]|\\[^])*'?))`;
const NUMBERS = String.raw`(?<number>\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][+-]?\d+)?)\w*)`;
const WORDS = String.raw`(?<word>[A-Za-z_$][\w$]*)`;

/** @param {string[]} parts @param {string} keywords @param {string} [flags] */
function language(parts, keywords, flags = "") {
  return {
    pattern: new RegExp([...parts, NUMBERS, WORDS].join("|"), `g${flags}`),
    keywords: new Set(keywords.split(" ")),
  };
}

const RUST = language(
  [C_LIKE, RUST_STRINGS],
  "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type unsafe use where while",
);
const PYTHON = language(
  [HASH, PYTHON_STRINGS],
  "and as assert async await break class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return True try while with yield",
);
const JAVASCRIPT = language(
  [C_LIKE, TEMPLATES],
  "as async await break case catch class const continue debugger default delete do else enum export extends false finally for from function get if implements import in instanceof interface let new null of return set static super switch this throw true try type typeof undefined var void while yield",
);
const C = language(
  [C_LIKE, STRINGS],
  "abstract alignas auto bool boolean break case catch char class const constexpr continue default defer delete do double else enum explicit export extends extern false final finally float for func go goto if implements import inline int interface let long map namespace new noexcept null nullptr operator override package private protected public range return select short signed sizeof static string struct super switch template this throw throws true try type typedef typename union unsigned using var virtual void volatile while",
);
const SHELL = language(
  [HASH.replace("#", "(?<![\\w$])#"), STRINGS],
  "case cd do done echo elif else esac exit export fi for function if in local read return set then until while",
);
const CONFIG = language([HASH, STRINGS], "true false null yes no on off");
const SQL = language(
  [String.raw`(?<comment>--[^\n]*|\/\*[^]*?(?:\*\/|$))`, STRINGS],
  "add all alter and as asc between by case create delete desc distinct drop else end exists foreign from full group having if in index inner insert into is join key left like limit not null offset on or order outer primary references right select set table then union unique update values view when where with",
  "i",
);
const MARKUP = {
  pattern: /(?<comment><!--[^]*?(?:-->|$))|(?<string>"[^"<>]*"|'[^'<>]*')|(?<keyword><\/?[A-Za-z][\w:-]*|\/?>)/g,
  keywords: new Set(),
};

/** @type {Record<string, {pattern: RegExp, keywords: Set<string>}>} */
const LANGUAGES = Object.assign(Object.create(null), {
  rust: RUST,
  rs: RUST,
  python: PYTHON,
  py: PYTHON,
  python3: PYTHON,
  javascript: JAVASCRIPT,
  js: JAVASCRIPT,
  jsx: JAVASCRIPT,
  mjs: JAVASCRIPT,
  typescript: JAVASCRIPT,
  ts: JAVASCRIPT,
  tsx: JAVASCRIPT,
  c: C,
  h: C,
  cpp: C,
  "c++": C,
  cc: C,
  cuda: C,
  cu: C,
  csharp: C,
  "c#": C,
  cs: C,
  java: C,
  kotlin: C,
  go: C,
  swift: C,
  bash: SHELL,
  sh: SHELL,
  shell: SHELL,
  zsh: SHELL,
  console: SHELL,
  json: CONFIG,
  yaml: CONFIG,
  yml: CONFIG,
  toml: CONFIG,
  ini: CONFIG,
  sql: SQL,
  html: MARKUP,
  xml: MARKUP,
  svg: MARKUP,
});

/**
 * The code in pieces, which together are the code again. Code in an unknown language is one piece.
 *
 * @param {string} code
 * @param {string} name of the language
 * @returns {[Kind, string][]}
 */
export function highlight(code, name) {
  const found = LANGUAGES[name.toLowerCase()];
  if (!found) return [[null, code]];
  /** @type {[Kind, string][]} */
  const pieces = [];
  let end = 0;
  for (const match of code.matchAll(found.pattern)) {
    const kind = kindOf(match.groups ?? {}, found.keywords, found.pattern.ignoreCase);
    if (!kind) continue;
    if (match.index > end) pieces.push([null, code.slice(end, match.index)]);
    pieces.push([kind, match[0]]);
    end = match.index + match[0].length;
  }
  if (end < code.length) pieces.push([null, code.slice(end)]);
  return pieces;
}

/** @param {Record<string, string | undefined>} groups @param {Set<string>} keywords @param {boolean} ignoreCase @returns {Kind} */
function kindOf(groups, keywords, ignoreCase) {
  if (groups.comment !== undefined) return "comment";
  if (groups.string !== undefined) return "string";
  if (groups.number !== undefined) return "number";
  if (groups.keyword !== undefined) return "keyword";
  const word = groups.word ?? "";
  return keywords.has(ignoreCase ? word.toLowerCase() : word) ? "keyword" : null;
}
