// One message: its text, what went wrong, its branches, its actions and counters.

import { copyText, counted, element, iconButton } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { TokenList } from "./tokens.js";

/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./conversation.js").Answer} Answer */

/**
 * What a message asks of the page.
 *
 * @typedef {object} Actions
 * @property {(message: Message) => void} regenerate asks for another answer beside this one
 * @property {(message: Message, text: string) => void} edit adds a branch with another text
 * @property {(message: Message, direction: "left" | "right") => void} choose shows the branch of this message, which lies
 *   in this direction of the one that is shown
 * @property {(field: string) => void} openSettings
 * @property {(message: Message) => void} enterKey asks for an API key, then for the answer again
 *
 * @typedef {object} Context what a message is shown with
 * @property {Message[]} siblings the branches at this message, itself included, oldest first
 * @property {boolean} live its answer is arriving
 * @property {boolean} probabilities show its tokens
 * @property {boolean} last nothing comes after it
 * @property {number | null} maxTokens of the model's context
 */

const NAMES = { user: "Message", assistant: "Answer" };

export class MessageView {
  /** @type {TokenList | null} */
  #tokens = null;
  /** What the parts below the text were made from; they are made again only when it changes. */
  #footKey = "";
  /** @type {number | undefined} */
  #countdown;

  /**
   * @param {Message} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = element("div", { class: "body", dir: message.role === "user" && "auto" });
    this.notice = element("div", { class: "notices" });
    this.foot = element("div", { class: "foot" });
    /** @type {HTMLLIElement} */
    this.element = element(
      "li",
      { class: `message ${message.role}`, "data-id": message.id },
      element("h2", { class: "visually-hidden" }, message.role === "user" ? "You" : "Answer"),
      this.body,
      this.notice,
      this.foot,
    );
  }

  /** Shows the message as it is now. @param {Context} context */
  update(context) {
    this.element.classList.toggle("last", context.last);
    this.element.setAttribute("aria-busy", String(context.live));
    this.#updateBody(context);
    const { siblings, live, last, maxTokens } = context;
    const key = JSON.stringify([siblings.map(({ id }) => id), live, last, maxTokens, this.message.answer?.state]);
    if (key !== this.#footKey) {
      this.#footKey = key;
      this.#updateNotice(context);
      this.#updateFoot(context);
    }
    const counters = this.foot.querySelector(".counters");
    if (counters && this.message.answer) counters.textContent = countersText(this.message.answer);
  }

  /** @param {Context} context */
  #updateBody({ live, probabilities }) {
    if (this.editing) return;
    const { content, role, answer } = this.message;
    const tokens = probabilities && answer?.tokens;
    this.element.classList.toggle("waiting", live && content === "");
    if (role === "user") {
      this.body.textContent = content;
    } else if (tokens) {
      if (!this.#tokens) {
        this.#tokens = new TokenList();
        this.body.replaceChildren(this.#tokens.element);
      }
      this.#tokens.show(tokens);
    } else {
      if (this.#tokens || !this.markdown) {
        this.#tokens = null;
        this.markdown = element("div", { class: "markdown" });
        this.body.replaceChildren(this.markdown);
      }
      showMarkdown(this.markdown, content);
    }
  }

  /** @param {Context} context */
  #updateNotice({ live, maxTokens }) {
    clearInterval(this.#countdown);
    const answer = this.message.answer;
    const notice = !live && answer ? this.#noticeNode(answer, maxTokens) : null;
    this.notice.replaceChildren(...(notice ? [notice] : []));
  }

  /** @param {Answer} answer @param {number | null} maxTokens */
  #noticeNode(answer, maxTokens) {
    if (answer.failure) return this.#failureNode(answer.failure);
    if (answer.state === "stopped") {
      return element("p", { class: "notice" }, this.message.content ? "Stopped." : "Stopped before the first token.");
    }
    if (answer.state === "waiting" || answer.state === "streaming") {
      return element(
        "p",
        { class: "notice" },
        "Incomplete: the page was closed, or the answer is still arriving in another tab.",
      );
    }
    if (answer.finish === "length") return this.#lengthNode(answer, maxTokens);
    if (answer.state === "done" && this.message.content === "")
      return element("p", { class: "notice" }, "The answer is empty.");
    return null;
  }

  /** @param {Answer} answer @param {number | null} maxTokens */
  #lengthNode({ usage, settings }, maxTokens) {
    if (usage && maxTokens && usage.prompt + usage.completion >= maxTokens) {
      const full = `The model’s context of ${counted(maxTokens, "token")} is full. Begin a new conversation, or edit an earlier message.`;
      return element("p", { class: "notice" }, full);
    }
    const limit = settings.max_tokens ?? usage?.completion;
    const length = typeof limit === "number" ? ` of ${counted(limit, "token")}` : "";
    return element(
      "p",
      { class: "notice" },
      `The answer reached its limit${length}. `,
      element(
        "button",
        { type: "button", class: "link", onclick: () => this.actions.openSettings("max_tokens") },
        "Change max tokens",
      ),
    );
  }

  /** @param {import("./conversation.js").Failure} failure */
  #failureNode({ kind, message, retryAt }) {
    const key = kind === "key";
    const retry = element(
      "button",
      {
        type: "button",
        class: "button",
        onclick: () => {
          if (retry.getAttribute("aria-disabled") === "true") return;
          if (key) this.actions.enterKey(this.message);
          else this.actions.regenerate(this.message);
        },
      },
      key ? "Enter an API key" : "Try again",
    );
    const wait = () => {
      const seconds = Math.ceil(((retryAt ?? 0) - Date.now()) / 1000);
      retry.setAttribute("aria-disabled", String(seconds > 0));
      retry.textContent = seconds > 0 ? `Try again in ${counted(seconds, "second")}` : "Try again";
      if (seconds <= 0) clearInterval(this.#countdown);
    };
    if (!key && retryAt) {
      wait();
      this.#countdown = setInterval(wait, 250);
    }
    return element("div", { class: "notice failure", role: "alert" }, element("p", {}, message), retry);
  }

  /** @param {Context} context */
  #updateFoot({ siblings, live }) {
    const { role, answer, content } = this.message;
    const foot = [];
    if (siblings.length > 1) foot.push(this.#branches(siblings));
    const actions = live ? [] : this.#actionButtons();
    if (actions.length)
      foot.push(
        element("div", { class: "actions", role: "group", "aria-label": `${NAMES[role]} actions` }, ...actions),
      );
    if (role === "assistant" && answer && (live || content !== "")) foot.push(element("span", { class: "counters" }));
    // The focus stays where it was if the button is still there.
    const focused = this.foot.contains(document.activeElement)
      ? document.activeElement?.getAttribute("data-action")
      : null;
    this.foot.replaceChildren(...foot);
    if (focused) this.foot.querySelector(`[data-action="${focused}"]`)?.focus();
  }

  /** @param {Message[]} siblings */
  #branches(siblings) {
    const at = siblings.findIndex(({ id }) => id === this.message.id);
    /** @param {number} to @param {"left" | "right"} name @param {string} label */
    const arrow = (to, name, label) =>
      iconButton(name, label, () => siblings[to] && this.actions.choose(siblings[to], name), {
        "aria-disabled": siblings[to] ? null : "true",
        "data-action": name,
      });
    return element(
      "div",
      { class: "branches", role: "group", "aria-label": "Branches" },
      arrow(at - 1, "left", "Previous branch"),
      element("span", { class: "branch-count" }, `${at + 1} / ${siblings.length}`),
      arrow(at + 1, "right", "Next branch"),
    );
  }

  #actionButtons() {
    const user = this.message.role === "user";
    const copy = iconButton("copy", user ? "Copy message" : "Copy answer", () => this.copy(), {
      "data-action": "copy",
    });
    const again = iconButton("again", "Another answer", () => this.actions.regenerate(this.message), {
      "data-action": "again",
    });
    const edit = iconButton("pencil", user ? "Edit message" : "Edit answer", () => this.edit(), {
      "data-action": "edit",
    });
    if (user) return [copy, edit];
    if (this.message.content !== "") return [copy, again, edit];
    // The notice of a failure has a button for another try.
    return this.message.answer?.failure ? [] : [again];
  }

  /** Copies the text as the model wrote it. */
  copy() {
    const button = this.foot.querySelector('[data-action="copy"]');
    if (button) copyText(this.message.content, button);
  }

  /** Shows the text in a field. Saving adds a branch; the message stays as it is. */
  edit() {
    if (this.editing) return;
    const user = this.message.role === "user";
    const area = element("textarea", {
      rows: Math.min(12, this.message.content.split("\n").length + 1),
      dir: "auto",
      "aria-label": user ? "Edit message" : "Edit answer",
      onkeydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          this.#endEdit();
        } else if (
          event.key === "Enter" &&
          !event.isComposing &&
          (event.ctrlKey || event.metaKey || (user && !event.shiftKey))
        ) {
          event.preventDefault();
          save();
        }
      },
    });
    area.value = this.message.content;
    const save = () => {
      const text = area.value.trim();
      if (text === "") return area.focus();
      this.#endEdit();
      if (text !== this.message.content || user) this.actions.edit(this.message, text);
    };
    this.editing = element(
      "form",
      { class: "edit", onsubmit: (/** @type {Event} */ event) => (event.preventDefault(), save()) },
      area,
      element(
        "div",
        { class: "row end" },
        element("button", { type: "button", class: "button", onclick: () => this.#endEdit() }, "Cancel"),
        element("button", { type: "submit", class: "button primary" }, user ? "Send" : "Save"),
      ),
    );
    this.body.hidden = true;
    this.body.after(this.editing);
    this.element.classList.add("is-editing");
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #endEdit() {
    this.editing?.remove();
    this.editing = null;
    this.body.hidden = false;
    this.element.classList.remove("is-editing");
    this.foot.querySelector('[data-action="edit"]')?.focus();
  }
}

/** The counters of an answer, such as "42 prompt tokens (32 cached) · first after 85 ms · 20 tokens at 41.2/s". @param {Answer} answer */
function countersText({ state, usage, firstMs, tokensPerSecond, pieces, tokens }) {
  if (state === "waiting") return "";
  if (state === "edited") return "edited";
  const parts = [];
  if (usage) {
    const cached = usage.cached ? ` (${usage.cached.toLocaleString("en")} cached)` : "";
    parts.push(`${counted(usage.prompt, "prompt token")}${cached}`);
  }
  if (firstMs !== null) parts.push(`first after ${duration(firstMs)}`);
  const speed = tokensPerSecond === null ? "" : ` at ${speedText(tokensPerSecond)}`;
  const about = usage || tokens ? "" : "about ";
  parts.push(`${about}${counted(usage?.completion ?? tokens?.length ?? pieces, "token")}${speed}`);
  // A part is not broken across lines.
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

/** @param {number} ms */
function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

/** @param {number} tokens */
function speedText(tokens) {
  return `${tokens < 100 ? tokens.toFixed(1) : Math.round(tokens).toLocaleString("en")}/s`;
}
