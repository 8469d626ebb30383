"""What one machine takes for everything the runtime does on it: measured beforehand, by `dualpath calibrate`.

A `MachineRates` is for one model, dtype and number of compute threads an engine. Times are nanoseconds on idle cores;
what sharing the cores does to them is the simulation's (`cpu`). docs/design/prediction.md says how each is measured.
"""

from pathlib import Path

import msgspec

from dualpath.core.batching import AttentionCost, Chunk


class MachineError(ValueError):
    """A file that is no machine's, or a machine that does not fit what is to be predicted. The message says what."""


class PrefillCost(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of a prefill batch: the sum over its items, tokens and pairs of tokens, and a fixed part.

    Pairs of a new token and a cached one are told from those among new tokens, whose kernel computes parts of the
    masked half too.
    """

    fixed_ns: float
    item_ns: float
    token_ns: float
    cached_pair_ns: float
    new_pair_ns: float
    cached_token_ns: float = 0.0
    """A row that another thread has just copied."""

    def layer_ns(self, chunks: tuple[Chunk, ...]) -> float:
        """One layer of a batch."""
        return self.fixed_ns + sum(self.chunk_ns(chunk.cached_tokens, chunk.new_tokens) for chunk in chunks)

    def chunk_ns(self, cached_tokens: int, new_tokens: int) -> float:
        """What one chunk adds to a layer."""
        return (
            self.item_ns
            + new_tokens * self.token_ns
            + cached_tokens * self.cached_token_ns
            + new_tokens * cached_tokens * self.cached_pair_ns
            + new_pairs(new_tokens) * self.new_pair_ns
        )


class DecodeCost(msgspec.Struct, frozen=True, kw_only=True):
    """A decode step, all layers: ``fixed + requests · request + context tokens · context_token + longest · longest``.

    `longest` is the longest context of the batch: the first sequence costs more a token than those beside it.
    """

    fixed_ns: float
    request_ns: float
    context_token_ns: float
    longest_token_ns: float

    def step_ns(self, contexts_tokens: list[int]) -> float:
        """A step of sequences of these contexts, at least one."""
        return (
            self.fixed_ns
            + len(contexts_tokens) * self.request_ns
            + sum(contexts_tokens) * self.context_token_ns
            + max(contexts_tokens) * self.longest_token_ns
        )


class MoveCost(msgspec.Struct, frozen=True, kw_only=True):
    """Moving bytes through NICs, from start to end where no rate holds them up: ``operation + bytes · byte``.

    Where one does, each of its chunks costs `chunk_ns` more.
    """

    byte_ns: float
    chunk_ns: float
    operation_ns: float = 0.0
    threads: float = 1.0
    """Cores busy meanwhile: two ends copy side by side, and neither all the time."""

    def copying_ns(self, n_bytes: int, paced_chunks: int) -> float:
        return self.operation_ns + n_bytes * self.byte_ns + paced_chunks * self.chunk_ns


class TransportCost(msgspec.Struct, frozen=True, kw_only=True):
    """Between a PE and a DE's buffer."""

    pull: MoveCost
    put: MoveCost


class StorageCost(msgspec.Struct, frozen=True, kw_only=True):
    """One Full Block, in one thread: cores' time, and time the thread sleeps for the disk."""

    read_ns: float
    """Blocks are read from the page cache: what a disk would take is not part of it."""
    write_ns: float
    write_wait_ns: float
    """Flushing it and reading it back."""
    read_threads: int
    write_threads: int


class ControlCost(msgspec.Struct, frozen=True, kw_only=True):
    """What it takes to ask, to answer and to tell each other: the client's and the coordinator's cores' time."""

    client_request_ns: float
    client_prompt_token_ns: float
    client_token_ns: float
    request_ns: float
    """Coordinator and HTTP server: a request, but for its tokens and messages."""
    prompt_token_ns: float
    message_ns: float
    """Coordinator: one message of an engine."""
    tokens_message_ns: float
    """How much more one takes that brings tokens, of however many requests: streams are woken up."""
    token_ns: float
    """Each of these tokens."""
    prefill_request_ns: float
    """PE's main thread: a request."""
    decode_request_ns: float
    """DE's main thread: a request, but for its tokens."""
    decode_step_ns: float
    decode_token_ns: float
    """DE's main thread: each of a step's tokens."""
    hop_ns: float
    """From one process to another: until the receiver runs. Fitted to lone requests' time to first token."""


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The runtime's defaults that shape batches and memory; a result file does not repeat them."""

    max_batch_tokens: int
    max_batch_kv_tokens: int
    max_batch_requests: int
    device_layers: int
    buffer_bytes: int
    hbm_bytes: int


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """How well a coefficient set says what was measured: relative errors over its samples."""

    samples: int
    mean_error: float
    max_error: float


class MachineRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine, running one model. A file with other fields is of another version, and refused."""

    description: str
    model: str
    layers: int
    kv_bytes_per_token: int
    dtype: str
    threads: int
    cores: float
    side_by_side: float
    """By how much steps take longer in as many engines as there are cores, CPU time, the engines alone; used while no
    DE of a cluster decodes."""
    oversubscribed_error: float
    """With one engine more than that: measured wall time over what processor sharing predicts, less one."""
    slowdown: float
    """By how much everything takes longer while all cores of a cluster that decodes are busy, by its CPU time."""
    others_cores: float
    """Cores that something else kept busy during the calibration; above a tenth, do it again."""
    attention: AttentionCost
    """What a PE's own profile of its attention comes to: its batches are cut by it."""
    prefill_tokens_per_s: float
    """What a PE tells the coordinator at start: β is made of it."""
    prefill: PrefillCost
    """In a cluster: by themselves, and what compute threads take longer there."""
    decode: DecodeCost
    """The same."""
    local_copy: MoveCost
    """PE buffer to PE device, and the way of all local copies through the CNIC."""
    fill: MoveCost
    """DE buffer to DE device."""
    copy_out: MoveCost
    """DE device to a Full Block on its way to storage."""
    transports: dict[str, TransportCost]
    storage: StorageCost
    control: ControlCost
    limits: EngineLimits
    reference_ns: float
    """CPU time of the reference work (`dualpath.reference_work`) while `slowdown` was measured."""
    fits: dict[str, Fit]
    measured_s: float
    """How long the calibration took."""


def new_pairs(new_tokens: int) -> int:
    """Pairs of a chunk's new tokens: each sees itself and those before it."""
    return new_tokens * (new_tokens + 1) // 2


def load_machine(path: Path) -> MachineRates:
    """Read what `dualpath calibrate` wrote. Raises MachineError naming the file and the field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=MachineRates)
    except OSError as error:
        raise MachineError(f"{path} can't be read: {error.strerror}; make one with dualpath calibrate") from error
    except msgspec.MsgspecError as error:
        raise MachineError(f"{path} is not what dualpath calibrate writes ({error}); calibrate again") from error
