"""A machine's rates as tables for people: what was measured, and how well each fit says it."""

from rich.console import Group
from rich.table import Table

from dualpath.prediction.machine import MachineRates, MoveCost


def machine_tables(rates: MachineRates) -> Group:
    """Coefficients, then residuals."""
    return Group(_coefficients(rates), _residuals(rates))


def _coefficients(rates: MachineRates) -> Table:
    table = Table(title=f"{rates.model} on {rates.description}, {rates.threads} threads an engine")
    table.add_column("what")
    table.add_column("measured")
    prefill, decode, storage, control = rates.prefill, rates.decode, rates.storage, rates.control
    rows = {
        "all cores busy": f"a cluster takes {rates.slowdown:.2f} times as long, engines "
        f"alone {rates.side_by_side:.2f} times; reference work takes {_us(rates.reference_ns)} then",
        "prefill, a layer": f"{_us(prefill.fixed_ns)} + {_us(prefill.item_ns)} a prompt + {_us(prefill.token_ns)} a "
        f"new token + {prefill.cached_token_ns:.0f} ns a cached one + {prefill.cached_pair_ns:.1f} ns a pair of both, "
        f"{prefill.new_pair_ns:.1f} ns one of new ones",
        "decode, a step": f"{_us(decode.fixed_ns)} + {_us(decode.request_ns)} a request + "
        f"{_us(decode.context_token_ns)} a context token + {_us(decode.longest_token_ns)} a token of the longest",
        "PE buffer → device": _move(rates.local_copy),
        "DE buffer → device": _move(rates.fill),
        "device → storage": _move(rates.copy_out),
        **{f"{name}, DE → PE": _move(cost.pull) for name, cost in rates.transports.items()},
        **{f"{name}, PE → DE": _move(cost.put) for name, cost in rates.transports.items()},
        "Full Block, read": f"{_us(storage.read_ns)}, {storage.read_threads} at a time",
        "Full Block, written": f"{_us(storage.write_ns)} and {_us(storage.write_wait_ns)} of waiting, "
        f"{storage.write_threads} at a time",
        "client": f"{_us(control.client_request_ns)} a request + {_us(control.client_prompt_token_ns)} a prompt token "
        f"+ {_us(control.client_token_ns)} a token",
        "coordinator": f"{_us(control.request_ns)} a request + {_us(control.prompt_token_ns)} a prompt token + "
        f"{_us(control.message_ns)} a message ({_us(control.tokens_message_ns)} more with tokens) + "
        f"{_us(control.token_ns)} a token",
        "prefill engine": f"{_us(control.prefill_request_ns)} a request",
        "decode engine": f"{_us(control.decode_request_ns)} a request + {_us(control.decode_step_ns)} a step + "
        f"{_us(control.decode_token_ns)} a token",
        "between processes": f"{_us(control.hop_ns)} a message",
    }
    for what, measured in rows.items():
        table.add_row(what, measured)
    return table


def _residuals(rates: MachineRates) -> Table:
    table = Table(title="how far the fits are off")
    for column in ("fit", "samples", "mean", "worst"):
        table.add_column(column, justify="left" if column == "fit" else "right")
    for name, fit in rates.fits.items():
        table.add_row(name, str(fit.samples), f"{fit.mean_error:.1%}", f"{fit.max_error:.1%}")
    table.add_row("one engine more than cores", "1", f"{rates.oversubscribed_error:+.1%}", "")
    return table


def _move(cost: MoveCost) -> str:
    return f"{1 / cost.byte_ns:.1f} GB/s on {cost.threads:.1f} cores + {_us(cost.chunk_ns)} a paced chunk"


def _us(ns: float) -> str:
    return f"{ns / 1e6:.1f} ms" if ns >= 1e6 else f"{ns / 1e3:.3g} us"
