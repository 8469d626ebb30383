"""What these tests serve: real vLLM servers, in the environment that `make setup-vllm` makes."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from vllm_models import MODELS, VLLM_OPTIONS, Pair
from vllm_servers import TOOLS, VLLM_PYTHON, cluster, plain_vllm


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if not VLLM_PYTHON.exists():
        pytest.skip("there is no .venv-vllm: make setup-vllm")
    made = Pair(request.param, tmp_path_factory.mktemp(request.param))
    options = VLLM_OPTIONS[made.kind]
    with ExitStack() as stack:
        dtype = ("--dtype", "float32", *TOOLS)
        block = () if "--block-size" in options else ("--block-size", "64")
        made.plain = stack.enter_context(plain_vllm(made.model, made.where / "plain.log", *dtype, *block, *options))
        rotation = ("--system", "vllm_rotation:ROTATION", "--dtype", "float32")
        made.url, _ = stack.enter_context(cluster(made.model, made.where, *rotation, vllm=(*TOOLS, *options)))
        yield made
