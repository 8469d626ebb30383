"""Result files as tables, sentences and figures. Reads result files and nothing else."""
