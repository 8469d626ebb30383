"""An agent on a real model, with the `openai` package alone: it looks at files with tools until it gives an answer.

    dualpath checkpoint .models/smollm2 --real
    dualpath serve --model .models/smollm2 --store .store/agent      # in another terminal
    python examples/agent.py [--url http://127.0.0.1:8000/v1]

Each turn's prompt is the one before and what came of it, so its KV is already in storage: see "cached". Calls are
enforced by grammar (``tool_choice``), so even a model of 135M parameters calls a tool that exists, with arguments that
are valid; left alone it would do the same for ever, so it may call each tool once. It can run only the commands that
are listed here, in a new directory.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from openai import OpenAI

FILES = {"fruit.txt": "12 apples\n30 pears\n", "notes.txt": "All fruit is in fruit.txt.\n"}
COMMANDS = ["ls", "wc -l fruit.txt", "sort -n fruit.txt"]
SYSTEM = "You are a careful clerk. You answer every message with one call of a tool."
TASK = "How many apples and how many pears are there? Look at the files, then finish with both numbers."
WAIT_S = 120.0


def tool(name: str, description: str, /, **properties: dict[str, Any]) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    function = {"name": name, "description": description, "parameters": schema, "strict": True}
    return {"type": "function", "function": function}


NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
TOOLS = [
    tool("run", "Run a command.", command={"type": "string", "enum": COMMANDS}),
    tool("read_file", "Read a file.", name={"type": "string", "enum": list(FILES)}),
    tool("finish", "Give the answer.", apples=NUMBER, pears=NUMBER),
]


def perform(name: str, arguments: dict[str, Any], folder: Path) -> str:
    """Returns what a tool found."""
    if name == "read_file":
        return (folder / arguments["name"]).read_text()
    command = shlex.split(arguments["command"])
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=WAIT_S, check=False)
    return ended.stdout + ended.stderr


def one_of(names: list[str]) -> Any:
    """Returns the `tool_choice` that makes the model call one of these. The tools, and so the prompt, stay the same."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}


def work(client: OpenAI, model: str, folder: Path) -> dict[str, Any]:
    """Returns the arguments of `finish`, which is called when the other tools were."""
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK}]
    left = [one["function"]["name"] for one in TOOLS if one["function"]["name"] != "finish"]
    while True:
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,
            tool_choice=one_of(left or ["finish"]),
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=100,
        )
        message, usage = answer.choices[0].message, answer.usage
        (call,) = message.tool_calls
        name, arguments = call.function.name, json.loads(call.function.arguments)
        cached = usage.prompt_tokens_details.cached_tokens
        print(f"{usage.prompt_tokens:4} prompt tokens, {cached:4} cached: {name} {call.function.arguments}")
        if name == "finish":
            return arguments
        left.remove(name)
        result = perform(name, arguments, folder)
        print("    " + result.rstrip().replace("\n", "\n    "))
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server's API (default: %(default)s)")
    client = OpenAI(base_url=parser.parse_args().url, api_key="none", timeout=WAIT_S)
    model = client.models.list().data[0].id
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            Path(folder, name).write_text(text)
        found = work(client, model, Path(folder))
    print(f"{model} says: {found['apples']} apples, {found['pears']} pears")


if __name__ == "__main__":
    main()
