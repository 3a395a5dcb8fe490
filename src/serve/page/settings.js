// Sampling settings: one set for all conversations, kept in the browser. What is not set is not sent, so the server's
// defaults hold.

import { element } from "./dom.js";
import { preference, setPreference } from "./preferences.js";

/**
 * @typedef {object} Field
 * @property {string} name in the request
 * @property {string} label
 * @property {number} [min]
 * @property {number} [max]
 * @property {boolean} [integer]
 * @property {string} help
 * @property {string} [unset] what is shown in an empty field
 */

/** @type {{title: string, fields: Field[]}[]} */
const GROUPS = [
  {
    title: "Sampling",
    fields: [
      {
        name: "temperature",
        label: "Temperature",
        min: 0,
        max: 100,
        help: "Above 0 answers vary; higher is more varied.",
      },
      {
        name: "top_p",
        label: "Top-p",
        min: 0,
        max: 1,
        help: "Choose among the likeliest tokens that together reach this probability.",
      },
      {
        name: "top_k",
        label: "Top-k",
        min: 0,
        max: 2 ** 31 - 1,
        integer: true,
        help: "Choose among this many tokens. 1 is greedy, 0 is off.",
      },
      {
        name: "min_p",
        label: "Min-p",
        min: 0,
        max: 1,
        help: "Leave out tokens below this fraction of the likeliest one’s probability.",
      },
      {
        name: "seed",
        label: "Seed",
        min: 0,
        max: Number.MAX_SAFE_INTEGER,
        integer: true,
        help: "The same seed gives the same answer.",
        unset: "random",
      },
    ],
  },
  {
    title: "Length and stops",
    fields: [
      {
        name: "max_tokens",
        label: "Max tokens",
        min: 1,
        max: 2 ** 31 - 1,
        integer: true,
        help: "Limit of an answer’s length.",
      },
      {
        name: "stop",
        label: "Stop strings",
        help: "One per line, \\n for a line break. An answer ends before the first.",
        unset: "none",
      },
    ],
  },
  {
    title: "Penalties",
    fields: [
      {
        name: "repetition_penalty",
        label: "Repetition",
        min: 0.01,
        max: 100,
        help: "Above 1, fewer tokens of the prompt and the answer are repeated.",
      },
      {
        name: "presence_penalty",
        label: "Presence",
        min: -100,
        max: 100,
        help: "Subtracted from the logits of tokens already in the answer.",
      },
      { name: "frequency_penalty", label: "Frequency", min: -100, max: 100, help: "The same, once per occurrence." },
    ],
  },
];
const FIELDS = GROUPS.flatMap((group) => group.fields);

/** @param {string} text @returns {string[]} */
function stopStrings(text) {
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replace(/\\([nt\\])/g, (_, letter) => escapes[/** @type {"n" | "t" | "\\"} */ (letter)]));
}

/** @param {unknown} strings */
function stopText(strings) {
  if (!Array.isArray(strings)) return "";
  return strings
    .map((text) => String(text).replace(/\\/g, "\\\\").replace(/\n/g, "\\n").replace(/\t/g, "\\t"))
    .join("\n");
}

/**
 * The value of a field, or why it has none.
 *
 * @param {Field} field
 * @param {string} text
 * @returns {{value?: unknown, error?: string}} neither if the field is empty
 */
function readField({ name, min = -Infinity, max = Infinity, integer = false }, text) {
  if (name === "stop") return text ? { value: stopStrings(text) } : {};
  if (text.trim() === "") return {};
  const value = Number(text.trim().replace(",", "."));
  const range = max > 1e6 ? `of ${min} or more` : `from ${min} to ${max}`;
  if (!Number.isFinite(value) || value < min || value > max || (integer && !Number.isInteger(value))) {
    return { error: `Not used: it must be a ${integer ? "whole number" : "number"} ${range}.` };
  }
  return { value };
}

