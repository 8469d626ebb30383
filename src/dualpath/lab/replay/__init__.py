"""``dualpath replay``: runs agents against any OpenAI server and makes a result file."""
