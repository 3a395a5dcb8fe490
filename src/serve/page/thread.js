// The shown path of a conversation, message by message, and where it is scrolled to.

import { byId } from "./dom.js";
import { path } from "./conversation.js";
import { MessageView } from "./message.js";
import { hideTip } from "./tokens.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Message} Message */

/** Distance in CSS pixels from the end within which a reader who scrolls down is taken along by an answer that grows. */
const NEAR_END = 48;

export class Thread {
  /** @type {Map<string, MessageView>} */
  #views = new Map();
  #list = byId("thread");
  #scroller = byId("scroller");
  #toEnd = byId("to-end");
  #follows = true;
  /** Where the thread was scrolled to. */
  #top = 0;
  #conversation = "";

  /** @param {import("./message.js").Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.#scroller.addEventListener(
      "scroll",
      () => {
        const { scrollTop } = this.#scroller;
        // The smallest step up is the reader's wish, however near the end is; only the way down leads back to following.
        this.#follows = this.#isAtEnd(scrollTop < this.#top ? 1 : NEAR_END);
        this.#top = scrollTop;
        this.#toEnd.hidden = this.#isAtEnd(NEAR_END);
        hideTip();
      },
      { passive: true },
    );
    this.#toEnd.addEventListener("click", () => this.scrollToEnd());
    // The dock grows with the text in it, and the window with the keyboard of a phone.
    new ResizeObserver(() => this.#follow()).observe(this.#scroller);
  }

  /**
   * Shows the path of a conversation.
   *
   * @param {Conversation} conversation
   * @param {string | null} live id of the message whose answer is arriving
   * @param {boolean} probabilities
   * @param {number | null} maxTokens
   */
  show(conversation, live, probabilities, maxTokens) {
    if (conversation.id !== this.#conversation) {
      this.#conversation = conversation.id;
      this.#views.clear();
      this.#follows = true;
    }
    const messages = path(conversation);
    /** @type {Map<string, Message[]>} */
    const siblings = new Map();
    for (const message of conversation.messages) {
      const group = siblings.get(message.parent);
      if (group) group.push(message);
      else siblings.set(message.parent, [message]);
    }
    const views = messages.map((message, index) => {
      let view = this.#views.get(message.id);
      // Another tab may have written the conversation again.
      if (view?.message !== message) {
        view = new MessageView(message, this.actions);
        this.#views.set(message.id, view);
      }
      view.update({
        siblings: siblings.get(message.parent) ?? [message],
        live: message.id === live,
        probabilities,
        last: index === messages.length - 1,
        maxTokens,
      });
      return view.element;
    });
    // Nodes that stay are not moved, so they keep the focus and the selection.
    views.forEach((node, index) => {
      if (this.#list.children[index] !== node) this.#list.insertBefore(node, this.#list.children[index] ?? null);
    });
    while (this.#list.children.length > views.length) this.#list.lastElementChild.remove();
    this.#follow();
  }

  /** The view of the last shown message of a role. @param {import("./conversation.js").Role} role */
  last(role) {
    const nodes = [...this.#list.querySelectorAll(`.message.${role}`)];
    return this.#views.get(nodes.at(-1)?.dataset.id ?? "");
  }

  /** Moves the focus to an action of a message. @param {string} id @param {string} action */
  focusAction(id, action) {
    const button = this.#views.get(id)?.element.querySelector(`[data-action="${action}"]`);
    if (button instanceof HTMLElement) button.focus();
  }

  scrollToEnd() {
    this.#follows = true;
    this.#follow();
  }

  /** @param {number} distance in CSS pixels */
  #isAtEnd(distance) {
    const { scrollTop, clientHeight, scrollHeight } = this.#scroller;
    return scrollTop + clientHeight >= scrollHeight - distance;
  }

  #follow() {
    if (this.#follows) {
      this.#scroller.scrollTop = this.#scroller.scrollHeight;
      this.#top = this.#scroller.scrollTop;
    }
    this.#toEnd.hidden = this.#isAtEnd(NEAR_END);
  }
}
