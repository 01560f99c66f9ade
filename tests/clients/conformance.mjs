// OpenAI's own npm client, unmodified, against a gateway: node conformance.mjs URL KEY MODEL. Prints one JSON document.
import OpenAI, { APIError, AuthenticationError, BadRequestError, NotFoundError } from "openai";

const [, , baseURL, apiKey, model] = process.argv;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const found = {};

const models = await client.models.list();
found.models = models.data.map((item) => item.id);
found.model = (await client.models.retrieve(model)).id;

const { data: whole, response } = await client.chat.completions
  .create({ model, messages, max_tokens: 12, temperature: 0 })
  .withResponse();
found.text = whole.choices[0].message.content;
found.role = whole.choices[0].message.role;
found.finish = whole.choices[0].finish_reason;
found.usage = whole.usage;
found.requestHeader = response.headers.get("x-bsns-request-id");
found.price = whole.bsns.price_wei;

const stream = await client.chat.completions.create({
  model,
  messages,
  max_tokens: 12,
  temperature: 0,
  stream: true,
  stream_options: { include_usage: true },
});
found.pieces = [];
for await (const chunk of stream) {
  if (chunk.choices.length > 0) {
    found.pieces.push(chunk.choices[0].delta.content ?? "");
    found.streamedFinish = chunk.choices[0].finish_reason ?? found.streamedFinish;
  }
  if (chunk.usage) found.streamedUsage = chunk.usage;
}

// The helper that puts a stream together again.
const runner = client.chat.completions.stream({ model, messages, max_tokens: 12, temperature: 0 });
found.assembled = (await runner.finalChatCompletion()).choices[0].message.content;

const legacy = await client.completions.create({ model, prompt: ["Once upon", "The sky"], max_tokens: 4, n: 2, seed: 3 });
found.legacy = legacy.choices.map((item) => [item.index, item.text.length > 0, item.finish_reason]);

const given = async (promise) => {
  try {
    await promise;
    return "no error";
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, known: error instanceof APIError };
  }
};
found.errors = {
  model: await given(client.chat.completions.create({ model: "nothing", messages })),
  parameter: await given(client.chat.completions.create({ model, messages, temperature: 7 })),
  key: await given(new OpenAI({ baseURL, apiKey: "bsns-wrong", maxRetries: 0 }).models.list()),
};
found.classes = [NotFoundError.name, BadRequestError.name, AuthenticationError.name];
console.log(JSON.stringify(found));
