"""A process that computes takes memory from the kernel once."""

import subprocess
import sys

FAULTS = """
import resource, torch
from dualpath.model.allocator import keep_freed_memory
if {keep}: keep_freed_memory()
def layer():
    held = [torch.ones(1 << 19) for _ in range(20)]
layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    code = FAULTS.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)


def test_freed_memory_is_used_again() -> None:
    assert faults(keep=True) < faults(keep=False) / 10
