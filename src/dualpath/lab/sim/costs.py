"""The cost model: nanoseconds of a prefill and of a decode step, from a cluster's facts and a few fitted constants.

A prefill step of a group (with expert parallelism, engines share a step; otherwise each has its own) takes:

    attention_e = sum over chunks of core's AttentionCost     FLOPs / effective FLOP/s, per engine
        ffn         = tokens of the group / engines * FLOPs       the experts are spread, so every engine has the mean
    step        = max(max_e attention_e + ffn, weights / HBM) + fixed

A decode step of a group takes:

    engine_e    = requests_e * per_request + context_e * per_context_token    reading KV, and what comes with it
    step        = weights / HBM + fixed + max_e engine_e

An engine's loop lags behind: `loop_steps` steps pass besides the step that computes.

All is roofline arithmetic from `lab.facts`, except the constants of `Calibration`: they are fitted to the paper's
figures or taken from published measurements, as each docstring says (docs/design/simulator.md has the consequences).
"""

import msgspec

from dualpath.core.batching import AttentionCost
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.facts.step_times import MeasuredEngine
from dualpath.spec.kv_bytes import KVBytes

SECOND_NS = 1e9


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All numbers of the simulator that are neither facts of `lab.facts` nor constants of the paper."""

    prefill_flop_per_s: float = 0.46e15
    """Effective rate of one GPU in prefill. Fitted to the JCT of DS 660B at 2P4D; published throughput of such models
    implies 0.37 to 0.66e15."""
    prefill_fixed_ns_per_layer: float = 1_000_000.0
    """Launches and all-to-all exchanges of one layer of a prefill step, whatever its batch. A prior: dispatch and
    combine of a thousand tokens per GPU take about that long."""
    snic_efficiency: float = 0.95
    """Usable share of a storage NIC. Fitted to the ablation's last step; 3FS publishes 0.86 of 400 Gb/s."""
    index_keys: bool = False
    """Whether sparse attention's keys are stored with the KV. The paper's own table counts KV without them."""
    copy_submission_ns: float = 1_350.0
    """Submitting the host-device copy of one Layer Block, if whole prompts are copied at once. Fitted to the
    ablation's first step; the paper gives 5 to 7 us per call, so about four blocks would share one. Layerwise engines
    copy through the CNIC, and compute hides it."""
    decode_fixed_ns_per_layer: float = 330_000.0
    """Launches and exchanges of one layer of a decode step, whatever the batch. Fitted to a TPOT."""
    decode_request_ns_per_layer: float = 8_400.0
    """What each request of the batch adds to that, besides reading its KV from HBM. From published decode latencies of
    DeepSeek-V3.2 on H100 (29, 39, 59, 102 ms at 16, 32, 64, 128 requests of 32K)."""
    loop_steps: float = 3.0
    """Steps that pass between an event and its effect, besides the step that computes: engines fetch between steps,
    launch ahead of the device and read results behind it. Fitted to a TTFT; the same for PEs and DEs."""
    collective_share: float = 0.0
    """Share of a CNIC's time that model execution takes and KV can't have, at most 0.99. A what-if: the paper calls
    these links idle most of the time."""
    read_latency_ns: int = 1_000_000
    """Time from a request to storage until the first byte. A prior."""

    def __post_init__(self) -> None:
        for name in ("prefill_flop_per_s", "snic_efficiency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Calibration.{name} is {getattr(self, name)}; it must be above zero")
        for name in (
            "prefill_fixed_ns_per_layer", "decode_fixed_ns_per_layer", "copy_submission_ns", "loop_steps",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"Calibration.{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.collective_share <= 0.99:
            raise ValueError(f"Calibration.collective_share is {self.collective_share}; it must be from 0 to 0.99")
        if self.snic_efficiency > 1:
            raise ValueError(f"Calibration.snic_efficiency is {self.snic_efficiency}; it is a share and can't exceed 1")


class StepCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Costs of a step on one kind of engine. Times in nanoseconds, all layers together."""

    layers: int
    kv: KVBytes
    attention: AttentionCost
    ffn_ns_per_token: float
    """Compute time of a token on one engine alone; a group's engines share theirs."""
    prefill_floor_ns: float
    """Time of reading the weights from HBM."""
    prefill_fixed_ns: float
    prefill_chunk_ns: float = 0.0
    """Time that a chunk adds to its batch, whatever its length."""
    decode_fixed_ns: float
    """Time of a decode step's weights and launches."""
    decode_request_ns: float
    decode_context_token_ns: float
    copy_ns_per_block: float
    """Time of submitting the copies of one Full Block, layer by layer."""
    loop_steps: float
    request_ns: float = 0.0
    """Time from a request's arrival to its placement."""

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv.bytes_per_token

    def prefill_ns(self, slowest_attention_ns: float, mean_tokens: float) -> float:
        """Compute time of a group's step, without I/O; `mean_tokens` are new tokens per engine of the group."""
        busy_ns = slowest_attention_ns + mean_tokens * self.ffn_ns_per_token
        return max(busy_ns, self.prefill_floor_ns) + self.prefill_fixed_ns

    def decode_ns(self, requests: int, context_tokens: float) -> float:
        """Time of a decode step of an engine by itself."""
        return self.decode_fixed_ns + requests * self.decode_request_ns + context_tokens * self.decode_context_token_ns


def step_costs(cluster: ClusterSpec, calibration: Calibration) -> StepCosts:
    """Returns the costs of the cluster's model on its GPUs, or the measured ones."""
    model = cluster.model
    kv = model.kv(cluster.kv_dtype, index_keys=calibration.index_keys)
    if cluster.measured is not None:
        return measured_costs(cluster.measured, model.layers, kv)
    ns_per_flop = SECOND_NS / calibration.prefill_flop_per_s
    flops_per_token, flops_per_pair = model.attention_line()
    hbm_ns_per_byte = SECOND_NS / cluster.usable_hbm_bytes_per_s
    short, long = 16_384, 65_536
    read_bytes = [model.decode_read_bytes(context, cluster.kv_dtype) for context in (short, long)]
    read_per_token = (read_bytes[1] - read_bytes[0]) / (long - short)
    read_per_request = read_bytes[0] - read_per_token * short
    return StepCosts(
        layers=model.layers,
        kv=kv,
        attention=AttentionCost(
            fixed_ns=0.0,
            ns_per_flop=ns_per_flop,
            flops_per_token=model.projection_flops_per_token + flops_per_token,
            flops_per_pair=flops_per_pair,
        ),
        ffn_ns_per_token=(model.dense_flops_per_token - model.projection_flops_per_token) * ns_per_flop,
        prefill_floor_ns=cluster.prefill_weight_bytes * hbm_ns_per_byte,
        prefill_fixed_ns=model.layers * calibration.prefill_fixed_ns_per_layer,
        decode_fixed_ns=cluster.decode_weight_bytes * hbm_ns_per_byte
        + model.layers * calibration.decode_fixed_ns_per_layer,
        decode_request_ns=read_per_request * hbm_ns_per_byte + model.layers * calibration.decode_request_ns_per_layer,
        decode_context_token_ns=read_per_token * hbm_ns_per_byte,
        copy_ns_per_block=model.layers * calibration.copy_submission_ns,
        loop_steps=calibration.loop_steps,
    )


def measured_costs(engine: MeasuredEngine, layers: int, kv: KVBytes) -> StepCosts:
    """Costs of a measured engine: experts and attention are one, and its loop has no lag except `request_ns`."""
    times = engine.times
    copy_ns_per_byte = SECOND_NS / engine.copy_bytes_per_s if engine.copy_bytes_per_s else 0.0
    return StepCosts(
        layers=layers,
        kv=kv,
        attention=AttentionCost(
            fixed_ns=0.0,
            ns_per_flop=1.0,
            flops_per_token=times.prefill_token_ns,
            flops_per_pair=times.prefill_pair_ns,
        ),
        ffn_ns_per_token=0.0,
        prefill_floor_ns=0.0,
        prefill_fixed_ns=times.prefill_fixed_ns,
        prefill_chunk_ns=times.prefill_chunk_ns,
        decode_fixed_ns=times.decode_fixed_ns,
        decode_request_ns=times.decode_request_ns,
        decode_context_token_ns=times.decode_context_token_ns,
        copy_ns_per_block=kv.bytes_per_token * BLOCK_TOKENS * copy_ns_per_byte,
        loop_steps=0.0,
        request_ns=engine.request_ns,
    )
