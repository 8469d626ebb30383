"""Measures what it costs to protect KV on its way between hosts, as ratios of one run.

    python benchmarks/data_security.py [--seconds 1.0] [--rounds 5]

1. Channels of `tcp` and of `tcp-authenticated` (a MAC on every frame), 16 blocks an operation, 8 operations in flight.
2. TLS 1.3 of Python's own `ssl`, which is not built in, beside the same bytes in the clear: one socket, one thread a
   side, chunks of 256 KiB received into the same memory. Its certificate is made with the `openssl` command.

Server and client are two processes. Each round measures all in turn; medians of the rounds' ratios are shown.
"""

import argparse
import contextlib
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from channel_throughput import TrafficManager, channel_rate, connect, serving

CHUNK_BYTES = 256 * 1024
BLOCK_BYTES = (64 * 1024, 1024 * 1024)


def certificate(directory: Path) -> Path:
    both = directory / "both.pem"
    names = ("-keyout", str(both), "-out", str(directory / "cert.pem"), "-subj", "/CN=benchmark")
    command = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    )
    subprocess.run([*command, *names], check=True, capture_output=True)
    both.write_text(both.read_text() + (directory / "cert.pem").read_text())
    return both


def drain(port: int, pem: str) -> None:
    """The receiving process: takes all that comes on one connection, in TLS if there is a certificate."""
    listener = socket.create_server(("127.0.0.1", port))
    print(listener.getsockname()[1], flush=True)
    connected, _ = listener.accept()
    if pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        connected = context.wrap_socket(connected, server_side=True)
    into = bytearray(CHUNK_BYTES)
    with contextlib.suppress(OSError):
        while connected.recv_into(into):
            pass


def bare_rate(pem: str, seconds: float) -> float:
    process = subprocess.Popen([sys.executable, __file__, "--drain", pem], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    connected = socket.create_connection(("127.0.0.1", int(process.stdout.readline())))
    if pem:
        context = ssl.create_default_context(cafile=pem)
        context.check_hostname = False
        connected = context.wrap_socket(connected)
    chunk, sent_bytes, begun = bytes(CHUNK_BYTES), 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        connected.sendall(chunk)
        sent_bytes += CHUNK_BYTES
    rate = sent_bytes / (time.perf_counter() - begun)
    connected.close()
    process.wait(10)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drain", metavar="PEM", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain is not None:
        drain(0, arguments.drain)
        return
    ratios: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pem = str(certificate(directory))
        served = {kind: stack.enter_context(serving(kind, None)) for kind in ("tcp", "tcp-authenticated")}
        channels = {kind: connect(kind, one.address, TrafficManager()) for kind, one in served.items()}
        for _ in range(arguments.rounds):
            for block_bytes in BLOCK_BYTES:
                for verb in ("read", "write"):
                    clear, macs = (channel_rate(one, verb, block_bytes, arguments.seconds) for one in channels.values())
                    name = f"MACs, {verb}, {block_bytes // 1024} KiB blocks"
                    ratios.setdefault(name, []).append(macs / clear)
                    rates.setdefault(name, []).append(clear)
            clear, tls = bare_rate("", arguments.seconds), bare_rate(pem, arguments.seconds)
            ratios.setdefault("TLS, a bare stream", []).append(tls / clear)
            rates.setdefault("TLS, a bare stream", []).append(clear)
        for channel in channels.values():
            channel.close()
    for name, of_rounds in ratios.items():
        clear = statistics.median(rates[name]) / 1e9
        spread = f"{min(of_rounds):.2f}-{max(of_rounds):.2f}"
        print(f"{name:32}  {statistics.median(of_rounds):.2f} × ({spread}) of {clear:.2f} GB/s in the clear")


if __name__ == "__main__":
    main()
