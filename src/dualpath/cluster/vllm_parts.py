"""vLLM's servers as parts of a supervisor's table: one for each engine of a node."""

import contextlib
import os
import shutil
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from dualpath.cluster.attachment import LEAVE
from dualpath.cluster.children import Child, end_with_parent, leave_signals_to_the_parent, started, teller
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.parts import Part
from dualpath.cluster.vllm_launch import command, environment, free_port
from dualpath.cluster.vllm_server import VllmServerConfig
from dualpath.core.vocabulary import Role


def vllm_part(config: ClusterConfig, agent: str, role: Role, name: str, gpus: tuple[str, ...]) -> Part:
    """Returns an engine's server; `agent` is its agent's socket, beside which vLLM has its own ones."""

    def start(child: Child) -> BaseProcess:
        host = config.vllm.host or config.data_host
        port = free_port(host)
        temporary = Path(agent).parent / name
        shutil.rmtree(temporary, ignore_errors=True)  # a killed server leaves its sockets
        temporary.mkdir(mode=0o700)
        settings = VllmServerConfig(
            name=name,
            command=command(config, role, agent=agent, name=name, ticket=child.ticket, host=host, port=port),
            environment=environment(config, host=host, temporary=temporary, gpus=gpus),
            host=host,
            port=port,
            log=f"{config.vllm.logs}/{name}.log",
            log_format=config.log_format,
        )
        child.leads_session = True
        return started("spawn", vllm_entry, (settings, os.getpid(), child.telling), name)

    return Part(name, start, dismiss=_dismiss)


def _dismiss(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, LEAVE)


def vllm_entry(config: VllmServerConfig, parent: int, telling: Connection) -> None:
    """Run one server below this process, which leads a session of its own."""
    os.setsid()
    leave_signals_to_the_parent()
    signal.signal(LEAVE, signal.SIG_DFL)
    end_with_parent(parent, LEAVE)
    from dualpath.cluster.vllm_server import run_vllm

    run_vllm(config, teller(telling))
