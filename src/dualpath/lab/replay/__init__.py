"""``dualpath replay``: agents against any OpenAI server, and what came of it as a result file."""
