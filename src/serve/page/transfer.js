// Conversations as a JSON file: written by the export, checked field by field by the import.

import { titleFrom } from "./conversation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Message} Message */

const FORMAT = "aotron-conversations";
const VERSION = 1;
/** The largest file that is read, in bytes. */
export const MAX_FILE_BYTES = 256 * 1024 * 1024;
const STATES = ["done", "stopped", "failed", "edited"];

/** @param {Conversation[]} conversations */
export function exportText(conversations) {
  return JSON.stringify(
    { format: FORMAT, version: VERSION, exported: new Date().toISOString(), conversations },
    null,
    1,
  );
}

/**
 * Reads an exported file. Fields that this page does not know are dropped.
 *
 * @param {string} text
 * @returns {Conversation[]}
 * @throws {Error} that names the field that is wrong, if the text is no such file
 */
export function importText(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`The file is not JSON: ${/** @type {Error} */ (error).message}`);
  }
  if (file?.format !== FORMAT) throw new Error("The file is not an export of this page: its “format” is another.");
  if (file.version !== VERSION) throw new Error(`The file has version ${file.version}; this page reads ${VERSION}.`);
  return list(file.conversations, "conversations").map((value, index) =>
    conversation(value, `conversations[${index}]`),
  );
}

/** @param {any} value @param {string} where @returns {Conversation} */
function conversation(value, where) {
  object(value, where);
  const messages = list(value.messages, `${where}.messages`).map((item, i) => message(item, `${where}.messages[${i}]`));
  // Parents come before children, so the messages are a tree.
  const seen = new Set([""]);
  for (const { id, parent } of messages) {
    if (!seen.has(parent)) throw new Error(`${where}: the message ${id} comes before its parent ${parent}.`);
    if (seen.has(id)) throw new Error(`${where}: two messages have the id ${id}.`);
    seen.add(id);
  }
  const chosen = Object.create(null);
  for (const [parent, child] of Object.entries(object(value.chosen ?? {}, `${where}.chosen`))) {
    if (seen.has(parent) && typeof child === "string" && seen.has(child)) chosen[parent] = child;
  }
  return {
    id: id(value.id, `${where}.id`),
    title: titleFrom(string(value.title, `${where}.title`)),
    renamed: value.renamed === true,
    created: number(value.created, `${where}.created`),
    updated: number(value.updated, `${where}.updated`),
    system: string(value.system ?? "", `${where}.system`),
    messages,
    chosen: { ...chosen },
  };
}

/** @param {any} value @param {string} where @returns {Message} */
function message(value, where) {
  object(value, where);
  if (value.role !== "user" && value.role !== "assistant")
    throw new Error(`${where}.role is neither user nor assistant.`);
  /** @type {Message} */
  const read = {
    id: id(value.id, `${where}.id`),
    parent: value.parent === "" ? "" : id(value.parent, `${where}.parent`),
    role: value.role,
    content: string(value.content, `${where}.content`),
  };
  if (value.role === "assistant")
    read.answer = answer(object(value.answer ?? {}, `${where}.answer`), `${where}.answer`);
  return read;
}

/** @param {any} value @param {string} where @returns {import("./conversation.js").Answer} */
function answer(value, where) {
  const usage = value.usage && {
    prompt: number(value.usage.prompt, `${where}.usage.prompt`),
    cached: optional(value.usage.cached, number, `${where}.usage.cached`),
    completion: number(value.usage.completion, `${where}.usage.completion`),
  };
  const failure = value.failure && {
    kind: string(value.failure.kind, `${where}.failure.kind`),
    message: string(value.failure.message, `${where}.failure.message`),
    retryAt: null,
  };
  return {
    // An answer that was still arriving when it was exported is as far as it will get.
    state: STATES.includes(value.state) ? value.state : "stopped",
    model: string(value.model ?? "", `${where}.model`),
    settings: object(value.settings ?? {}, `${where}.settings`),
    finish: optional(value.finish, string, `${where}.finish`),
    failure: failure ?? null,
    usage: usage ?? null,
    firstMs: optional(value.firstMs, number, `${where}.firstMs`),
    tokensPerSecond: optional(value.tokensPerSecond, number, `${where}.tokensPerSecond`),
    pieces: number(value.pieces ?? 0, `${where}.pieces`),
    tokens: value.tokens
      ? list(value.tokens, `${where}.tokens`).map((item, i) => token(item, `${where}.tokens[${i}]`))
      : null,
  };
}

/** @param {any} value @param {string} where @returns {import("./conversation.js").Token} */
function token(value, where) {
  object(value, where);
  return {
    text: string(value.text, `${where}.text`),
    logprob: optional(value.logprob, number, `${where}.logprob`),
    bytes: value.bytes ? list(value.bytes, `${where}.bytes`).map((byte) => number(byte, `${where}.bytes`) & 255) : null,
    top: list(value.top ?? [], `${where}.top`).map((pair) => [
      string(pair?.[0], `${where}.top`),
      optional(pair[1], number, `${where}.top`),
    ]),
  };
}

/** @param {any} value @param {string} where @returns {any} */
function object(value, where) {
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new Error(`${where} is not an object.`);
  return value;
}

/** @param {any} value @param {string} where @returns {any[]} */
function list(value, where) {
  if (!Array.isArray(value)) throw new Error(`${where} is not a list.`);
  return value;
}

/** @param {any} value @param {string} where @returns {string} */
function string(value, where) {
  if (typeof value !== "string") throw new Error(`${where} is not a string.`);
  return value;
}

/** @param {any} value @param {string} where @returns {string} */
function id(value, where) {
  if (typeof value !== "string" || !/^[\w-]{1,64}$/.test(value)) throw new Error(`${where} is not an id.`);
  return value;
}

/** @param {any} value @param {string} where @returns {number} */
function number(value, where) {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new Error(`${where} is not a number.`);
  return value;
}

/**
 * @template T
 * @param {any} value
 * @param {(value: any, where: string) => T} read
 * @param {string} where
 * @returns {T | null}
 */
function optional(value, read, where) {
  return value === null || value === undefined ? null : read(value, where);
}

/**
 * Has the browser save `text` as a file.
 *
 * @param {string} name
 * @param {string} text
 */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
