// One answer as it arrives: collects its text, tokens, usage and times.

import { ApiError, complete } from "./api.js";

/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./conversation.js").Token} Token */

/** Alternatives asked for in each token's place. */
export const TOP_LOGPROBS = 5;

/**
 * The answer of a message that has just been asked for.
 *
 * @param {string} model
 * @param {Record<string, unknown>} settings
 * @returns {import("./conversation.js").Answer}
 */
export function newAnswer(model, settings) {
  return {
    state: "waiting",
    model,
    settings,
    finish: null,
    failure: null,
    usage: null,
    firstMs: null,
    tokensPerSecond: null,
    pieces: 0,
    tokens: null,
  };
}

export class Generation {
  #abort = new AbortController();

  /**
   * @param {Message} message of the assistant, with an answer that waits; it is filled in place
   * @param {() => void} onUpdate called after each change of the message
   */
  constructor(message, onUpdate) {
    this.message = message;
    this.onUpdate = onUpdate;
  }

  /** Ends the answer where it is. */
  stop() {
    this.#abort.abort();
  }

  /**
   * Sends the request and fills the message until the answer has ended. Does not throw: failures are in the answer.
   *
   * @param {{role: string, content: string}[]} messages
   * @param {boolean} probabilities ask for the tokens' probabilities
   */
  async run(messages, probabilities) {
    const answer = /** @type {import("./conversation.js").Answer} */ (this.message.answer);
    const body = {
      model: answer.model,
      messages,
      stream: true,
      stream_options: { include_usage: true },
      ...(probabilities && { logprobs: true, top_logprobs: TOP_LOGPROBS }),
      ...answer.settings,
    };
    const start = performance.now();
    /** @type {number | null} */
    let first = null;
    let last = start;
    try {
      for await (const chunk of complete(body, this.#abort.signal)) {
        const choice = chunk.choices?.[0];
        const text = choice?.delta?.content;
        const tokens = choice?.logprobs?.content;
        if (typeof text === "string" && text !== "") {
          this.message.content += text;
          answer.pieces += 1;
          last = performance.now();
          first ??= last;
        }
        if (Array.isArray(tokens)) (answer.tokens ??= []).push(...tokens.map(token));
        if (typeof choice?.finish_reason === "string") answer.finish = choice.finish_reason;
        if (chunk.usage) answer.usage = usage(chunk.usage);
        if (first !== null) {
          answer.state = "streaming";
          answer.firstMs = first - start;
          answer.tokensPerSecond = rate(answer.tokens?.length ?? answer.pieces, last - first);
        }
        this.onUpdate();
      }
      answer.state = "done";
    } catch (error) {
      if (this.#abort.signal.aborted) {
        answer.state = "stopped";
      } else {
        answer.state = "failed";
        answer.failure = failure(error);
      }
    }
    if (first !== null) {
      const count = answer.usage?.completion ?? answer.tokens?.length ?? answer.pieces;
      answer.tokensPerSecond = rate(count, last - first);
    }
    this.onUpdate();
  }
}

/** Time within which tokens tell no speed: they come in pieces of the network's. */
const MIN_RATE_MS = 10;

/** @param {unknown} error */
function failure(error) {
  if (error instanceof ApiError) return { kind: error.kind, message: error.message, retryAt: error.retryAt };
  return { kind: "server", message: `The page failed: ${error}`, retryAt: null };
}

/**
 * Tokens per second after the first one, or null where it cannot be told: a short answer may arrive in one piece.
 *
 * @param {number} tokens
 * @param {number} ms
 */
function rate(tokens, ms) {
  return tokens > 1 && ms >= MIN_RATE_MS ? ((tokens - 1) * 1000) / ms : null;
}

/** @param {any} value @returns {Token} */
function token(value) {
  return {
    text: String(value?.token ?? ""),
    logprob: finite(value?.logprob),
    bytes: Array.isArray(value?.bytes) ? value.bytes.map(Number) : null,
    top: Array.isArray(value?.top_logprobs)
      ? value.top_logprobs.map((/** @type {any} */ other) => [String(other?.token ?? ""), finite(other?.logprob)])
      : [],
  };
}

/** @param {any} value @returns {import("./conversation.js").Usage} */
function usage(value) {
  return {
    prompt: finite(value.prompt_tokens) ?? 0,
    cached: finite(value.prompt_tokens_details?.cached_tokens),
    completion: finite(value.completion_tokens) ?? 0,
  };
}

/** @param {unknown} value */
function finite(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}
