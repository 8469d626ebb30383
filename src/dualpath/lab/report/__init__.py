"""Shows result files as tables, sentences and pages. It reads result files and nothing else."""
