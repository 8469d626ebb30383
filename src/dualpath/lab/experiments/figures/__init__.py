"""Figures of experiments: each function takes a result file and writes one PNG."""
