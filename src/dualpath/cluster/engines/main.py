"""An engine process from start to end: load the model, measure, attach to the node's agent, compute, leave.

It has these threads: the main thread, which takes the agent's calls; one compute thread (torch); one for copies; a few
for grammars and weights; one that beats; and, of a prefill engine, a loader and a shipper. The supervisor's fork server
starts it, after importing this module (and so torch) once for all engines of a host. Read `prefill` and `decode` next.
"""

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor

import msgspec
import torch
from transformers.utils import logging as transformers_log

from dualpath.cluster import attachment as a
from dualpath.cluster.attachment_frames import Connection, NotAPeerError
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engines.cnic_copies import device_copies
from dualpath.cluster.engines.constraining import Constrainer
from dualpath.cluster.engines.decode import DecodeCompute
from dualpath.cluster.engines.orders import EngineOrders
from dualpath.cluster.engines.prefill import AgentLayerIO, PrefillCompute
from dualpath.cluster.parts import CAN_NOT_RUN
from dualpath.core.vocabulary import Role
from dualpath.model import DeviceCopiesError, LayerIOTimeoutError, LoadedModel, model_fingerprint, profile_attention
from dualpath.spec.log import ROOT, start_log
from dualpath.thread_names import COMPUTE_THREAD, named_threads

Tell = Callable[[str], None]
"""Takes a step of an engine's start, in the words that are logged."""

ATTACH_S = 600.0
"""How long an engine waits for its agent: at the start, and when it has lost it."""
RETRY_S = 0.1
"""Pause between two tries."""

_decoder = msgspec.msgpack.Decoder(a.ToEngineProcess)


def run_engine(config: a.EngineConfig, tell: Tell | None = None) -> None:
    """Compute until told to leave. Exits with code 1 when the engine can't start or breaks, and tells why.

    Without `tell`, the steps of the start go to this process's log.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    cluster = config.cluster
    start_log(cluster.log_format)
    tell = tell or logging.getLogger(f"{ROOT}.engine {config.name}").info
    transformers_log.disable_progress_bar()  # several engines' bars on one terminal are unreadable, and no log's line
    torch.set_num_threads(cluster.threads)
    try:
        engine = Engine(config, _load(cluster, tell), tell)
        try:
            engine.run(tell)
        finally:
            engine.close()
    except (OSError, ValueError, torch.OutOfMemoryError, DeviceCopiesError) as error:
        tell(f"{CAN_NOT_RUN}{' '.join(str(error).split())}")
        raise SystemExit(1) from error


def _load(cluster: ClusterConfig, tell: Tell) -> LoadedModel:
    """Raises ValueError whatever is wrong with the checkpoint: its readers have errors of many kinds."""
    if cluster.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {cluster.device}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    tell(f"loads weights from {cluster.model}")
    try:
        return LoadedModel.load(cluster.model, device=cluster.device, dtype=cluster.dtype, threads=cluster.threads)
    except Exception as error:
        raise ValueError(f"{cluster.model} can't be loaded: {type(error).__name__}: {error}") from error


class LeaveError(Exception):
    """The agent has told this engine to leave, or it can't go on (`failed`)."""

    def __init__(self, reason: str, failed: bool, refused: bool = False) -> None:
        super().__init__(f"{CAN_NOT_RUN}{reason}" if refused else f"leaves: {reason}")
        self.failed = failed


