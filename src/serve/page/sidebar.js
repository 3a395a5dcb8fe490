// The list of conversations: open, rename, export, delete.

import { byId, element, iconButton } from "./dom.js";

/** @typedef {import("./storage.js").Summary} Summary */

/**
 * @typedef {object} Actions
 * @property {(id: string) => void} open
 * @property {(id: string, title: string) => void} rename
 * @property {(id: string) => void} export
 * @property {(id: string) => void} remove
 */

const MAX_TITLE = 200;

export class Sidebar {
  #list = byId("conversations");
  #nav = byId("sidebar");
  #main = byId("main");
  #opener = byId("sidebar-open");
  #narrow = matchMedia("(max-width: 760px)");
  #renaming = false;
  /** What the list was made from; it is made again only when that changes, so that a click in it is not lost. */
  #shown = "";

  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.#opener.addEventListener("click", () => this.setOpen(true));
    byId("sidebar-close").addEventListener("click", () => this.setOpen(false));
    byId("scrim").addEventListener("click", () => this.setOpen(false));
    this.#narrow.addEventListener("change", () => this.setOpen(false));
    this.setOpen(false);
  }

  /** Whether the list lies over the page. */
  get isOpen() {
    return document.body.classList.contains("sidebar-open");
  }

  /** On a narrow window the list lies over the page; on a wide one it is always there. @param {boolean} open */
  setOpen(open) {
    const over = this.#narrow.matches;
    const wasOpen = this.isOpen;
    document.body.classList.toggle("sidebar-open", over && open);
    this.#opener.setAttribute("aria-expanded", String(open));
    this.#nav.inert = over && !open;
    this.#main.inert = over && open;
    if (over && open) byId("sidebar-close").focus();
    else if (wasOpen) this.#opener.focus();
  }

  /**
   * @param {Summary[]} summaries
   * @param {string} current id of the conversation that is shown
   * @param {Set<string>} live ids of those with an answer that is arriving
   */
  show(summaries, current, live) {
    byId("no-conversations").hidden = summaries.length > 0;
    const key = JSON.stringify([summaries.map(({ id, title }) => [id, title, live.has(id)]), current]);
    if (this.#renaming || key === this.#shown) return;
    this.#shown = key;
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset;
    const focusKey = this.#list.contains(document.activeElement) ? [focused?.id, focused?.part] : null;
    this.#list.replaceChildren(...summaries.map((summary) => this.#item(summary, current, live.has(summary.id))));
    if (focusKey) this.#list.querySelector(`[data-id="${focusKey[0]}"][data-part="${focusKey[1]}"]`)?.focus();
  }

  /** @param {Summary} summary @param {string} current @param {boolean} live */
  #item({ id, title }, current, live) {
    const open = element(
      "button",
      {
        type: "button",
        class: "conversation",
        "aria-current": id === current && "page",
        "data-id": id,
        "data-part": "open",
        title,
        onclick: () => this.actions.open(id),
        ondblclick: () => this.#rename(item, id, title),
      },
      element("span", { class: "conversation-title" }, title),
      live && element("span", { class: "live-dot" }, element("span", { class: "visually-hidden" }, "answering")),
    );
    const more = iconButton("more", `Actions for “${title}”`, () => this.#openMenu(item, more, id, title), {
      "aria-haspopup": "menu",
      "aria-expanded": "false",
      "data-id": id,
      "data-part": "more",
    });
    const item = element("li", { class: id === current && "current" }, open, more);
    return item;
  }

  /** @param {HTMLElement} item @param {HTMLElement} button @param {string} id @param {string} title */
  #openMenu(item, button, id, title) {
    /** @type {[string, () => void][]} */
    const entries = [
      ["Rename", () => this.#rename(item, id, title)],
      ["Export", () => this.actions.export(id)],
      ["Delete", () => this.actions.remove(id)],
    ];
    const close = () => {
      // Removing the menu would end its focus, which closes it again.
      menu.removeEventListener("focusout", onLeave);
      menu.remove();
      button.setAttribute("aria-expanded", "false");
    };
    /** @param {FocusEvent} event */
    const onLeave = (event) => {
      if (!menu.contains(/** @type {Node | null} */ (event.relatedTarget))) close();
    };
    const menu = element(
      "div",
      {
        class: "menu",
        role: "menu",
        "aria-label": `Actions for “${title}”`,
        onkeydown: (/** @type {KeyboardEvent} */ event) => {
          const items = [...menu.children];
          const at = items.indexOf(document.activeElement);
          const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 };
          const to = moves[/** @type {keyof typeof moves} */ (event.key)];
          if (to !== undefined) {
            event.preventDefault();
            items.at(to % items.length).focus();
          } else if (event.key === "Escape" || event.key === "Tab") {
            event.stopPropagation();
            event.preventDefault();
            close();
            button.focus();
          }
        },
      },
      ...entries.map(([label, action]) =>
        element(
          "button",
          {
            type: "button",
            role: "menuitem",
            tabindex: -1,
            class: label === "Delete" && "danger",
            onclick: () => {
              close();
              button.focus();
              action();
            },
          },
          label,
        ),
      ),
    );
    this.#nav.append(menu);
    const at = button.getBoundingClientRect();
    menu.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - menu.offsetWidth - 8))}px`;
    menu.style.top = `${Math.min(at.bottom + 4, window.innerHeight - menu.offsetHeight - 8)}px`;
    button.setAttribute("aria-expanded", "true");
    menu.addEventListener("focusout", onLeave);
    menu.firstElementChild.focus();
  }

  /** Puts a field in the place of a title. @param {HTMLElement} item @param {string} id @param {string} title */
  #rename(item, id, title) {
    this.#renaming = true;
    const before = [...item.childNodes];
    let ended = false;
    /** @param {boolean} save */
    const end = (save) => {
      if (ended) return;
      ended = true;
      this.#renaming = false;
      const text = input.value.trim();
      item.replaceChildren(...before);
      /** @type {HTMLElement} */ (before[0]).focus();
      if (save && text && text !== title) this.actions.rename(id, text);
    };
    const input = element("input", {
      type: "text",
      class: "rename",
      "aria-label": "Title",
      maxlength: MAX_TITLE,
      onkeydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Enter" && !event.isComposing) {
          // The title takes the focus, and the same Enter would press it.
          event.preventDefault();
          end(true);
        } else if (event.key === "Escape") {
          event.stopPropagation();
          end(false);
        }
      },
      onblur: () => end(true),
    });
    input.value = title;
    item.replaceChildren(input);
    input.focus();
    input.select();
  }
}
