"""Why a vLLM server has ended, out of what vLLM 0.32 really writes."""

import pytest

from dualpath.cluster.vllm_log import reason_in, step_of, without_agent

CORE = "(EngineCore pid=779) ERROR 11-29 17:08:00 [core.py:1510]"
AFTERWARDS = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["  [model_tag]", "api_server.py: error: unrecognized arguments: --foo"],
            "unrecognized arguments: --foo",
        ),
        (
            [
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, User-specified max_model_len (99) is greater [type=value_error, input_value=…]",
                "    For further information visit https://errors.pydantic.dev/2.14/v/value_error",
            ],
            "Value error, User-specified max_model_len (99) is greater",
        ),
        (
            [
                f"{CORE}     raise ValueError(",
                f"{CORE} ValueError: To serve at least one request",
                "    raise RuntimeError(",
                AFTERWARDS,
            ],
            "To serve at least one request",
        ),
        (["(Worker pid=3) torch.OutOfMemoryError: CUDA out of memory.", AFTERWARDS], "CUDA out of memory."),
        ([AFTERWARDS], AFTERWARDS.removeprefix("RuntimeError: ")),
        (["AssertionError: "], "AssertionError:"),
        (
            ["(APIServer pid=1) WARNING 11-29 17:08:11 [a.py:2] can cause errors like `OSError: [Errno 24] Too`"],
            "",
        ),
        (["INFO: fine", "\x00\xff", ""], ""),
        (
            [
                f"{CORE} Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.",
                f"{CORE} RuntimeError: cancelled",
                "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above).",
            ],
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.",
        ),
    ],
)
def test_the_cause_is_found_and_not_what_follows_from_it(lines: list[str], reason: str) -> None:
    assert reason_in(lines) == reason


def test_a_reason_is_short() -> None:
    assert len(reason_in(["ValueError: " + "x" * 9_000])) == 500


def test_steps() -> None:
    said = "(Worker pid=28634) INFO 11-29 16:59:06 [default_loader.py:501] Loading weights took 0.01 seconds"
    assert step_of(said) == "makes room for KV"
    assert step_of("(APIServer pid=1) INFO 11-29 16:58:41 [api_utils.py:347]") is None


def test_what_the_connector_says_of_its_agent() -> None:
    line = "(Worker pid=1) WARNING 11-29 [agent_link.py:106] the agent at /a.sock is not there ({}); vLLM serves on"
    said = [f"{line.format(why)} without it" for why in ("[Errno 2] No such file", "it refuses: it can't join: no (x)")]
    assert [without_agent(each) for each in said] == [
        ("[Errno 2] No such file", False),
        ("it can't join: no (x)", True),
    ]
    assert without_agent("attached to the agent at /a.sock") is None
