"""What the tests' own testbed is called, and its rates, which a busy machine still reaches."""

import os

NAME = f"t{os.getpid() % 1_000_000}"
SUBNET = f"10.{100 + os.getpid() % 100}"
SNIC, CNIC = 4_000_000, 5_000_000
