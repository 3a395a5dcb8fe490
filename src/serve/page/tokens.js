// An answer token by token: coloured by probability, with the alternatives of each in a tooltip.
//
// The tokens are one stop of the Tab key; the arrow keys move among them.

import { byId, element } from "./dom.js";

/** @typedef {import("./conversation.js").Token} Token */

/** Lower bounds of the classes of probability, from class 0 down; page.css colours them. */
const CLASSES = [0.95, 0.8, 0.6, 0.4, 0.2];

/** @param {number | null} logprob @returns {number | null} */
function probability(logprob) {
  return logprob === null ? null : Math.exp(Math.min(logprob, 0));
}

/** @param {number | null} p */
function percent(p) {
  if (p === null) return "–";
  const value = p * 100;
  if (value >= 99.995) return "100 %";
  if (value < 0.01) return "<0.01 %";
  return `${value.toFixed(value < 1 ? 2 : 1)} %`;
}

/** A token's text with what cannot be seen made visible. @param {string} text */
function visible(text) {
  if (text === "") return "(no text)";
  return text
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

/** Shows tokens, and adds those that arrive. */
export class TokenList {
  /** @type {Token[]} */
  #tokens = [];
  #decoder = new TextDecoder();
  /** Index of the token that the Tab key reaches. */
  #current = 0;

  constructor() {
    /** @type {HTMLElement} */
    this.element = element("div", {
      class: "tokens",
      dir: "auto",
      role: "listbox",
      "aria-orientation": "horizontal",
      "aria-label": "Tokens and their probabilities",
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.#onKey(event),
      onfocusin: (/** @type {FocusEvent} */ event) => this.#onEnter(event.target, true),
      onfocusout: hideTip,
      onpointerover: (/** @type {PointerEvent} */ event) => this.#onEnter(event.target, false),
      onpointerleave: hideTip,
    });
  }

  /** @param {Token[]} tokens those shown already, and perhaps more */
  show(tokens) {
    for (const token of tokens.slice(this.#tokens.length)) {
      this.element.append(this.#node(token, this.#tokens.length));
      this.#tokens.push(token);
    }
  }

  /** @param {Token} token @param {number} index */
  #node(token, index) {
    const p = probability(token.logprob);
    // A character whose bytes are in several tokens stands in the last of them.
    // Special tokens have a name and no bytes.
    const special = token.bytes?.length === 0;
    const text =
      token.bytes && !special ? this.#decoder.decode(Uint8Array.from(token.bytes), { stream: true }) : token.text;
    const others = token.top
      .filter(([other]) => other !== token.text)
      .map(([other, logprob]) => `${visible(other)} ${percent(probability(logprob))}`);
    const label = `${visible(text || token.text)}, ${percent(p)}${others.length ? `; instead of ${others.join(", ")}` : ""}`;
    return element(
      "span",
      {
        class: text === "" || special ? "token muted" : "token",
        role: "option",
        "aria-selected": "false",
        "aria-label": label,
        tabindex: index === this.#current ? 0 : -1,
        "data-index": index,
        "data-p": p === null ? 0 : CLASSES.filter((bound) => p < bound).length,
      },
      text === "" ? "·" : text,
    );
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const last = this.#tokens.length - 1;
    const moves = { ArrowRight: this.#current + 1, ArrowLeft: this.#current - 1, Home: 0, End: last };
    const to = moves[/** @type {keyof typeof moves} */ (event.key)];
    if (event.key === "Escape" && !byId("token-tip").hidden) {
      hideTip();
      event.stopPropagation();
    } else if (to !== undefined && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      /** @type {HTMLElement} */ (this.element.children[Math.max(0, Math.min(to, last))]).focus();
    }
  }

  /** @param {EventTarget | null} target @param {boolean} focused */
  #onEnter(target, focused) {
    const node = target instanceof Element ? /** @type {HTMLElement | null} */ (target.closest(".token")) : null;
    if (!node) return;
    const index = Number(node.dataset.index);
    if (focused) {
      const before = this.element.children[this.#current];
      before.setAttribute("tabindex", "-1");
      before.setAttribute("aria-selected", "false");
      node.setAttribute("tabindex", "0");
      node.setAttribute("aria-selected", "true");
      this.#current = index;
    }
    showTip(node, this.#tokens[index]);
  }
}

/** @param {HTMLElement} node @param {Token} token */
function showTip(node, token) {
  const tip = byId("token-tip");
  // The chosen token may be none of the most probable ones.
  const rows = token.top.some(([text]) => text === token.text)
    ? token.top
    : [[token.text, token.logprob], ...token.top];
  tip.replaceChildren(
    element(
      "table",
      {},
      ...rows.map(([text, logprob]) => {
        const p = probability(/** @type {number | null} */ (logprob));
        const bar = element("span", { class: "bar" });
        bar.style.width = `${(p ?? 0) * 100}%`;
        return element(
          "tr",
          { class: text === token.text && "chosen" },
          element("td", { class: "alternative" }, visible(String(text))),
          element("td", { class: "track" }, bar),
          element("td", { class: "percent" }, percent(p)),
        );
      }),
    ),
  );
  if (token.bytes && /\uFFFD/.test(token.text)) {
    const bytes = token.bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
    tip.append(element("p", { class: "hint" }, `Part of a character: bytes ${bytes}`));
  }
  tip.hidden = false;
  // The first line of a token that wraps, and below it where there is room.
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, window.innerWidth - tip.offsetWidth - 8));
  const below = at.bottom + 6 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - 6 - tip.offsetHeight)}px`;
}

/** Hides the tooltip, as when its token moves away. */
export function hideTip() {
  byId("token-tip").hidden = true;
}
