// Checks OpenAI's library for node against a server of tiny-chat that wants the API key `secret`.

import { execFileSync } from "node:child_process";
import { VERSION } from "openai/version";
import OpenAI from "openai";

const [url] = process.argv.slice(2);
if (!url) {
  console.error("usage: node check_openai.mjs BASE_URL");
  process.exit(2);
}
const name = `openai-node ${VERSION}, node ${process.versions.node}`;
const model = "Nemotron-3-8B-Chat-4K-RLHF";
const paris = "What is the capital of France?";
const water = 'What is "water" in Chinese?';
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "secret", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const chat = (question, settings = {}) => client.chat.completions.create({ model, messages: user(question), ...settings });
let passed = 0;
let failed = 0;

function equal(what, found, expected) {
  const [a, b] = [found, expected].map((value) => JSON.stringify(value) ?? "undefined");
  const holds = a === b;
  holds ? passed++ : failed++;
  console.log(holds ? `ok   ${name}: ${what}` : `FAIL ${name}: ${what}: found ${a}, expected ${b}`);
}

async function runs(what, call) {
  try {
    await call();
  } catch (error) {
    equal(what, String(error), "no exception");
  }
}

async function raises(what, kind, expected, call) {
  try {
    equal(what, await call(), "an error");
  } catch (error) {
    const found = error instanceof kind ? { status: error.status, code: error.code, param: error.param } : String(error);
    equal(what, found, expected);
  }
}

function run(question) {
  const { AOTRON, ENGINE } = process.env;
  return JSON.parse(execFileSync(AOTRON, ["run", ENGINE, "--format", "json", "--prompt", question])).text.trim();
}

await runs("chat", async () => {
  const reply = await chat(paris);
  equal("chat: the answer is that of aotron run", reply.choices[0].message.content, run(paris));
  equal("chat: finish_reason", reply.choices[0].finish_reason, "stop");
  equal("chat: the request's id", typeof reply._request_id, "string");
  equal("chat: usage", reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
  equal("chat: an answer that is not ASCII", (await chat(water)).choices[0].message.content, "水");
  equal("chat: stop", (await chat(paris, { stop: " is" })).choices[0].message.content, "The capital of France");
  const hot = { temperature: 6, seed: 5, n: 3, max_completion_tokens: 20 };
  const texts = (reply) => reply.choices.map((choice) => choice.message.content);
  const first = texts(await chat(paris, hot));
  equal("chat: n and seed: the same again", texts(await chat(paris, hot)), first);
  equal("chat: n: different answers", new Set(first).size > 1, true);
  const content = (await chat(paris, { logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
  equal("chat: logprobs", content.every((t) => t.top_logprobs.length === 2 && t.top_logprobs[0].logprob === t.logprob), true);
});

await runs("stream", async () => {
  for (const question of [paris, water]) {
    let text = "";
    let usage = null;
    for await (const chunk of await chat(question, { stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    equal(`stream: the text of ${question}`, text, run(question));
    equal("stream: usage", usage?.total_tokens > 0, true);
  }
  const runner = client.chat.completions.stream({ model, messages: user(paris) });
  equal("stream: the library's own accumulation", await runner.finalContent(), run(paris));
  const stopped = await chat("Count from 1 to 9.", { stream: true });
  for await (const _ of stopped) break;
  equal("stream: left by the client, and another answered", (await chat(water)).choices[0].message.content, "水");
});

await runs("completions", async () => {
  const prompt = `<extra_id_0>System\n\n<extra_id_1>User\n${paris}\n<extra_id_1>Assistant\n`;
  const reply = await client.completions.create({ model, prompt, max_tokens: 200 });
  equal("completions: the answer", reply.choices[0].text.trim(), run(paris));
  const echoed = await client.completions.create({ model, prompt: [[4, 306, 7], [7]], max_tokens: 1, echo: true, logprobs: 1 });
  equal("completions: echo of token ids", echoed.choices.map((c) => c.logprobs.token_logprobs.length), [4, 2]);
});

await runs("models", async () => {
  const ids = [];
  for await (const one of client.models.list()) ids.push(one.id);
  equal("models: the list", ids, [model]);
  equal("models: retrieve", (await client.models.retrieve(model)).id, model);
});

const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
const of = (status, code, param) => ({ status, code, param });
await raises("401", OpenAI.AuthenticationError, of(401, "invalid_api_key", null), () => stranger.models.list());
await raises("404: a model", OpenAI.NotFoundError, of(404, "model_not_found", "model"), () => chat(paris, { model: "gpt-4o" }));
await raises("400: a field", OpenAI.BadRequestError, of(400, null, "n"), () => chat(paris, { n: 0 }));
try {
  equal("400: too long", await chat("word ".repeat(600)), "an error");
} catch (error) {
  equal("400: too long", [error.status, error.code], [400, "context_length_exceeded"]);
}
console.log(`${name}: ${passed} passed, ${failed} failed`);
process.exit(failed || !passed ? 1 : 0);
