"""Which tests run where, and in what order."""

import fcntl
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualpath.spec.extras import how_to_install

HAS_TORCH = importlib.util.find_spec("torch") is not None
CORE = Path(__file__).parent / "core"
TOGETHER = (
    "tests/end_to_end/test_join.py",
    "tests/end_to_end/test_real_model.py",
    "tests/lab/report/test_report_browser.py",
)
"""Modules whose tests share something expensive: one process runs all of a module's."""
REAL_MODEL = Path(__file__).parents[1] / ".models" / "smollm2-135m-instruct"
NEEDS_TORCH = "needs torch (`make setup` installs it)"


def _lacks_torch(error: BaseException | None) -> bool:
    """Whether torch is what `error`, or what caused it, could not import."""
    while error is not None:
        if isinstance(error, ImportError) and "torch" in (error.name, str(error).lower()):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Module(pytest.Module):
    """A module that only torch's absence keeps from being imported is skipped."""

    def _getobj(self) -> object:
        try:
            return super()._getobj()
        except self.CollectError as error:
            if not HAS_TORCH and _lacks_torch(error):
                pytest.skip(NEEDS_TORCH, allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: object, parent: pytest.Collector) -> pytest.Module:
    return _Module.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    return (yield from _skipping_what_is_not_there())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    return (yield from _skipping_what_is_not_there())


def _skipping_what_is_not_there() -> Iterator[None]:
    try:
        return (yield)
    except ImportError as error:
        if not HAS_TORCH and _lacks_torch(error):
            pytest.skip(NEEDS_TORCH)
        if isinstance(error, ModuleNotFoundError) and error.name == "nixl_cu12":
            pytest.skip(how_to_install(error) or "needs nixl-cu12 (`make setup` installs it)")
        raise


@pytest.fixture
def needs_torch() -> None:
    """For tests that need it in another process."""
    if not HAS_TORCH:
        pytest.skip(NEEDS_TORCH)


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """For sockets, whose paths may have 107 bytes: `tmp_path` of a test that runs beside others is too long."""
    with tempfile.TemporaryDirectory(prefix="dp") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct (`dualpath checkpoint --real`), made once on this machine."""
    from dualpath.model.real_checkpoint import FetchError, make_real_checkpoint

    REAL_MODEL.parent.mkdir(exist_ok=True)
    with REAL_MODEL.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run beside this one wait for it
        try:
            return make_real_checkpoint(REAL_MODEL)
        except FetchError as error:
            pytest.skip(f"the real model cannot be had here: {error}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that none is left for the end when its neighbours' processors are idle."""
    for item in items:
        if CORE in item.path.parents:
            item.add_marker("core")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Every test goes where there is room, but for those of `TOGETHER`."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if module in TOGETHER else nodeid

    return Scheduling(config, log)
