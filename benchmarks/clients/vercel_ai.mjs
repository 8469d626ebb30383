// The Vercel AI SDK with @ai-sdk/openai-compatible: tools over several steps, structured output, stream.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "dualpath",
  baseURL: `${url}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const common = { model: provider(model), maxRetries: 0, temperature: 0, maxOutputTokens: 60 };
const weather = tool({
  description: "The weather of a city",
  inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
  execute: async ({ city }) => `sunny in ${city}`,
});
const { steps } = await generateText({
  ...common,
  prompt: "How is the weather in Paris?",
  tools: { weather },
  toolChoice: "required",
  stopWhen: stepCountIs(2),
});
assert(steps.length === 2 && steps.every((step) => step.toolCalls.length > 0));
const { object } = await generateObject({
  ...common,
  schema: z.object({ sunny: z.boolean() }),
  prompt: "Paris is sunny.",
});
assert(typeof object.sunny === "boolean");
const streamed = streamText({ ...common, prompt: "Say hello.", tools: { weather } });
for await (const _part of streamed.fullStream);
const usage = await streamed.usage;
assert(usage.outputTokens > 0);
console.log(`${steps.length} steps with calls, an object, a stream of ${usage.outputTokens} tokens`);
