"""What the connector reads of vLLM is there, and what the fakes have is vLLM's: in every supported version."""

import dataclasses
import inspect
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA
from vllm.model_executor.layers.attention import kv_transfer_utils
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from dualpath.vllm import DualPathConnector, versions
from tests.vllm import fakes


def test_this_version_is_supported() -> None:
    versions.check_version(vllm.__version__)


def test_the_connector_is_one_of_vllms() -> None:
    assert issubclass(DualPathConnector, KVConnectorBase_V1)
    assert issubclass(DualPathConnector, SupportsHMA)
    assert not inspect.isabstract(DualPathConnector)
    assert DualPathConnector.requires_piecewise_for_cudagraph({"role": "prefill"})
    assert not DualPathConnector.requires_piecewise_for_cudagraph({"role": "decode"})


@pytest.mark.parametrize(
    "hook",
    [name for name, each in vars(KVConnectorBase_V1).items() if inspect.isfunction(each) and not name.startswith("__")],
)
def test_a_hook_takes_what_vllm_gives(hook: str) -> None:
    theirs, ours = (inspect.signature(getattr(each, hook)) for each in (KVConnectorBase_V1, DualPathConnector))
    assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fakes.FakeNew, NewRequestData),
        (fakes.FakeCached, CachedRequestData),
        (fakes.FakeOutput, SchedulerOutput),
        (fakes.FakeConnectorOutput, KVConnectorOutput),
    ],
)
def test_a_fake_has_fields_of_vllms(fake: Any, real: Any) -> None:
    names = {field.name for field in dataclasses.fields(real)}
    assert {field.name for field in dataclasses.fields(fake)} <= names


def test_a_fake_request_is_like_vllms() -> None:
    source = inspect.getsource(Request.__init__)
    for name in (field.name for field in dataclasses.fields(fakes.FakeRequest) if field.name != "reason"):
        assert f"self.{name}" in source, name
    assert isinstance(Request.num_tokens, property)
    assert "get_finished_reason" in vars(Request)
    assert "get_block_ids" in vars(KVCacheBlocks)


def test_a_finish_reason_is_the_word_of_the_api() -> None:
    from vllm.v1.engine import FinishReason

    assert [str(each) for each in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)] == [
        "stop",
        "length",
        "abort",
    ]


def test_specs_have_what_is_read() -> None:
    names = {field.name for field in dataclasses.fields(FullAttentionSpec)}
    assert {"num_kv_heads", "head_size", "head_size_v", "dtype", "block_size", "sliding_window"} <= names
    assert issubclass(MLAAttentionSpec, FullAttentionSpec)
    assert {"num_blocks", "kv_cache_groups"} <= {field.name for field in dataclasses.fields(KVCacheConfig)}
    assert "kv_cache_spec" in {field.name for field in dataclasses.fields(KVCacheGroupSpec)}


def test_hooks_come_in_the_order_that_the_connector_relies_on() -> None:
    """Before anything of a step is written: `handle_preemptions`. Between a layer's two hooks: the layer."""
    step = inspect.getsource(GPUModelRunner.execute_model)
    assert step.index("handle_preemptions") < step.index("_update_states") < step.index("maybe_get_kv_connector_output")
    around = inspect.getsource(KVConnectorModelRunnerMixin._get_kv_connector_output)
    order = ["bind_connector_metadata", "has_sync_kv_loads", "yield", ".wait_for_save()", "get_transfer_results"]
    places = [around.index(name) for name in [*order, "get_block_ids_with_load_errors"]]
    assert places == sorted(places)
    layer = inspect.getsource(kv_transfer_utils.maybe_transfer_kv_layer)
    assert layer.index(".wait_for_layer_load(") < layer.index("result = func") < layer.index(".save_kv_layer(")


def test_a_step_is_built_before_its_tokens_count_as_computed() -> None:
    source = inspect.getsource(Scheduler.schedule)
    assert source.index("_build_kv_connector_meta") < source.index("_update_after_schedule(")
    assert "num_preemptions += 1" in inspect.getsource(Scheduler._preempt_request)
