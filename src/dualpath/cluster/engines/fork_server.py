"""What the fork server imports first, before seconds of torch: it ends with the supervisor, whose signals it ignores.

Ctrl-C in a terminal, and a service manager's SIGTERM, reach every process of a group. An engine that left at once would
take its requests along, which have time to end; the supervisor's coordinator tells engines when to leave.

The kernel sends `DEATH` when the supervisor dies. That ends a fork server that still imports; later engines first have
time to leave by themselves, with their memory and socket files (`fork_server_ready`); the kernel kills the rest.
"""

import os
import signal

from dualpath.cluster.children import PARENT_VARIABLE, end_with_parent, leave_signals_to_the_parent

DEATH = signal.SIGUSR2
PID = os.getpid()
"""The fork server's, also in the engines that are forked from it."""

leave_signals_to_the_parent()
signal.signal(DEATH, signal.SIG_DFL)
if PARENT_VARIABLE in os.environ:
    end_with_parent(int(os.environ[PARENT_VARIABLE]), DEATH)
