// Stands between the browser and the server that is checked: passes everything on, and answers itself only what a server
// cannot be made to do at will, such as failing in the middle of an answer or answering slowly.
//
// A chat completion whose last message is ends with `script:NAME` is answered by the script NAME below. `override` answers any
// other address.

import http from "node:http";

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export const MARKDOWN = `# A heading

Some *emphasis*, **strong text**, ***both***, ~~struck~~, \`inline code\` and snake_case_words.
A second line. See [the site](https://example.com/a_(b)), <https://example.com/auto> or https://example.com/bare.

1. First
2. Second
   - nested *item*
   - another
3. Third

- [x] done
- [ ] to do

| Name | Right | Centre |
| :--- | ---: | :---: |
| one \\| bar | 1 | a |
| two | 22 | **b** |

> A quote
> of two lines

---

\`\`\`rust
// Adds two numbers.
fn add(a: u32, b: u32) -> u32 {
    let name = "text <b>&amp;</b>";
    a + b + 42
}
\`\`\`

![an image](https://example.com/picture.png)
`;

// Each line is something that must stay text.
const HOSTILE = `<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>
[click](javascript:window.hacked=1) [data](data:text/html,<script>window.hacked=1</script>)
<a href="javascript:window.hacked=1">x</a> <iframe src="https://example.com"></iframe>
[ok](https://example.com/"onmouseover="window.hacked=1) <javascript:window.hacked=1>

| <svg onload="window.hacked = 1"> | b |
| --- | --- |
| <style>* { display: none }</style> | [x](vbscript:x) |

\`\`\`"><img src=x onerror="window.hacked=1">
<script>window.hacked = 1</script>
\`\`\`
`;

/** The tokens of the script `tokens`; behind them come a character in two pieces and a special token. */
export const TOKENS = [
  [
    "The",
    [
      ["The", -0.01],
      ["A", -4.7],
      ["It", -6.1],
      ["\n", -7.2],
      ["", -8],
    ],
  ],
  [
    " capital",
    [
      [" capital", -0.1],
      [" city", -2.5],
      [" largest", -4.1],
    ],
  ],
  [
    " of",
    [
      [" of", -0.4],
      [" in", -1.3],
    ],
  ],
  [
    " France",
    [
      [" France", -0.7],
      [" the", -0.9],
    ],
  ],
  [
    " is",
    [
      [" is", -1.2],
      [" was", -0.8],
      [" has", -1.6],
    ],
  ],
  [
    " surely",
    [
      [" Paris", -0.2],
      [" the", -2.2],
      [" surely", -3.4],
    ],
  ],
  [
    " Paris",
    [
      [" Paris", -0.02],
      [" Lyon", -4.3],
    ],
  ],
  [
    ".\n",
    [
      [".\n", -0.03],
      [".", -3.6],
    ],
  ],
];
const HALVES = [[0xc3], [0xa9]];

function chunk(response, choice, rest = {}) {
  const body = {
    id: "scripted",
    object: "chat.completion.chunk",
    choices: choice ? [{ index: 0, ...choice }] : [],
    ...rest,
  };
  response.write(`data: ${JSON.stringify(body)}\n\n`);
}

function begin(response) {
  response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-store" });
}

function text(response, content) {
  chunk(response, { delta: { content }, finish_reason: null });
}

function end(response, finish_reason, usage) {
  chunk(response, { delta: {}, finish_reason });
  chunk(response, null, { usage });
  response.end("data: [DONE]\n\n");
}

const USAGE = {
  prompt_tokens: 123,
  completion_tokens: 21,
  total_tokens: 144,
  prompt_tokens_details: { cached_tokens: 100 },
};

function refuse(response, status, message, headers = {}) {
  response.writeHead(status, { "Content-Type": "application/json", ...headers });
  response.end(JSON.stringify({ error: { message, type: "error", param: null, code: null } }));
}

/** Content in pieces of a few characters, as tokens would come. */
async function stream(response, content, { ms = 1, length = 7 } = {}) {
  for (let at = 0; at < content.length && !response.destroyed; at += length) {
    text(response, content.slice(at, at + length));
    await sleep(ms);
  }
}

const tries = new Map();

