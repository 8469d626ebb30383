"""Sizes, rates and durations with units: ``100MB/s``, ``400Gb/s``, ``2GiB``, ``250ms``.

Decimal prefixes are powers of 1000, binary ones (``Ki``, ``Mi``, ``Gi``, ``Ti``) powers of 1024; ``B`` is a
byte, ``b`` a bit.
"""

import re

_PREFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PREFIX |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?(B|b)?\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s|min|h)\s*")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def parse_bytes(text: str) -> int:
    """``"64MiB"`` → 67108864. A bare number is bytes. Raises ValueError that names the text and an example."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, for example 64MiB, 1.5GB or 4096")
    number, prefix, unit = match.groups()
    bits = 8 if unit == "b" else 1
    return round(float(number) * _PREFIX[prefix or ""] / bits)


def parse_rate(text: str) -> int | None:
    """``"100MB/s"`` → 100_000_000 bytes per second; ``"unlimited"`` → None. Raises ValueError like `parse_bytes`."""
    if text.strip().lower() in {"unlimited", "none", "inf"}:
        return None
    size, slash, per = text.partition("/")
    if slash and per.strip() != "s":
        raise ValueError(
            f"{text!r} is not a rate; write a size per second, for example 100MB/s or 400Gb/s, or unlimited"
        )
    try:
        rate = parse_bytes(size)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a rate; write a size per second, for example 100MB/s or 400Gb/s, or unlimited"
        ) from None
    if rate <= 0:
        raise ValueError(f"{text!r}: a rate must be above zero; for no limit write unlimited")
    return rate


def parse_rates(text: str) -> int | tuple[int, ...] | None:
    """Parses one rate, or one for each group of a topology, such as ``100MB/s+50MB/s``. Raises ValueError."""
    rates = [parse_rate(part) for part in text.split("+")]
    if len(rates) == 1:
        return rates[0]
    limited = tuple(rate for rate in rates if rate is not None)
    if len(limited) < len(rates):
        raise ValueError(f"{text!r}: either all nodes are unlimited, or each group of them has a rate")
    return limited


def parse_duration_ns(text: str) -> int:
    """``"250ms"`` → 250_000_000. Raises ValueError that names the text and an example."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and a unit, for example 250ms, 5s or 2min")
    return round(float(match[1]) * _SECONDS[match[2]] * 1e9)


def format_bytes(n_bytes: float) -> str:
    """``67_000_000`` → ``"67.0 MB"``: decimal, three digits or so, for people."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(n_bytes) < 1000 or prefix == "T":
            return f"{n_bytes:.0f} B" if not prefix else f"{n_bytes:.1f} {prefix}B"
        n_bytes /= 1000
    raise AssertionError("unreachable")


def format_rate(bytes_per_s: float | None) -> str:
    """``100_000_000`` → ``"100.0 MB/s"``; None → ``"unlimited"``."""
    return "unlimited" if bytes_per_s is None else f"{format_bytes(bytes_per_s)}/s"
