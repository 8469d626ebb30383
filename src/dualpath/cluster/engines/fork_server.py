"""What the fork server imports first, before seconds of torch: signals are for the process that serves.

Ctrl-C in a terminal, and a service manager's SIGTERM, reach every process of a group. An engine that left at once would
take its requests along, which have time to end; the process that serves tells engines when to leave.
"""

import signal

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
