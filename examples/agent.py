"""An agent on a real model, with the `openai` package alone: it looks at files with tools until it gives an answer.

    dualpath checkpoint .models/smollm2 --real
    dualpath serve --model .models/smollm2 --store .store/agent      # in another terminal
    python examples/agent.py [--url http://127.0.0.1:8000/v1] [--turns 6]

Each turn's prompt is the one before and what came of it, so its KV is already in storage: see "cached". Calls are
enforced by grammar (``tool_choice``), so even a model of 135M parameters calls a tool that exists, with arguments that
are valid. What it makes of the results is another matter. It can run only the commands listed here, in a new directory.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from openai import OpenAI

FILES = {"apples.txt": "12 apples\n", "pears.txt": "30 pears\n", "readme.txt": "Fruit that we have, a file a kind.\n"}
COMMANDS = ["ls", "wc -l apples.txt pears.txt", "tail -n 1 readme.txt", "sort -n apples.txt pears.txt"]
TASK = (
    "Find out how many apples and how many pears there are. Look with the tools first, then finish with both numbers."
)
SYSTEM = "You are a careful clerk. You answer every message with one call of a tool. You never do the same twice."
WAIT_S = 120.0


def tool(name: str, description: str, /, **properties: dict[str, Any]) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    function = {"name": name, "description": description, "parameters": schema, "strict": True}
    return {"type": "function", "function": function}


TOOLS = [
    tool("run", "Run a shell command.", command={"type": "string", "enum": COMMANDS}),
    tool("read_file", "Read a file.", name={"type": "string", "enum": list(FILES)}),
    tool(
        "finish",
        "Give the answer and end.",
        apples={"type": "integer", "minimum": 0, "maximum": 99},
        pears={"type": "integer", "minimum": 0, "maximum": 99},
    ),
]


def perform(name: str, arguments: dict[str, Any], folder: Path) -> str:
    """Returns what a tool found."""
    if name == "read_file":
        return (folder / arguments["name"]).read_text()
    ended = subprocess.run(
        shlex.split(arguments["command"]), cwd=folder, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    return ended.stdout + ended.stderr


def work(client: OpenAI, model: str, folder: Path, turns: int) -> dict[str, Any]:
    """Returns the arguments of `finish`, which the last turn must call."""
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK}]
    for turn in range(1, turns + 1):
        choice: Any = "required" if turn < turns else {"type": "function", "function": {"name": "finish"}}
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=100
        )
        message, usage = answer.choices[0].message, answer.usage
        messages.append(message)
        for call in message.tool_calls or []:
            name, arguments = call.function.name, json.loads(call.function.arguments)
            cached = usage.prompt_tokens_details.cached_tokens
            print(f"turn {turn}: {usage.prompt_tokens:4} prompt tokens, {cached:4} cached: {name}({arguments})")
            if name == "finish":
                return arguments
            result = perform(name, arguments, folder)
            print("       " + result.rstrip().replace("\n", "\n       "))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    raise SystemExit(f"the model called no tool in turn {turn}: {message.content!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server's API (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=6, help="most turns (default: %(default)s)")
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key="none", timeout=WAIT_S)
    model = client.models.list().data[0].id
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            Path(folder, name).write_text(text)
        found = work(client, model, Path(folder), options.turns)
    print(f"{model} says: {found['apples']} apples, {found['pears']} pears")


if __name__ == "__main__":
    main()