/** @type {Record<string, (response: http.ServerResponse, body: any, request: http.IncomingMessage) => Promise<void> | void>} */
const SCRIPTS = {
  async markdown(response) {
    begin(response);
    await stream(response, MARKDOWN);
    end(response, "stop", USAGE);
  },
  async hostile(response) {
    begin(response);
    await stream(response, HOSTILE);
    end(response, "stop", USAGE);
  },
  async long(response) {
    begin(response);
    await stream(response, Array.from({ length: 80 }, (_, i) => `Paragraph ${i + 1}.`).join("\n\n"), { ms: 2 });
    end(response, "stop", USAGE);
  },
  // Ends only when the browser hangs up.
  async slow(response) {
    begin(response);
    for (let i = 1; !response.destroyed; i += 1) {
      text(response, `word${i} `);
      await sleep(40);
    }
  },
  async silent(response) {
    begin(response);
    while (!response.destroyed) {
      response.write(": still here\n\n");
      await sleep(50);
    }
  },
  async paced(response) {
    begin(response);
    await sleep(200);
    for (let i = 0; i < 21; i += 1) {
      text(response, "tick ");
      await sleep(25);
    }
    end(response, "stop", USAGE);
  },
  // Events cut at every byte, CR LF line ends, comments, a field that means nothing, a character cut in two.
  async bytes(response) {
    begin(response);
    const event = `: comment\r\nevent: message\r\ndata: ${JSON.stringify({ choices: [{ delta: { content: "Grüße 你好 👋" } }] })}\r\n\r\n`;
    for (const byte of Buffer.from(event)) {
      response.write(Buffer.from([byte]));
      await sleep(1);
    }
    end(response, "stop", USAGE);
  },
  async tokens(response, body) {
    begin(response);
    const wanted = body.logprobs === true && body.top_logprobs === 5;
    for (const [token, top] of TOKENS) {
      const logprob = top.find(([other]) => other === token)[1];
      const item = {
        token,
        logprob,
        bytes: [...Buffer.from(token)],
        top_logprobs: top.map(([other, value]) => ({ token: other, logprob: value, bytes: [...Buffer.from(other)] })),
      };
      chunk(response, {
        delta: { content: token },
        logprobs: wanted ? { content: [item] } : null,
        finish_reason: null,
      });
      await sleep(2);
    }
    const halves = HALVES.map((bytes) => ({
      token: "\uFFFD",
      logprob: -0.5,
      bytes,
      top_logprobs: [{ token: "\uFFFD", logprob: -0.5, bytes }],
    }));
    const special = { token: "<extra_id_9>", logprob: -0.01, bytes: [], top_logprobs: [] };
    const content = [...halves, special];
    chunk(response, { delta: { content: "é" }, logprobs: wanted ? { content } : null, finish_reason: null });
    end(response, "stop", USAGE);
  },
  length(response, body) {
    begin(response);
    text(response, "This answer is cut");
    end(response, "length", { ...USAGE, completion_tokens: body.max_tokens ?? 200 });
  },
  empty(response) {
    begin(response);
    end(response, "stop", { ...USAGE, completion_tokens: 0 });
  },
  failing(response) {
    begin(response);
    text(response, "This answer begins");
    response.write(`data: ${JSON.stringify({ error: { message: "the GPU ran out of memory" } })}\n\n`);
    response.end("data: [DONE]\n\n");
  },
  async broken(response) {
    begin(response);
    text(response, "This answer begins");
    await sleep(50);
    response.destroy();
  },
  ended(response) {
    begin(response);
    text(response, "This answer begins");
    response.end();
  },
  refused(response) {
    refuse(response, 400, "The prompt has 5000 tokens; the model takes 4096.");
  },
  failed(response) {
    response.writeHead(502, { "Content-Type": "text/html" });
    response.end("<h1>Bad gateway</h1>");
  },
  // Refused once, then answered.
  busy(response) {
    if (!tries.get("busy")) {
      tries.set("busy", true);
      return refuse(response, 429, "64 requests are waiting.", { "Retry-After": "2" });
    }
    tries.delete("busy");
    begin(response);
    text(response, "There was room.");
    end(response, "stop", USAGE);
  },
  unavailable(response) {
    refuse(response, 503, "The server is shutting down.", { "Retry-After": "30" });
  },
  key(response, _, request) {
    if (request.headers.authorization !== "Bearer right-key")
      return refuse(response, 401, "The API key is missing or wrong.");
    begin(response);
    text(response, "The key fits.");
    end(response, "stop", USAGE);
  },
};

/**
 * Starts the proxy before the server at `base`.
 *
 * `requests` collects the chat completions that were asked for. `override` maps a path to a function that answers it in
 * the server's place; where it returns false, the server answers. The server is also found below `/below/`.
 */
export async function startProxy(base) {
  const target = new URL(base);
  const requests = [];
  const override = new Map();
  const server = http.createServer(async (request, response) => {
    response.on("error", () => {});
    const pieces = [];
    try {
      for await (const piece of request) pieces.push(piece);
    } catch {
      return response.destroy();
    }
    const raw = Buffer.concat(pieces);
    const url = request.url.replace(/^\/below\//, "/");
    const { pathname } = new URL(url, base);
    const answer = override.get(pathname);
    if (answer && answer(request, response) !== false) return;
    if (request.method === "POST" && pathname === "/v1/chat/completions") {
      const body = JSON.parse(raw.toString());
      requests.push({ body, headers: request.headers });
      const name = /script:(\w+)\s*$/.exec(body.messages.at(-1).content)?.[1];
      if (name) return SCRIPTS[name](response, body, request);
    }
    const passed = http.request(
      {
        host: target.hostname,
        port: target.port,
        path: url,
        method: request.method,
        headers: { ...request.headers, host: target.host },
      },
      (reply) => {
        response.writeHead(reply.statusCode, reply.headers);
        reply.pipe(response);
      },
    );
    passed.on("error", () => response.destroy());
    response.on("close", () => passed.destroy());
    passed.end(raw);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    url: `http://127.0.0.1:${server.address().port}/`,
    requests,
    override,
    close: () => server.closeAllConnections() || server.close(),
  };
}
