"""aider: two messages about one file, whole-file edits, streamed, no git."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = sys.argv[1:3]
settings = {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "none", "AIDER_ANALYTICS": "false"}
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    (folder / "hello.py").write_text("print('hello')\n")
    limits = {f"openai/{model}": {"max_input_tokens": 4096, "max_output_tokens": 200}}
    (folder / "model.json").write_text(json.dumps(limits))
    (folder / "settings.yml").write_text(
        f"- name: openai/{model}\n  edit_format: whole\n  extra_params: {{max_tokens: 150}}\n"
    )
    command = [sys.executable, "-m", "aider", "--model", f"openai/{model}", "--yes-always", "--no-git"]
    command += ["--model-settings-file", "settings.yml", "--model-metadata-file", "model.json", "--no-check-update"]
    command += ["--no-show-model-warnings", "--map-tokens", "0", "--restore-chat-history", "--no-pretty"]
    for message in ("Print goodbye instead of hello.", "Thank you. Say goodbye."):
        run = subprocess.run(
            [*command, "--message", message, "hello.py"],
            cwd=folder,
            env=os.environ | settings | {"HOME": scratch},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Tokens:" in run.stdout and "Error" not in run.stdout, run.stdout
    tokens = next(line for line in run.stdout.splitlines() if line.startswith("Tokens:"))
print(f"two messages; the last: {tokens}")
