// The npm package `openai`: models, tool call and its result, stream, responses.
import assert from "node:assert";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
const settings = { model, tools, max_tokens: 60, temperature: 0 };
const messages = [{ role: "user", content: "How is the weather in Paris?" }];
assert((await client.models.list()).data.some((card) => card.id === model));
const first = await client.chat.completions.create({ ...settings, messages, tool_choice: "required" });
const call = first.choices[0].message.tool_calls[0];
assert(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
messages.push(first.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sunny" });
const streamed = await client.chat.completions.stream({ ...settings, messages }).finalChatCompletion();
assert(streamed.choices[0].message.content);
const events = [];
const stream = await client.responses.create({ model, input: "Say hello.", max_output_tokens: 20, stream: true });
for await (const event of stream) events.push(event.type);
assert(events.at(-1) === "response.completed" || events.at(-1) === "response.incomplete");
console.log(`models, tool call and its result, stream, ${events.length} events of a response`);
