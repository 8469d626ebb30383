"""pydantic-ai, over chat and responses: typed output by tool call and by JSON schema, a stream, a second turn."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

url, model = sys.argv[1:3]
provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
settings = {"temperature": 0, "max_tokens": 80}


class Weather(BaseModel):
    """The weather of a city."""

    degrees: int
    sunny: bool


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        for output in (Weather, NativeOutput(Weather)):
            agent = Agent(kind(model, provider=provider), output_type=output, model_settings=settings, retries=2)
            answer = await agent.run("Paris: 23 degrees, sunny.")
            assert isinstance(answer.output, Weather)
        talker = Agent(kind(model, provider=provider), model_settings=settings)
        async with talker.run_stream("Say hello.") as streamed:
            text = await streamed.get_output()
        again = await talker.run("And again.", message_history=streamed.all_messages())
        assert text and again.usage.input_tokens


asyncio.run(main())
print("two APIs: typed output by tool call and by JSON schema, a stream, a second turn")
