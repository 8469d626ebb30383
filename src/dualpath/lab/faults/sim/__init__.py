"""The deterministic body: core's scheduler between model engines that faults happen to.

`engines` are their books, `work` what they do, `model` the driver that carries out core's commands, `injection` what
faults do to them, `world` the random steps; `episodes` runs millions of them and shrinks what fails to a short file.
"""
