"""mini-swe-agent: its default agent, its bash tool and a toy task to the end, every call enforced by grammar."""

import sys
import tempfile

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

url, model = sys.argv[1:3]
settings = {
    "api_base": f"{url}/v1",
    "api_key": "none",
    "max_tokens": 100,
    "temperature": 0,
    "tool_choice": "required",
}
with tempfile.TemporaryDirectory() as scratch:
    agent = DefaultAgent(
        LitellmModel(model_name=f"openai/{model}", model_kwargs=settings, cost_tracking="ignore_errors"),
        LocalEnvironment(cwd=scratch, timeout=10),
        system_template="You run bash commands. Call the tool bash with one command.",
        instance_template="{{task}}",
        step_limit=6,
    )
    task = 'Run this command, it submits your work: {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}'
    outcome = agent.run(task)
assert outcome["exit_status"] == "Submitted", outcome
print(f"{outcome['exit_status']} after {agent.n_calls} calls")
