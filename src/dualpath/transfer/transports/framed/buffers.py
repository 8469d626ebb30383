"""What is left to send or receive, as a list of buffers."""

_ZEROS = memoryview(bytes(65_536))


def advance(buffers: list[memoryview], n_bytes: int) -> None:
    """Drop the first `n_bytes` of `buffers`, in place."""
    done = 0
    while done < len(buffers) and n_bytes >= len(buffers[done]):
        n_bytes -= len(buffers[done])
        done += 1
    del buffers[:done]
    if n_bytes:
        buffers[0] = buffers[0][n_bytes:]


def zeros(n_bytes: int) -> list[memoryview]:
    """Returns `n_bytes` zeros."""
    whole, rest = divmod(n_bytes, len(_ZEROS))
    return [_ZEROS] * whole + ([_ZEROS[:rest]] if rest else [])
