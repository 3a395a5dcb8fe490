// The message box.

import { byId } from "./dom.js";

/** Height in CSS pixels to which the box grows with its text. */
const MAX_HEIGHT = 240;

export class Composer {
  #input = byId("input");
  #send = byId("send");
  #stop = byId("stop");
  // A phone's keyboard has no Shift+Enter, so there Enter is a new line and the button sends.
  #touch = matchMedia("(pointer: coarse) and (hover: none)");
  /** Texts that were not sent, by conversation. @type {Map<string, string>} */
  #drafts = new Map();
  #conversation = "";
  #ready = false;
  #live = false;

  /** @param {{send: (text: string) => void, stop: () => void}} actions */
  constructor(actions) {
    this.actions = actions;
    byId("composer").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#input.addEventListener("input", () => this.#update());
    this.#input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      // Enter also accepts what an input method suggests; Safari tells that by the key code alone.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229 || this.#touch.matches)
        return;
      event.preventDefault();
      this.#submit();
    });
    this.#stop.addEventListener("click", () => {
      actions.stop();
      this.focus();
    });
  }

  /**
   * @param {string} conversation its id
   * @param {boolean} ready there is a model to send to
   * @param {boolean} live an answer is arriving
   */
  show(conversation, ready, live) {
    if (conversation !== this.#conversation) {
      this.#drafts.set(this.#conversation, this.#input.value);
      this.#conversation = conversation;
      this.#input.value = this.#drafts.get(conversation) ?? "";
    }
    this.#ready = ready;
    this.#live = live;
    const hadFocus = document.activeElement === this.#stop || document.activeElement === this.#send;
    this.#send.hidden = live;
    this.#stop.hidden = !live;
    if (hadFocus && document.activeElement === document.body) this.focus();
    this.#update();
  }

  /** Puts `text` in the box. @param {string} text */
  fill(text) {
    this.#input.value = text;
    this.#update();
    this.focus();
  }

  focus() {
    // On a phone the focus opens the keyboard, which covers half of the page.
    if (!this.#touch.matches) this.#input.focus();
  }

  #update() {
    this.#send.setAttribute("aria-disabled", String(!this.#ready || this.#input.value.trim() === ""));
    this.#input.style.height = "auto";
    this.#input.style.height = `${Math.min(this.#input.scrollHeight, MAX_HEIGHT)}px`;
  }

  #submit() {
    const text = this.#input.value.trim();
    if (text === "" || !this.#ready || this.#live) return;
    this.#input.value = "";
    this.#update();
    this.focus();
    this.actions.send(text);
  }
}
