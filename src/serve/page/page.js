// The page: holds the conversation that is shown and the answers that are arriving, and connects the parts.

import { apiKey, setApiKey } from "./api.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import {
  addMessage,
  children,
  newConversation,
  newId,
  path,
  requestMessages,
  titleFrom,
  touch,
} from "./conversation.js";
import { confirmDeletion, makeClosable } from "./dialogs.js";
import { announce, byId, counted, element } from "./dom.js";
import { Generation, newAnswer } from "./generation.js";
import { preference, setPreference } from "./preferences.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStorage } from "./storage.js";
import { Thread } from "./thread.js";
import { hideTip } from "./tokens.js";
import { download, exportText, importText, MAX_FILE_BYTES } from "./transfer.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {{conversation: Conversation, generation: Generation, ended: Promise<void>}} Live an answer that is arriving */

const EXAMPLES = ["What is the capital of France?", "What is 17 + 25?", 'What is "water" in German?'];
/** Time between two writes of an answer that is arriving. */
const SAVE_MS = 1000;
/** Characters of an answer that a screen reader is given at once. */
const MAX_ANNOUNCED = 2000;

class Page {
  /** @type {Conversation} */
  #conversation = newConversation();
  /** @type {Map<string, Live>} */
  #live = new Map();
  /** @type {import("./storage.js").Summary[]} */
  #summaries = [];
  /** @type {Map<string, number>} */
  #saves = new Map();
  #frame = 0;
  #probabilities = preference("probabilities") === "on";

