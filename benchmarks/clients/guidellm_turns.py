"""guidellm: synthetic conversations of three turns, two at once, with the checkpoint's own tokenizer."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, model, checkpoint = sys.argv[1:4]
with tempfile.TemporaryDirectory() as scratch:
    report_file = Path(scratch) / "report.json"
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-progress"]
    command += ["--backend", f"kind=openai_http,target={url},model={model}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=100,output_tokens=16,turns=3"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={checkpoint}", "--profile", "kind=concurrent,streams=2"]
    command += ["--constraint", "kind=max_requests,count=12", "--output", f"kind=json,path={report_file}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    assert run.returncode == 0 and report_file.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    metrics = json.loads(report_file.read_text())["benchmarks"][0]["metrics"]
totals = metrics["request_totals"]
assert totals["successful"] >= 12 and not totals["errored"], totals
print(f"{totals['successful']} requests in conversations of three turns")
