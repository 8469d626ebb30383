"""Comparisons measured on real clusters: a plan of runs, the same agents for every system, one result file."""