  /** @param {ConversationStorage} storage */
  constructor(storage) {
    this.storage = storage;
    this.connection = new Connection(() => this.#render());
    this.settings = new Settings(byId("sampling"), () => this.#render());
    this.composer = new Composer({ send: (text) => this.#send(text), stop: () => this.#stop() });
    this.thread = new Thread({
      regenerate: (message) => this.#regenerate(message),
      edit: (message, text) => this.#edit(message, text),
      choose: (message, direction) => this.#choose(message, direction),
      openSettings: (field) => this.#openSettings(field),
      enterKey: async (message) => {
        if (await this.connection.enterKey(message.answer?.failure?.message ?? "")) this.#regenerate(message);
      },
    });
    this.sidebar = new Sidebar({
      open: (id) => this.#open(id),
      rename: (id, title) => this.#rename(id, title),
      export: async (id) => {
        const conversation = await this.#find(id);
        if (conversation) this.#export([conversation], fileName(conversation.title));
      },
      remove: (id) => this.#remove(id),
    });
    this.#listen();
  }

  async start() {
    this.storage.onChangeElsewhere((id) => this.#onChangeElsewhere(id));
    await this.#list();
    await this.#openFromAddress();
    this.composer.focus();
    if (!this.storage.isLasting) {
      byId("no-conversations").textContent =
        "This browser keeps no conversations: they are gone when the page is closed.";
      announce(byId("no-conversations").textContent);
    }
    await this.connection.connect();
  }

  #listen() {
    byId("new").addEventListener("click", () => this.#new());
    byId("examples").append(
      ...EXAMPLES.map((text) =>
        element(
          "li",
          {},
          element("button", { type: "button", class: "example", onclick: () => this.#send(text) }, text),
        ),
      ),
    );
    byId("probabilities").addEventListener("click", () => this.#toggleProbabilities());
    byId("theme").addEventListener("click", () => this.#toggleTheme());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#showTheme());
    this.#showTheme();
    byId("show-settings").addEventListener("click", () => this.#openSettings(null));
    byId("in-use").addEventListener("click", () => this.#openSettings(null));
    byId("show-shortcuts").addEventListener("click", () => this.#openDialog(byId("shortcuts")));
    byId("system").addEventListener("input", (/** @type {any} */ event) => {
      this.#conversation.system = event.target.value;
      if (this.#conversation.messages.length) this.#saveSoon(this.#conversation);
      this.#render();
    });
    for (const dialog of document.querySelectorAll("dialog")) makeClosable(dialog);
    byId("export-all").addEventListener("click", () => this.#exportAll());
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (/** @type {any} */ event) => this.#import(event.target));
    byId("delete-all").addEventListener("click", () => this.#removeAll());
    byId("change-key").addEventListener("click", () => this.connection.enterKey("Requests are sent with this key."));
    byId("forget-key").addEventListener("click", () => {
      setApiKey("");
      byId("key-section").hidden = true;
      this.connection.connect();
    });
    window.addEventListener("popstate", () => this.#openFromAddress());
    window.addEventListener("resize", hideTip);
    window.addEventListener("pagehide", () => {
      for (const { conversation } of this.#live.values()) this.storage.put(conversation).catch(() => {});
    });
    document.addEventListener("keydown", (event) => this.#onKey(event));
  }

  // What is shown.

  /** Shows the state as it is at the next frame. */
  #renderSoon() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#render());
  }

  #render() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const conversation = this.#conversation;
    const model = this.connection.model;
    const live = this.#live.get(conversation.id);
    const messages = path(conversation);
    this.thread.show(conversation, live?.generation.message.id ?? null, this.#probabilities, model?.maxTokens ?? null);
    this.composer.show(conversation.id, model !== null, live !== undefined);
    this.sidebar.show(this.#summaries, conversation.id, new Set(this.#live.keys()));

    byId("title").textContent = conversation.title;
    byId("empty-title").textContent = model ? model.id : "aotron";
    byId("empty").hidden = messages.length > 0;
    document.title = [messages.length && conversation.title, model?.id, !messages.length && "aotron"]
      .filter(Boolean)
      .join(" · ");
    byId("in-use").textContent = [conversation.system.trim() && "system message", this.settings.summary]
      .filter(Boolean)
      .join(" · ");
    this.#renderContext(messages);
    this.#renderLegend(messages);
  }

  /** How much of the model's context the conversation takes. @param {Message[]} messages */
  #renderContext(messages) {
    const usage = messages.findLast((message) => message.answer?.usage)?.answer?.usage;
    const max = this.connection.model?.maxTokens;
    const used = usage ? usage.prompt + usage.completion : 0;
    const label = byId("context");
    label.textContent = usage && max ? `${used.toLocaleString("en")} of ${counted(max, "token")}` : "";
    label.classList.toggle("nearly-full", Boolean(max && used > 0.9 * max));
  }

  /** @param {Message[]} messages */
  #renderLegend(messages) {
    const button = byId("probabilities");
    button.setAttribute("aria-pressed", String(this.#probabilities));
    const legend = byId("legend");
    legend.hidden = !this.#probabilities || messages.length === 0;
    legend.classList.toggle("pending", !messages.some((message) => message.answer?.tokens));
  }

  #toggleProbabilities() {
    this.#probabilities = !this.#probabilities;
    setPreference("probabilities", this.#probabilities ? "on" : "");
    hideTip();
    announce(this.#probabilities ? "Token probabilities on, from the next answer" : "Token probabilities off");
    this.#render();
  }

  #isDark() {
    const theme = preference("theme");
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  /** Changes the appearance; one that is the system's own follows the system from then on. */
  #toggleTheme() {
    const dark = !this.#isDark();
    const system = matchMedia("(prefers-color-scheme: dark)").matches;
    setPreference("theme", dark === system ? "" : dark ? "dark" : "light");
    this.#showTheme();
  }

  #showTheme() {
    const theme = preference("theme");
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    byId("theme").setAttribute("aria-pressed", String(this.#isDark()));
  }

  /** @param {HTMLDialogElement} dialog */
  #openDialog(dialog) {
    if (!document.querySelector("dialog[open]")) dialog.showModal();
  }

  /** @param {string | null} field to which the focus goes */
  #openSettings(field) {
    byId("system").value = this.#conversation.system;
    byId("import-result").textContent = "";
    byId("key-section").hidden = apiKey() === "";
    this.#openDialog(byId("settings"));
    if (field) this.settings.focus(field);
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    if (document.querySelector("dialog[open]") || event.defaultPrevented || event.isComposing) return;
    if (event.key === "Escape") {
      if (this.sidebar.isOpen) this.sidebar.setOpen(false);
      else if (this.#live.has(this.#conversation.id)) this.#stop();
      else this.composer.focus();
      return;
    }
    if (!event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // By the key's place, since Alt changes the letter on some keyboards.
    /** @type {Record<string, () => void>} */
    const shortcuts = {
      KeyN: () => this.#new(),
      KeyR: () => {
        const message = this.thread.last("assistant")?.message;
        if (message) this.#regenerate(message);
      },
      KeyC: () => this.thread.last("assistant")?.copy(),
      KeyP: () => this.#toggleProbabilities(),
      ArrowUp: () => this.thread.last("user")?.edit(),
      Comma: () => this.#openSettings(null),
      Slash: () => this.#openDialog(byId("shortcuts")),
    };
    const action = shortcuts[event.code];
    if (!action) return;
    event.preventDefault();
    action();
  }

  // Messages and answers.

  /** @param {string} text */
  #send(text) {
    if (this.#live.has(this.#conversation.id)) return;
    // An example waits in the box until there is a model.
    if (!this.connection.model) return this.composer.fill(text);
    const isNew = this.#conversation.messages.length === 0;
    const parent = path(this.#conversation).at(-1)?.id ?? "";
    const message = addMessage(this.#conversation, parent, "user", text);
    if (isNew) this.#setAddress();
    this.#answer(this.#conversation, message.id);
  }

  /** Asks for an answer to the message `parent`. @param {Conversation} conversation @param {string} parent */
  #answer(conversation, parent) {
    const model = this.connection.model;
    if (!model || this.#live.has(conversation.id)) return;
    const message = addMessage(conversation, parent, "assistant", "");
    message.answer = newAnswer(model.id, this.settings.values);
    const generation = new Generation(message, () => {
      this.#saveSoon(conversation);
      if (conversation === this.#conversation) this.#renderSoon();
    });
    const ended = generation.run(requestMessages(conversation, parent), this.#probabilities).then(() => {
      this.#live.delete(conversation.id);
      touch(conversation);
      this.#save(conversation);
      if (conversation === this.#conversation) this.#announceEnd(message);
      this.#render();
    });
    this.#live.set(conversation.id, { conversation, generation, ended });
    this.#save(conversation);
    this.#render();
    this.thread.scrollToEnd();
  }

  /** @param {Message} message */
  #announceEnd(message) {
    const state = message.answer?.state;
    if (state === "stopped") announce("Stopped");
    // A failure is an alert by itself.
    if (state !== "done") return;
    this.#render();
    const view = this.thread.last("assistant");
    const text = view?.message === message ? (view.body.textContent ?? "") : message.content;
    announce(
      text.length > MAX_ANNOUNCED ? `${text.slice(0, MAX_ANNOUNCED)}… The rest is in the list of messages.` : text,
    );
  }

  #stop() {
    this.#live.get(this.#conversation.id)?.generation.stop();
  }

  /** Stops the answer that is arriving, if any, and waits for its end. */
  async #settle() {
    this.#stop();
    await this.#live.get(this.#conversation.id)?.ended;
  }

  /** Asks for another answer in the place of `message`. @param {Message} message */
  async #regenerate(message) {
    const conversation = this.#conversation;
    if (!this.connection.model || this.#live.has(conversation.id)) return;
    // An answer without text, such as one that failed, is not worth a branch.
    if (message.content === "" && children(conversation, message.id).length === 0) {
      conversation.messages = conversation.messages.filter(({ id }) => id !== message.id);
    }
    this.#answer(conversation, message.parent);
    this.composer.focus();
  }

  /** Adds a branch with another text; one of the user is answered. @param {Message} message @param {string} text */
  async #edit(message, text) {
    const conversation = this.#conversation;
    await this.#settle();
    const added = addMessage(conversation, message.parent, message.role, text);
    if (message.role === "user") {
      this.#answer(conversation, added.id);
      this.composer.focus();
    } else {
      added.answer = { ...newAnswer(message.answer?.model ?? "", {}), state: "edited" };
      this.#save(conversation);
      this.#render();
      this.thread.focusAction(added.id, "edit");
    }
  }

  /** @param {Message} message @param {"left" | "right"} direction */
  #choose(message, direction) {
    this.#conversation.chosen[message.parent] = message.id;
    this.#save(this.#conversation);
    this.#render();
    this.thread.focusAction(message.id, direction);
    const siblings = children(this.#conversation, message.parent);
    announce(`Branch ${siblings.indexOf(message) + 1} of ${siblings.length}`);
  }

  // Conversations.

  /** @param {string} id @returns {Promise<Conversation | undefined>} */
  async #find(id) {
    if (id === this.#conversation.id) return this.#conversation;
    return this.#live.get(id)?.conversation ?? (await this.storage.get(id));
  }

  async #list() {
    try {
      this.#summaries = await this.storage.list();
    } catch (error) {
      this.#sayUnsaved(error);
    }
    this.#render();
  }

  #new() {
    this.sidebar.setOpen(false);
    if (this.#conversation.messages.length) {
      this.#conversation = newConversation();
      this.#setAddress();
      this.#render();
    }
    this.composer.focus();
  }

  /** @param {string} id */
  async #open(id) {
    const conversation = await this.#find(id);
    this.sidebar.setOpen(false);
    if (!conversation) return this.#list();
    this.#conversation = conversation;
    this.#setAddress();
    this.#render();
    this.thread.scrollToEnd();
  }

  /** Opens the conversation that the address names, if there is one; the back button leads to it. */
  async #openFromAddress() {
    const id = location.hash.slice(1);
    const conversation = id ? await this.#find(id) : undefined;
    this.#conversation = conversation ?? (this.#conversation.messages.length ? newConversation() : this.#conversation);
    this.#render();
  }

  #setAddress() {
    const hash = this.#conversation.messages.length ? `#${this.#conversation.id}` : "";
    if (hash !== location.hash) history.pushState(null, "", hash || location.pathname + location.search);
  }

  /** @param {string} id @param {string} title */
  async #rename(id, title) {
    const conversation = await this.#find(id);
    if (!conversation) return;
    conversation.title = titleFrom(title);
    conversation.renamed = true;
    await this.#save(conversation);
  }

  /** @param {string} id */
  async #remove(id) {
    const conversation = await this.#find(id);
    const title = conversation?.title ?? "this conversation";
    if (!(await confirmDeletion(`Delete “${title}”?`, "Its messages and branches are gone for good."))) return;
    await this.#forget([id]);
    try {
      await this.storage.remove(id);
    } catch (error) {
      this.#sayUnsaved(error);
    }
    await this.#list();
    announce("Deleted");
    this.composer.focus();
  }

  async #removeAll() {
    const count = counted(this.#summaries.length, "conversation");
    if (
      !(await confirmDeletion(
        `Delete ${count}?`,
        "All messages and branches are gone for good. Export them to keep a copy.",
      ))
    )
      return;
    await this.#forget([this.#conversation.id, ...this.#live.keys()]);
    try {
      await this.storage.clear();
    } catch (error) {
      this.#sayUnsaved(error);
    }
    byId("import-result").textContent = `Deleted ${count}.`;
    await this.#list();
  }

  /** Ends what goes on in conversations that are about to be deleted. @param {string[]} ids */
  async #forget(ids) {
    for (const id of ids) {
      const live = this.#live.get(id);
      live?.generation.stop();
      await live?.ended;
      clearTimeout(this.#saves.get(id));
      this.#saves.delete(id);
      if (id === this.#conversation.id) {
        this.#conversation = newConversation();
        this.#setAddress();
      }
    }
  }

  /** Writes a conversation. @param {Conversation} conversation */
  async #save(conversation) {
    clearTimeout(this.#saves.get(conversation.id));
    this.#saves.delete(conversation.id);
    try {
      await this.storage.put(conversation);
    } catch (error) {
      this.#sayUnsaved(error);
    }
    await this.#list();
  }

  /** Writes a conversation within a second, however often it changes. @param {Conversation} conversation */
  #saveSoon(conversation) {
    if (this.#saves.has(conversation.id)) return;
    this.#saves.set(
      conversation.id,
      setTimeout(() => this.#save(conversation), SAVE_MS),
    );
  }

  /** @param {unknown} error */
  #sayUnsaved(error) {
    const banner = byId("banner");
    const reason = error instanceof Error ? error.message : String(error);
    const text = `The browser cannot keep this conversation (${reason}). Export it, or delete others.`;
    banner.dataset.text = text;
    banner.classList.remove("loading");
    banner.replaceChildren(element("span", {}, text));
    banner.hidden = false;
  }

  /** @param {string | null} id */
  async #onChangeElsewhere(id) {
    const current = this.#conversation.id;
    if ((id === null || id === current) && !this.#live.has(current) && this.#conversation.messages.length) {
      this.#conversation = (await this.storage.get(current)) ?? newConversation();
    }
    await this.#list();
  }

  // Files.

  /** @param {Conversation[]} conversations @param {string} name */
  #export(conversations, name) {
    download(name, exportText(conversations));
  }

  async #exportAll() {
    const found = await Promise.all(this.#summaries.map(({ id }) => this.#find(id)));
    const conversations = found.filter((conversation) => conversation !== undefined);
    this.#export(conversations, `aotron-conversations-${new Date().toISOString().slice(0, 10)}.json`);
    byId("import-result").textContent = `Exported ${counted(conversations.length, "conversation")}.`;
  }

  /** Adds the conversations of a file; none that is here is overwritten. @param {HTMLInputElement} input */
  async #import(input) {
    const file = input.files?.[0];
    input.value = "";
    if (!file) return;
    const result = byId("import-result");
    try {
      if (file.size > MAX_FILE_BYTES) throw new Error(`The file is larger than ${MAX_FILE_BYTES / 1024 / 1024} MiB.`);
      let added = 0;
      let known = 0;
      for (const conversation of importText(await file.text())) {
        const here = await this.#find(conversation.id);
        if (here?.updated === conversation.updated) {
          known += 1;
          continue;
        }
        if (here?.messages.length) conversation.id = newId();
        await this.storage.put(conversation);
        added += 1;
      }
      result.textContent = `Imported ${counted(added, "conversation")}${known ? `; ${known} of the file’s were here already` : ""}.`;
    } catch (error) {
      result.textContent = error instanceof Error ? error.message : String(error);
    }
    await this.#list();
  }
}

/** A file name made of a title. @param {string} title */
function fileName(title) {
  const words = title
    .normalize("NFKD")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "");
  return `${words.slice(0, 60) || "conversation"}.json`;
}

await new Page(await ConversationStorage.open()).start();
