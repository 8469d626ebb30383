"""GPUs and node links. Rates are nominal, one direction, in bytes per second (1 GB = 10^9 bytes)."""

import msgspec


class GpuSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU. FLOP rates are dense (without sparsity)."""

    name: str
    bf16_flop_per_s: float
    fp8_flop_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    """Rate in each direction."""
    source: str


_GPUS = (
    GpuSpec(
        name="h100",
        bf16_flop_per_s=989e12,
        fp8_flop_per_s=1979e12,
        hbm_bytes=80e9,
        hbm_bytes_per_s=3.35e12,
        nvlink_bytes_per_s=450e9,
        source="NVIDIA H100 SXM5 data sheet",
    ),
    GpuSpec(
        name="h800",
        bf16_flop_per_s=989e12,
        fp8_flop_per_s=1979e12,
        hbm_bytes=80e9,
        hbm_bytes_per_s=3.43e12,
        nvlink_bytes_per_s=200e9,
        source="H100 SXM5 compute with NVLink cut to 400 GB/s both ways; memory rate as DeepSeek's kernels report it",
    ),
    GpuSpec(
        name="h200",
        bf16_flop_per_s=989e12,
        fp8_flop_per_s=1979e12,
        hbm_bytes=141e9,
        hbm_bytes_per_s=4.8e12,
        nvlink_bytes_per_s=450e9,
        source="NVIDIA H200 SXM data sheet; one H200 measured 790e12 FLOP/s in bf16 (8192³) and 4.3e12 B/s copying",
    ),
)

GPUS: dict[str, GpuSpec] = {gpu.name: gpu for gpu in _GPUS}

NIC_400G_BYTES_PER_S = 50e9
"""400 Gb/s InfiniBand or Ethernet (paper §7.2); a node has one for storage and one per GPU for compute."""
STORAGE_CLIENT_BYTES_PER_S = 43e9
"""Rate of one 400 Gb/s client NIC against 3FS (40 GiB/s, 3FS's published benchmark)."""
DRAM_BYTES_PER_S = 500e9
"""DRAM rate of one node, reads and writes together (paper §4.2)."""
