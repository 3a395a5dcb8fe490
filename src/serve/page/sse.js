// Server-sent events, as the HTML standard defines them, from a fetch body.

/** The longest line or event that is kept, in UTF-16 code units. */
const MAX_EVENT_LENGTH = 16 * 1024 * 1024;

/**
 * The data of each event of a stream. Comments, which keep the connection alive, and all fields but `data` are skipped.
 * Unlike a browser's EventSource, an event at the stream's end needs no blank line behind it.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string, void, void>}
 * @throws {Error} if an event never ends
 */
export async function* eventData(body) {
  const reader = body.pipeThrough(/** @type {any} */ (new TextDecoderStream())).getReader();
  /** @type {string[]} */
  let data = [];
  let length = 0;
  let rest = "";
  try {
    for (let done = false; !done;) {
      const chunk = await reader.read();
      done = chunk.done;
      const text = rest + (chunk.value ?? "");
      // A CR at the end may be half of a CR LF, so it waits for what follows.
      const end = done ? text.length : text.endsWith("\r") ? text.length - 1 : text.length;
      const lines = text.slice(0, end).split(/\r\n|\n|\r/);
      rest = done ? "" : lines.pop() + text.slice(end);
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
          length = 0;
        } else if (line.startsWith("data:")) {
          const value = line.slice(line[5] === " " ? 6 : 5);
          data.push(value);
          length += value.length;
        }
      }
      if (rest.length + length > MAX_EVENT_LENGTH) throw new Error("the server sent an event that does not end");
    }
    if (data.length) yield data.join("\n");
  } finally {
    // Ends the request if the caller has had enough.
    await reader.cancel().catch(() => {});
  }
}