class Engine:
    """A loaded engine, which attaches to its agent, and to the next one if that is lost."""

    def __init__(self, config: a.EngineConfig, model: LoadedModel, tell: Tell) -> None:
        """Raises ValueError when the device memory does not hold a block."""
        cluster = config.cluster
        self._config = config
        self._compute: Executor = named_threads(1, COMPUTE_THREAD)
        self._copies: Executor = named_threads(1, "copies")
        self._constrainer = Constrainer(model, cluster.model)
        self._connection: Connection | None = None
        self._ending: LeaveError | None = None
        self.facts = a.Attach(
            role=config.role,
            name=config.name,
            pid=os.getpid(),
            ticket=config.ticket or secrets.token_hex(16),
            layout=model.layout,
            model_fingerprint=model_fingerprint(cluster.model),
            max_model_len_tokens=model.max_length_tokens,
            vocab_size=model.vocab_size,
            eos_token_ids=tuple(model.eos_token_ids),
            scores_prompts=model.scores_prompts,
        )
        self.worker: PrefillCompute | DecodeCompute
        # On the compute thread, so that its memory and kernels are warm for the first request.
        if config.role is Role.PREFILL:
            tell("measures how fast it prefills")
            self.worker = self._start_prefill(model)
        else:
            tell("warms up")
            self.worker = self._start_decode(model)
        self._orders = EngineOrders(cluster.model, model, self.worker, self._compute)

    def _start_prefill(self, model: LoadedModel) -> PrefillCompute:
        cluster = self._config.cluster
        worker = PrefillCompute(model, cluster, self._constrainer, device_copies(cluster, model.device))
        fixed_ns, ns_per_flop = profile_attention(model)
        self.facts = msgspec.structs.replace(
            self.facts,
            rows_path=str(worker.rows.path),
            prefill_tokens_per_s=self._compute.submit(worker.measure_tokens_per_s).result(),
            attention=a.AttentionFigures(
                fixed_ns, ns_per_flop, model.attention_flops_per_token, model.attention_flops_per_pair
            ),
        )
        return worker

    def _start_decode(self, model: LoadedModel) -> DecodeCompute:
        cluster, block_bytes = self._config.cluster, model.layout.full_block_bytes
        hbm_blocks = cluster.hbm_bytes // block_bytes
        if hbm_blocks < 1:
            raise ValueError(
                f"a Full Block of this model is {block_bytes} bytes; --hbm {cluster.hbm_bytes} does not hold one"
            )
        copies = device_copies(cluster, model.device)
        worker = DecodeCompute(model, hbm_blocks, self._constrainer, self._compute, self._send, copies)
        self._compute.submit(worker.warm_up).result()
        self.facts = msgspec.structs.replace(self.facts, hbm_blocks=hbm_blocks)
        return worker

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, tell: Tell) -> None:
        """Serve agents, one after another, until told to leave. Raises OSError when none is there for `ATTACH_S`,
        SystemExit with code 1 when this engine can't go on."""
        waits = "joins"
        try:
            while True:
                connection = self._connect(tell, waits)
                try:
                    self._serve(connection)
                except (OSError, NotAPeerError) as error:
                    if self._orders.asleep:
                        raise LeaveError("its memory sleeps, and who could wake it is gone", failed=True) from error
                    waits = f"has lost its agent ({error}), and waits for it"
                finally:
                    self._detach()
        except LeaveError as leaving:
            tell(str(leaving))
            if leaving.failed:
                raise SystemExit(1) from leaving

    def _connect(self, tell: Tell, waits: str) -> Connection:
        tell(waits)
        deadline_s = time.monotonic() + ATTACH_S
        while True:
            try:
                return Connection.to(self._config.agent)
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise OSError(f"no agent at {self._config.agent} for {ATTACH_S:.0f} s: {error}") from error
                time.sleep(RETRY_S)

    def _serve(self, connection: Connection) -> None:
        """Take the agent's calls until it is gone. Raises ConnectionError, LeaveError."""
        self._connection = connection
        fingerprint = self._orders.fingerprint or self.facts.model_fingerprint
        connection.send(msgspec.structs.replace(self.facts, model_fingerprint=fingerprint))
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(ended,), name="beats", daemon=True)
        beats.start()
        try:
            while True:
                self._handle(connection.receive(_decoder))
        except OSError:
            if self._ending is not None:
                raise self._ending from None
            raise
        finally:
            ended.set()
            beats.join()

    def _detach(self) -> None:
        """Nothing of the agent that is gone may go on: its sequences and batches end."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if isinstance(self.worker, PrefillCompute):
            self.worker.detach()
        else:
            self._copies.submit(self.worker.detach).result()
        self._compute.submit(lambda: None).result()  # the batch or step in progress has ended
        self._constrainer.clear()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(self._config.cluster.heartbeat_ns / 1e9):
            connection = self._connection
            if connection is not None:
                with contextlib.suppress(OSError):  # the main thread sees the end too
                    connection.send_beat(a.Beat(self.worker.gauges()))

    def _send(self, message: a.FromEngineProcess) -> None:
        """Send from any thread; to an agent that is gone, nothing."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):  # the main thread sees the end too
                connection.send(message)

    def _leave(self, reason: str) -> None:
        """End this process from any thread."""
        self._ending = LeaveError(reason, failed=True)
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        self._orders.close()
        self._constrainer.close()
        if isinstance(self.worker, PrefillCompute):
            self.worker.close()

    # ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _handle(self, message: a.ToEngineProcess) -> None:
        worker = self.worker
        match message:
            case a.Attached():
                self._attached(message)
            case a.Constrain():
                self._constrainer.make(message, self._send)
            case a.Forget():
                self._constrainer.forget(message)
            case a.CarryOut():
                self._orders.carry_out(message, self._send, self._leave)
            case a.Leave():
                raise LeaveError(message.reason, message.failed, message.refused)
            case a.RunBatch() if isinstance(worker, PrefillCompute):
                self._compute.submit(self._run_batch, worker, message)
            case a.Stop() if isinstance(worker, DecodeCompute):
                self._copies.submit(worker.stop, message.sequence)
            case a.Admit() | a.Fill() | a.Begin() | a.CopyOut() | a.Release() if isinstance(worker, DecodeCompute):
                self._copies.submit(self._answer, worker, message)
            case _:
                raise NotAPeerError(f"a {self._config.role.value} engine was sent {type(message).__name__}")

    def _attached(self, message: a.Attached) -> None:
        if isinstance(self.worker, DecodeCompute):
            self.worker.attach(message.pool_path)
            return
        connections = []
        for way in ("load", "ship"):
            connection = Connection.to(self._config.agent)
            connection.send(a.LayerThread(message.attachment, way))
            connections.append(connection)
        self.worker.io = AgentLayerIO(self.worker.rows, *connections)

    def _run_batch(self, worker: PrefillCompute, message: a.RunBatch) -> None:
        try:
            self._send(worker.run_batch(message))
        except (LayerIOTimeoutError, DeviceCopiesError) as error:
            # A thread hangs in a transfer, or a NIC may: only the end of this process proves that it is quiet.
            self._leave(f"internal error: {error}")
        except Exception as error:  # the batch failed: its agent fails each of its requests
            self._send(a.BatchDone(message.call, [], repr(error)))

    def _answer(self, worker: DecodeCompute, call: a.Admit | a.Fill | a.Begin | a.CopyOut | a.Release) -> None:
        try:
            reply = worker.serve(call)
        except DeviceCopiesError as error:  # the same; without an answer the agent keeps the pages until then
            self._leave(f"internal error: {error}")
            return
        except Exception as error:
            reply = a.Reply(call.call, error=repr(error))
        self._send(reply)
