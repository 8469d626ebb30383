"""A worker's connection to its agent, over a real socket, with a scripted agent at the other end."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster.attachment import Attach, Leave, Reply
from dualpath.cluster.vllm_attachment import AttachWorker, Drop
from dualpath.cluster.vllm_log import without_agent
from dualpath.core.vocabulary import Role
from dualpath.transfer.pool import MappedPages
from dualpath.vllm import agent_link
from dualpath.vllm.agent_link import AgentLink
from tests.vllm.fakes import LAYOUT
from tests.vllm.scripted_agent import ScriptedAgent, wait_until

ENGINE = Attach(
    role=Role.PREFILL,
    name="prefill-0",
    pid=1,
    layout=LAYOUT,
    model_fingerprint="f",
    max_model_len_tokens=100,
    vocab_size=10,
    eos_token_ids=(),
    ticket="t",
)
HELLO = AttachWorker(engine=ENGINE, rank=0, workers=1, url="http://h:1", model="m")


class Worker:
    def __init__(self) -> None:
        self.pages: list[MappedPages] = []
        self.detached_times = 0
        self.messages: list[msgspec.Struct] = []

    def attached(self, pages: MappedPages) -> None:
        self.pages.append(pages)

    def detached(self) -> None:
        self.detached_times += 1

    def handle(self, message: msgspec.Struct) -> None:
        self.messages.append(message)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def link(tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentLink]:
    monkeypatch.setattr(agent_link, "RETRY_S", 0.02)
    made = AgentLink(str(tmp_path / "agent"), HELLO)
    made.start(worker)
    yield made
    made.close()


def test_it_attaches_maps_the_buffer_and_beats(tmp_path: Path, link: AgentLink, worker: Worker) -> None:
    agent = ScriptedAgent(tmp_path / "agent", pages=3).start()
    assert agent.wait_attached() == HELLO
    wait_until(lambda: len(worker.pages) == 1, "the buffer is mapped")
    agent.page(1)[:] = 7
    assert (worker.pages[0].view(1) == 7).all()
    wait_until(lambda: agent.beats >= 2, "it beats")
    agent.tell(Drop((1, 2)))
    wait_until(lambda: worker.messages == [Drop((1, 2))], "the message is there")
    link.say(Reply(5))
    assert agent.answer(5) == ""
    agent.stop()


def test_an_agent_that_is_gone_and_back(tmp_path: Path, link: AgentLink, worker: Worker) -> None:
    agent = ScriptedAgent(tmp_path / "agent", pages=3).start()
    for attached in (1, 2):
        wait_until(lambda attached=attached: len(worker.pages) == attached, "it is attached")  # type: ignore[misc]
        agent.stop()
        wait_until(lambda attached=attached: worker.detached_times == attached, "it is detached")  # type: ignore[misc]
        link.say(Reply(1))
        agent.start()
    agent.wait_attached()
    agent.stop()


def test_an_agent_that_refuses(tmp_path: Path, link: AgentLink, caplog: pytest.LogCaptureFixture) -> None:
    agent = ScriptedAgent(tmp_path / "agent", refusal=Leave("another model", failed=True, refused=True)).start()
    wait_until(lambda: "another model" in caplog.text, "the refusal is in the log")
    assert without_agent(caplog.messages[-1]) == ("another model", True)  # who started vLLM reads it
    agent.stop()


def test_a_buffer_of_another_model(
    tmp_path: Path, link: AgentLink, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    from dualpath.transfer.pool import BufferPool

    agent = ScriptedAgent(tmp_path / "agent", pages=3)
    agent.pool = BufferPool.create("other", LAYOUT.full_block_bytes + 1, 2, directory=tmp_path)
    agent.start()
    wait_until(lambda: "no Full Block of this model" in caplog.text, "it is in the log")
    assert worker.pages == []
    agent.stop()


def test_bytes_that_are_no_record_end_the_connection(tmp_path: Path, link: AgentLink, worker: Worker) -> None:
    agent = ScriptedAgent(tmp_path / "agent", pages=3).start()
    agent.wait_attached()
    agent.tell(HELLO)  # no record for a worker
    wait_until(lambda: worker.detached_times == 1, "it is detached")
    agent.wait_attached()
    agent.stop()


def test_beats_do_not_pile_up_before_an_agent_that_gets_no_processor(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_link, "BEAT_S", 0.0005)
    monkeypatch.setattr(agent_link, "SEND_S", 1)
    agent = ScriptedAgent(tmp_path / "agent", pages=3).start()
    link = AgentLink(str(tmp_path / "agent"), HELLO)
    link.start(worker)
    agent.wait_attached()
    with agent.changed:
        time.sleep(2.5)  # 5,000 beats; the socket takes 280
        link.say(Reply(5))
    assert agent.answer(5) == ""
    assert worker.detached_times == 0
    link.close()
    agent.stop()


def test_an_agent_that_does_not_read_is_gone(
    tmp_path: Path, link: AgentLink, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker must not wait for it for ever in vLLM's step."""
    monkeypatch.setattr(agent_link, "SEND_S", 1)
    agent = ScriptedAgent(tmp_path / "agent", pages=3)
    hold = threading.Lock()
    agent.changed = threading.Condition(hold)
    agent.start()
    wait_until(lambda: len(worker.pages) == 1, "it is attached")
    with hold:
        for _ in range(200):
            link.say(Reply(1, error="x" * 10_000))
            if worker.detached_times:
                break
    wait_until(lambda: worker.detached_times >= 1, "it is detached")
    wait_until(lambda: "has read nothing for 1 s" in caplog.text, "the log says why")
    agent.stop()
