"""Makes one HTML page of result files."""

from dualpath.lab.report.html.page import render, write_report

__all__ = ["render", "write_report"]
