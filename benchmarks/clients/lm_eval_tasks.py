"""lm-eval: a multiple choice task by log-probabilities of echoed prompts, and generation, over completions and chat."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model, checkpoint = sys.argv[1:4]
QUESTIONS = [
    {
        "question": f"The capital of Spain is Madrid. The capital of Greece is Athens. The capital of {country} is",
        "choices": choices,
        "gold": gold,
    }
    for country, choices, gold in (
        ("France", ["Paris", "London"], 0),
        ("Italy", ["Berlin", "Rome"], 1),
        ("Japan", ["Tokyo", "Madrid"], 0),
        ("Egypt", ["Oslo", "Cairo"], 1),
    )
]
CHOICE = """\
task: capitals_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
GENERATE = """\
task: capitals_generate
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12}
metric_list: [{metric: exact_match, regexes_to_ignore: ["^ "]}]
"""
RUNS = {
    "local-completions": ("completions", "capitals_choice,capitals_generate"),
    "local-chat-completions": ("chat/completions", "capitals_generate"),
}
scores: dict[str, float] = {}
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.replace("QUESTIONS", str(folder / "questions.json")))
    for kind, (path, tasks) in RUNS.items():
        settings = f"model={model},base_url={url}/v1/{path},tokenizer={checkpoint},num_concurrent=2,max_retries=1"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args", settings]
        command += ["--tasks", tasks, "--include_path", scratch, "--output_path", f"{scratch}/out"]
        command += ["--apply_chat_template"] if "chat" in kind else []
        run = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        report = json.loads(max(folder.glob("out/**/results*.json"), key=os.path.getmtime).read_text())
        for task, row in report["results"].items():
            scores[f"{task} over {path}"] = next(v for k, v in row.items() if k.startswith(("acc,", "exact_match,")))
assert min(scores["capitals_choice over completions"], scores["capitals_generate over completions"]) >= 0.75, scores
print("; ".join(f"{task}: {score:.2f}" for task, score in scores.items()))
