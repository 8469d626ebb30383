"""The connector that makes a stock vLLM server a prefill or decode engine of a DualPath cluster.

vLLM loads `DualPathConnector` by name (``kv_connector_module_path: dualpath.vllm``). It copies between vLLM's device
blocks and pages of a buffer that the node's agent owns, and tells the agent how far it is; every decision is elsewhere.
Read `steps` first, then `decode_worker` and `prefill_worker`; `connector` joins them to vLLM's hooks.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "DualPathConnector":  # late: only a vLLM server has vLLM and torch
        from dualpath.vllm.connector import DualPathConnector

        return DualPathConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