export class Settings {
  /** What is sent with each request. @type {Record<string, unknown>} */
  #values = {};
  /** @type {Map<string, {input: HTMLInputElement | HTMLTextAreaElement, error: HTMLElement, field: Field}>} */
  #inputs = new Map();

  /**
   * @param {Element} container where the form is shown
   * @param {() => void} onChange
   */
  constructor(container, onChange) {
    this.onChange = onChange;
    this.#load();
    for (const { title, fields } of GROUPS) {
      const id = `group-${fields[0].name}`;
      container.append(
        element(
          "section",
          { "aria-labelledby": id },
          element("h3", { id }, title),
          element("div", { class: "fields" }, ...fields.map((field) => this.#fieldNode(field))),
        ),
      );
    }
    container.append(
      element(
        "button",
        { type: "button", class: "button", id: "reset", onclick: () => this.#reset() },
        "Use the server’s defaults",
      ),
    );
    this.#fill();
  }

  /** A copy of the settings, by their names in the request. @returns {Record<string, unknown>} */
  get values() {
    return structuredClone(this.#values);
  }

  /** The settings in a few words, such as "temperature 0.7", or "" if none is set. */
  get summary() {
    return FIELDS.filter(({ name }) => name in this.#values)
      .map(({ name, label }) => {
        const value = this.#values[name];
        const number =
          typeof value === "number" ? value.toLocaleString("en", { useGrouping: false, maximumFractionDigits: 6 }) : "";
        return `${label.toLowerCase()} ${number}`.trim();
      })
      .join(" · ");
  }

  /** Moves the focus to a field. @param {string} name */
  focus(name) {
    this.#inputs.get(name)?.input.focus();
  }

  /** @param {Field} field */
  #fieldNode(field) {
    const { name, label, help, unset = "default" } = field;
    const many = name === "stop";
    const input = element(many ? "textarea" : "input", {
      id: `setting-${name}`,
      placeholder: unset,
      autocomplete: "off",
      spellcheck: "false",
      "aria-describedby": `help-${name} error-${name}`,
      oninput: () => this.#read(name),
      ...(many ? { rows: 2 } : { type: "text", inputmode: field.integer ? "numeric" : "decimal" }),
    });
    const error = element("small", { id: `error-${name}`, class: "field-error", role: "alert" });
    this.#inputs.set(name, { input, error, field });
    return element(
      "div",
      { class: many ? "field wide" : "field" },
      element("label", { for: `setting-${name}` }, label),
      input,
      element("small", { id: `help-${name}` }, help),
      error,
    );
  }

  /** Takes over what was typed. A value that is not allowed is explained and not sent. @param {string} name */
  #read(name) {
    const entry = this.#inputs.get(name);
    if (!entry) return;
    const { value, error } = readField(entry.field, entry.input.value);
    entry.error.textContent = error ?? "";
    entry.input.setAttribute("aria-invalid", String(error !== undefined));
    if (value === undefined) delete this.#values[name];
    else this.#values[name] = value;
    this.#save();
  }

  #reset() {
    this.#values = {};
    this.#fill();
    this.#save();
  }

  #fill() {
    for (const [name, { input, error }] of this.#inputs) {
      const value = this.#values[name];
      input.value = value === undefined ? "" : name === "stop" ? stopText(value) : String(value);
      input.setAttribute("aria-invalid", "false");
      error.textContent = "";
    }
  }

  #load() {
    let stored;
    try {
      stored = JSON.parse(preference("settings") || "{}");
    } catch {
      return;
    }
    for (const field of FIELDS) {
      const value = stored?.[field.name];
      if (value === undefined) continue;
      const { value: read } = readField(field, field.name === "stop" ? stopText(value) : String(value));
      if (read !== undefined) this.#values[field.name] = read;
    }
  }

  #save() {
    setPreference("settings", JSON.stringify(this.#values));
    this.onChange();
  }
}
