"""aiperf: synthetic conversations of three turns, streamed, with the checkpoint's own tokenizer."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, model, checkpoint = sys.argv[1:4]
with tempfile.TemporaryDirectory() as scratch:
    command = [str(Path(sys.executable).parent / "aiperf"), "profile", "--model", model, "--url", url]
    command += ["--endpoint-type", "chat", "--streaming", "--tokenizer", checkpoint, "--ui", "none"]
    command += ["--conversation-num", "4", "--conversation-turn-mean", "3", "--conversation-turn-stddev", "0"]
    command += ["--isl", "100", "--isl-stddev", "0", "--osl", "16", "--osl-stddev", "0", "--concurrency", "2"]
    command += ["--output-artifact-dir", scratch, "--random-seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    found = list(Path(scratch).rglob("profile_export_aiperf.json"))
    assert run.returncode == 0 and found, run.stdout[-3000:] + run.stderr[-3000:]
    report = json.loads(found[0].read_text())
requests = report["request_count"]["avg"]
assert requests == 12, report
print(f"{requests:.0f} requests in 4 conversations of three turns, streamed")
