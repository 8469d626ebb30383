"""Figures of experiments: each takes a result file and writes one PNG."""
