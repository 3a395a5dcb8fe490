// The server's HTTP interface: OpenAI's chat completions, and what the page asks before the first one.
//
// Addresses are relative to the page's, so that it works behind a proxy that serves it below a path.

import { preference, setPreference } from "./preferences.js";
import { eventData } from "./sse.js";

/**
 * @typedef {"network" | "key" | "loading" | "busy" | "request" | "server" | "stream"} Kind
 *   network: no answer at all; key: an API key is missing or wrong; loading: the model is not ready; busy: too many
 *   requests; request: the request was refused; server: the server failed; stream: an answer that broke off
 */

/** A request that failed. Its message is a sentence for the user. */
export class ApiError extends Error {
  /**
   * @param {Kind} kind
   * @param {string} message
   * @param {number | null} [retryAt] time in ms since the epoch before which the server wants no retry
   */
  constructor(kind, message, retryAt = null) {
    super(message);
    this.kind = kind;
    this.retryAt = retryAt;
  }
}

/** The API key of this tab, or "". It is kept until the tab is closed, and nowhere else. */
export function apiKey() {
  return preference("key", true);
}

/** @param {string} key "" forgets it */
export function setApiKey(key) {
  setPreference("key", key, true);
}

/**
 * @param {string} path
 * @param {RequestInit} [init]
 * @returns {Promise<Response>} of any status
 * @throws {ApiError | DOMException} the latter if it was aborted
 */
async function exchange(path, init = {}) {
  const headers = new Headers(init.headers);
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  try {
    return await fetch(new URL(path, document.baseURI), { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError("network", "The server does not answer. Is it still running?");
  }
}

/**
 * @param {string} path
 * @param {RequestInit} [init]
 * @returns {Promise<Response>} of a 2xx status
 * @throws {ApiError | DOMException} the latter if it was aborted
 */
async function request(path, init = {}) {
  const response = await exchange(path, init);
  if (!response.ok) throw await refusal(response);
  return response;
}

/** @param {Response} response */
async function refusal(response) {
  const text = await response.text().catch(() => "");
  let said = "";
  try {
    const body = JSON.parse(text);
    const message = body?.error?.message ?? body?.error ?? body?.message;
    if (typeof message === "string") said = sentence(message.trim());
  } catch {
    // A proxy's HTML page says less than the status does.
  }
  const retryAt = retryTime(response.headers.get("Retry-After"));
  switch (response.status) {
    case 401:
      return new ApiError(
        "key",
        apiKey() ? "The server does not accept this API key." : "The server asks for an API key.",
      );
    case 429:
      return new ApiError("busy", said || "The server has too many requests.", retryAt);
    case 503:
      return new ApiError("busy", said || "The server cannot take a request now.", retryAt);
    default: {
      const status = `${response.status} ${response.statusText}`.trim();
      return new ApiError(response.status < 500 ? "request" : "server", said || `The server answered ${status}.`);
    }
  }
}

/** A message as a sentence: with a capital, unless it begins with a name, and with a full stop. @param {string} text */
function sentence(text) {
  const capital = text.replace(/^[a-z]+(?=[ ,])/, (word) => word[0].toUpperCase() + word.slice(1));
  return /[\p{L}\p{N}`)]$/u.test(capital) ? `${capital}.` : capital;
}

/** @param {string | null} header seconds or a date */
function retryTime(header) {
  if (!header) return null;
  const time = /^\d+$/.test(header.trim()) ? Date.now() + Number(header) * 1000 : Date.parse(header);
  return Number.isFinite(time) ? time : null;
}

/** The server's version, or "" if it does not say. */
export async function serverVersion() {
  try {
    const { version } = await (await request("version")).json();
    return typeof version === "string" ? version : "";
  } catch {
    return "";
  }
}

/**
 * Resolves once the server can answer.
 *
 * @throws {ApiError} `loading` while it loads the model, `server` if it cannot
 */
export async function checkReady() {
  const response = await exchange("ready");
  // A server that has no such address says no more about being ready than /v1/models does.
  if (response.status !== 503) return;
  const body = await response.json().catch(() => null);
  const models = Array.isArray(body?.models) ? body.models : [];
  const failed = models.find((/** @type {any} */ model) => model?.state === "failed");
  if (failed)
    throw new ApiError("server", `The model ${failed.name} cannot be loaded. The server’s log has the reason.`);
  if (body?.draining) throw new ApiError("busy", "The server is shutting down.");
  throw new ApiError("loading", "The model is loading.", retryTime(response.headers.get("Retry-After")));
}

/**
 * @typedef {{id: string, maxTokens: number | null}} Model maxTokens: of prompt and answer together, if the server says
 * @returns {Promise<Model[]>}
 */
export async function models() {
  const response = await request("v1/models");
  const body = await response.json().catch(() => null);
  const list = Array.isArray(body?.data)
    ? body.data.filter((/** @type {any} */ model) => typeof model?.id === "string")
    : [];
  if (!list.length) throw new ApiError("server", "The server names no model.");
  return list.map((/** @type {any} */ model) => ({
    id: model.id,
    maxTokens: Number.isSafeInteger(model.max_model_len) ? model.max_model_len : null,
  }));
}

/**
 * Requests a streamed chat completion and yields its chunks, as OpenAI defines them.
 *
 * @param {object} body the request
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any, void, void>}
 * @throws {ApiError | DOMException} the latter if it was aborted
 */
export async function* complete(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.body) throw new ApiError("stream", "The server sent no answer.");
  const cut = "The connection ended before the answer did.";
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk.error) {
        const said = chunk.error.message ?? chunk.error;
        throw new ApiError(
          "stream",
          typeof said === "string" ? sentence(said) : "The server ended the answer with an error.",
        );
      }
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    throw new ApiError("stream", cut);
  }
  throw new ApiError("stream", cut);
}

/** @param {string} data */
function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk !== null && typeof chunk === "object") return chunk;
  } catch {
    // Said below.
  }
  throw new ApiError("stream", "The server sent what is not a chat completion.");
}
