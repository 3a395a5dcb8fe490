// A conversation: a tree of messages, of which one path is shown.
//
// Editing a message or asking again adds a sibling, so nothing is ever overwritten. `chosen` says for every message (and
// for the root, "") which of its children the path goes through.

/**
 * @typedef {"user" | "assistant"} Role
 *
 * @typedef {object} Token a generated token
 * @property {string} text
 * @property {number | null} logprob natural logarithm of its probability
 * @property {number[] | null} bytes its UTF-8 bytes, which need not be whole characters
 * @property {[string, number | null][]} top the most probable tokens in its place, with their logprobs
 *
 * @typedef {object} Usage
 * @property {number} prompt tokens
 * @property {number | null} cached tokens of the prompt that were in the KV cache; null if the server does not say
 * @property {number} completion tokens
 *
 * @typedef {object} Failure
 * @property {string} kind one of ApiError's
 * @property {string} message
 * @property {number | null} retryAt time in ms since the epoch before which the server wants no retry
 *
 * @typedef {object} Answer how an assistant's message came about
 * @property {"waiting" | "streaming" | "done" | "stopped" | "failed" | "edited"} state
 * @property {string} model
 * @property {Record<string, unknown>} settings sampling settings that were sent
 * @property {string | null} finish the server's finish_reason
 * @property {Failure | null} failure
 * @property {Usage | null} usage
 * @property {number | null} firstMs time from the request to the first token
 * @property {number | null} tokensPerSecond after the first token
 * @property {number} pieces pieces of text that arrived: about the number of tokens
 * @property {Token[] | null} tokens with probabilities, if they were asked for
 *
 * @typedef {object} Message
 * @property {string} id
 * @property {string} parent id, or "" for a first message
 * @property {Role} role
 * @property {string} content
 * @property {Answer} [answer] of an assistant's message
 *
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {boolean} renamed the title is the user's own
 * @property {number} created ms since the epoch
 * @property {number} updated ms since the epoch
 * @property {string} system the system message; empty for none
 * @property {Message[]} messages parents before children
 * @property {Record<string, string>} chosen id of a message, or "", to the id of its child on the path
 */

export const UNTITLED = "New conversation";
const TITLE_LENGTH = 60;

/** A random id. `crypto.randomUUID` is missing on pages served over HTTP from another machine. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @returns {Conversation} */
export function newConversation() {
  const now = Date.now();
  return {
    id: newId(),
    title: UNTITLED,
    renamed: false,
    created: now,
    updated: now,
    system: "",
    messages: [],
    chosen: {},
  };
}

/**
 * The messages with the parent `parent`, oldest first.
 *
 * @param {Conversation} conversation
 * @param {string} parent
 */
export function children(conversation, parent) {
  return conversation.messages.filter((message) => message.parent === parent);
}

/**
 * The shown messages, from the first one down.
 *
 * @param {Conversation} conversation
 * @returns {Message[]}
 */
export function path(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  // The newest child of each message, for where nothing was chosen.
  const newest = new Map(conversation.messages.map((message) => [message.parent, message]));
  const shown = [];
  for (let parent = ""; ;) {
    const chosen = byId.get(conversation.chosen[parent] ?? "");
    const next = chosen?.parent === parent ? chosen : newest.get(parent);
    if (!next) return shown;
    shown.push(next);
    parent = next.id;
  }
}

/**
 * Adds a message as the newest child of `parent` and chooses it.
 *
 * @param {Conversation} conversation
 * @param {string} parent
 * @param {Role} role
 * @param {string} content
 * @returns {Message}
 */
export function addMessage(conversation, parent, role, content) {
  const message = { id: newId(), parent, role, content };
  conversation.messages.push(message);
  conversation.chosen[parent] = message.id;
  touch(conversation);
  if (role === "user" && parent === "" && !conversation.renamed) conversation.title = titleFrom(content);
  return message;
}

/** @param {Conversation} conversation */
export function touch(conversation) {
  conversation.updated = Date.now();
}

/**
 * The title that a first message gives a conversation.
 *
 * @param {string} content
 */
export function titleFrom(content) {
  const line = content.trim().split(/\n/, 1)[0].replace(/\s+/g, " ");
  const characters = Array.from(line);
  if (characters.length <= TITLE_LENGTH) return line || UNTITLED;
  return `${characters
    .slice(0, TITLE_LENGTH - 1)
    .join("")
    .trimEnd()}…`;
}

/**
 * The messages of a request that is answered by a child of `leaf`: the system message, then the path to `leaf`.
 *
 * Answers without text, such as one that failed at once, are left out, and the user's messages on both sides of one
 * become a single message, since many chat templates want the roles to alternate.
 *
 * @param {Conversation} conversation
 * @param {string} leaf id of a user's message
 * @returns {{role: string, content: string}[]}
 */
export function requestMessages(conversation, leaf) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const ancestors = [];
  for (let message = byId.get(leaf); message; message = byId.get(message.parent)) ancestors.unshift(message);

  /** @type {{role: string, content: string}[]} */
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  for (const { role, content } of ancestors) {
    const last = messages.at(-1);
    if (content === "") continue;
    if (last?.role === role) last.content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  return messages;
}
