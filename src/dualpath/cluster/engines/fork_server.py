"""What the fork server imports first, before seconds of torch: signals are for the process that serves.

Ctrl-C in a terminal, and a service manager's SIGTERM, reach every process of a group. An engine that left at once would
take its requests along, which have time to end; the process that serves tells engines when to leave.
"""

import signal

_FOR_THE_SERVER = (signal.SIGINT, signal.SIGTERM)
for number in _FOR_THE_SERVER:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_SERVER)  # the supervisor has blocked them until here
