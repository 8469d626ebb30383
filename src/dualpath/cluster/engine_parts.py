"""The nodes of a topology as parts of a supervisor's table.

A node's agent is a fresh process. Engines are forked from a server process that has imported torch and transformers
once: the second and later ones start in a fraction of a second and share those pages. Forking is safe because the fork
server has no other threads.
"""

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import msgspec

from dualpath.cluster.attachment import LEAVE, AgentConfig, EngineConfig
from dualpath.cluster.children import Child, end_with_parent, leave_signals_to_the_parent, started, teller
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.leftovers import socket_directory
from dualpath.cluster.parts import Part
from dualpath.cluster.preflight_files import check_buffers
from dualpath.cluster.vllm_parts import vllm_part
from dualpath.core.vocabulary import Role
from dualpath.spec.log import ROOT

logger = logging.getLogger(f"{ROOT}.cluster")

MAX_ENGINES = 64
"""More processes than this would take a host's memory before they could serve."""
_FORK_SERVER = "dualpath.cluster.engines.fork_server"
_PRELOADED = [_FORK_SERVER, "dualpath.cluster.engines.main", "dualpath.cluster.engines.fork_server_ready"]


class NodeParts(msgspec.Struct, frozen=True):
    """One node: its agent, and its engines, which attach to that."""

    agent: Part
    engines: list[Part]


def node_parts(
    config: ClusterConfig, control_address: str, weights: Callable[[], str] | None = None
) -> list[NodeParts]:
    """Returns every node of the topology. `weights()` is the checkpoint that is served when an engine starts.

    Raises ValueError when there are too many engines for one host, or their buffers can't be.
    """
    topology = config.topology
    if topology.engines > MAX_ENGINES:
        raise ValueError(
            f"{topology} is more than {MAX_ENGINES} engines on one host; start fewer, or let "
            "nodes of other hosts join with --join-address"
        )
    check_buffers(config, topology.engines)
    counts = ((Role.PREFILL, topology.prefill_nodes), (Role.DECODE, topology.decode_nodes))
    directory, nodes, first_gpu = socket_directory(), [], 0
    for role, rank in [(role, rank) for role, n in counts for rank in range(n)]:
        nodes.append(one_node(config, control_address, role, rank, directory, weights, first_gpu))
        first_gpu += len(nodes[-1].engines) * config.vllm.gpus_per_server
    return nodes


def one_node(
    config: ClusterConfig,
    control_address: str,
    role: Role,
    rank: int,
    directory: str | None = None,
    weights: Callable[[], str] | None = None,
    first_gpu: int = 0,
) -> NodeParts:
    """Returns one node; `directory` is where its engines find its agent. `weights`: see `node_parts`.

    vLLM's servers get GPUs from `first_gpu` on.
    """
    socket = f"{directory or socket_directory()}/{role.value}-{rank}.sock"
    first = sum(config.of_node(role, before).topology.sizes[0] for before in range(rank))
    own = config.of_node(role, rank)
    numbers = range(first, first + own.topology.sizes[0])
    engines = []
    for number in numbers:
        name = f"{role.value}-{number}"
        if config.engine == "vllm":
            vllm = config.vllm
            gpu = first_gpu + (number - first) * vllm.gpus_per_server
            engines.append(vllm_part(own, socket, role, name, vllm.gpus[gpu : gpu + vllm.gpus_per_server]))
        else:
            engines.append(_engine(own, socket, role, name, weights))
    return NodeParts(agent_part(own, control_address, f"{role.value}-node-{rank}", socket), engines)


def all_parts(nodes: list[NodeParts]) -> list[Part]:
    """Returns the parts of nodes: agents first, which are there at once."""
    return [node.agent for node in nodes] + [engine for node in nodes for engine in node.engines]


def agent_part(config: ClusterConfig, control_address: str, name: str, socket: str) -> Part:
    def start(child: Child) -> BaseProcess:
        settings = AgentConfig(
            coordinator=control_address,
            cluster=config.without_api_keys(),
            name=f"{os.uname().nodename}/{os.getpid()}/{name}",
            socket=socket,
            ticket=child.ticket,
        )
        return started("spawn", agent_entry, (settings, os.getpid(), child.telling), name)

    return Part(name, start, dismiss=lambda child: os.kill(child.pid, LEAVE))


def _engine(config: ClusterConfig, agent: str, role: Role, name: str, weights: Callable[[], str] | None) -> Part:
    def start(child: Child) -> BaseProcess:
        if name == f"{Role.PREFILL.value}-0":
            logger.info("starts engines; torch is imported once for all")
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
        served = config.model if weights is None else weights()
        cluster = msgspec.structs.replace(config.without_secrets(), model=served)
        settings = EngineConfig(role=role, agent=agent, cluster=cluster, name=name, ticket=child.ticket)
        return started("forkserver", engine_entry, (settings, child.telling), name)

    return Part(name, start)


def agent_entry(config: AgentConfig, parent: int, telling: Connection) -> None:
    """Run a node agent in this process; its steps go to the supervisor."""
    leave_signals_to_the_parent()
    signal.signal(LEAVE, signal.SIG_DFL)
    end_with_parent(parent, LEAVE)
    from dualpath.cluster.agent.main import run_agent

    run_agent(config, teller(telling))


def engine_entry(config: EngineConfig, telling: Connection) -> None:
    """Run one engine in this process; its steps go to the supervisor, as long as that lives."""
    leave_signals_to_the_parent()
    preloaded = sys.modules.get(_FORK_SERVER)  # not in a program that had a fork server of its own before
    end_with_parent(preloaded.PID if preloaded is not None else os.getppid())
    from dualpath.cluster.engines.main import run_engine

    run_engine(config, teller(telling))
