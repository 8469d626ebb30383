"""The fault laboratory: one table of faults (`matrix`), and two bodies that run it.

`sim` drives core's scheduler with seeded random steps, `real` hurts the processes and files of a running cluster.
"""
