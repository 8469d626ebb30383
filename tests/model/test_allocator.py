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


RELEASE = """
import threading, torch
from dualpath.model.allocator import giving_memory_back, keep_freed_memory
def private_mib():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) >> 10
def work():
    pool = [torch.ones(3 << 20) for _ in range(5)]
    scratch = [torch.ones(1 << 20) for _ in range(5)]
    del scratch
    full = private_mib()
    with {how}():
        pool = []
    print(full - private_mib())
keep_freed_memory()
one = threading.Thread(target=work)
one.start()
one.join()
"""


def test_what_is_released_goes_back_to_the_kernel() -> None:
    """Also from the heap of a thread: of 80 MiB, all but a few."""

    def given_mib(how: str) -> int:
        code = "from contextlib import nullcontext\n" + RELEASE.format(how=how)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)

    assert given_mib("giving_memory_back") > 60
    assert given_mib("nullcontext") < 40, "or the first says nothing"
