// What the page knows of the server: whether it is ready, its models, its version. Says what is wrong in the banner and
// tries again by itself.

import { ApiError, apiKey, checkReady, models, serverVersion } from "./api.js";
import { askForKey } from "./dialogs.js";
import { byId, element } from "./dom.js";
import { preference, setPreference } from "./preferences.js";

/** @typedef {import("./api.js").Model} Model */

const RETRY_MS = 2000;

export class Connection {
  /** @type {Model[]} */
  #models = [];
  /** The chosen model; null until the server has named its models. @type {Model | null} */
  model = null;
  #banner = byId("banner");
  /** @type {number | undefined} */
  #timer;
  #attempt = 0;

  /** @param {() => void} onChange called when the model changes or is known */
  constructor(onChange) {
    this.onChange = onChange;
    byId("model-choice").addEventListener("change", (/** @type {any} */ event) => {
      this.#choose(event.target.value);
      this.onChange();
    });
  }

  /** Asks the server, again and again until it is ready or wants a key. */
  async connect() {
    clearTimeout(this.#timer);
    const attempt = ++this.#attempt;
    try {
      await checkReady();
      const found = await models();
      if (attempt !== this.#attempt) return;
      this.#models = found;
      this.#choose(preference("model"));
      this.#banner.hidden = true;
    } catch (error) {
      if (attempt !== this.#attempt) return;
      const problem = error instanceof ApiError ? error : new ApiError("server", `The page failed: ${error}`);
      this.#say(problem);
      if (problem.kind === "key") await this.enterKey(problem.message);
      else this.#timer = setTimeout(() => this.connect(), Math.max(RETRY_MS, (problem.retryAt ?? 0) - Date.now()));
    }
    this.onChange();
    this.#showVersion();
  }

  /**
   * Asks for an API key and connects with it.
   *
   * @param {string} reason what the server said
   * @returns {Promise<boolean>} whether there is a new key
   */
  async enterKey(reason) {
    if (!(await askForKey(reason))) return false;
    await this.connect();
    return true;
  }

  /** @param {string} id of a model, or anything else for the first one */
  #choose(id) {
    this.model = this.#models.find((model) => model.id === id) ?? this.#models[0];
    const single = byId("model");
    const choice = byId("model-choice");
    const many = this.#models.length > 1;
    single.textContent = this.model.id;
    single.hidden = many;
    choice.hidden = !many;
    choice.replaceChildren(...this.#models.map((model) => element("option", {}, model.id)));
    choice.value = this.model.id;
    if (many) setPreference("model", this.model.id);
  }

  /** @param {ApiError} problem */
  #say({ kind, message }) {
    const key = kind === "key";
    const text = kind === "loading" ? "The model is loading. This page goes on by itself." : message;
    const button = element(
      "button",
      { type: "button", class: "button", onclick: () => (key ? this.enterKey(message) : this.connect()) },
      key ? "Enter an API key" : "Try again",
    );
    // The same words again would be read out again.
    if (this.#banner.hidden || this.#banner.dataset.text !== text) {
      this.#banner.dataset.text = text;
      this.#banner.classList.toggle("loading", kind === "loading");
      this.#banner.replaceChildren(element("span", {}, text), button);
      this.#banner.hidden = false;
    }
  }

  async #showVersion() {
    const version = await serverVersion();
    byId("about").textContent = version ? `aotron ${version}` : "aotron";
    byId("key-section").hidden = apiKey() === "";
  }
}
