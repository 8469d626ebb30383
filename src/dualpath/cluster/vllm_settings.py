"""How vLLM's servers are launched: the settings, and which of vLLM's arguments are ours.

What follows ``--`` on the command line goes to every server. Arguments that the cluster depends on are set by us and
refused there.
"""

import os
import secrets

import msgspec

from dualpath.core.vocabulary import BLOCK_TOKENS

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's own name: what its servers ask of the router and of agents. It is in the environment, never in arguments."""
_SET_BY_US = (
    "--host",
    "--port",
    "--uds",
    "--model",
    "--served-model-name",
    "--api-key",
    "--kv-transfer-config",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--enable-scale-out",
    "--enable-prompt-tokens-details",
)
_NOT_POSSIBLE = {
    "--config": "a file could set what the cluster depends on; give its options here",
    "--data-parallel-size": "give --topology 1Px2: every engine of a node is a server of its own",
    "-dp": "give --topology 1Px2: every engine of a node is a server of its own",
    "--headless": "a server without HTTP can't be asked",
    "--ssl-certfile": "clients reach the router: give --ssl-certfile before --",
    "--ssl-keyfile": "clients reach the router: give --ssl-keyfile before --",
    "--root-path": "clients reach the router",
}


class VllmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `dualpath serve --engine vllm` needs to launch servers."""

    python: str = ""
    """The interpreter of vLLM's environment; empty: it is looked for."""
    arguments: tuple[str, ...] = ()
    """For every server; see `vllm_launch.command` for what we add."""
    host: str = ""
    """Address at which the servers listen, for the router and the node's agent; empty: the data host."""
    logs: str = ""
    """The folder of the servers' logs; empty: one is made."""
    version: str = ""
    """What `python` has; empty: not asked yet."""
    device: str = "cpu"
    """What that vLLM is built for: ``cpu`` or ``cuda``."""
    gpus: tuple[str, ...] = ()
    """This host's, as in CUDA_VISIBLE_DEVICES; servers get them in turn."""

    def __post_init__(self) -> None:
        for argument in self.arguments:
            name = name_of(argument)
            if name in _SET_BY_US:
                raise ValueError(f"{argument}: dualpath sets vLLM's {name} itself; leave it out after --")
            if name in _NOT_POSSIBLE:
                raise ValueError(f"{argument}: vLLM's {name} can't be given after --: {_NOT_POSSIBLE[name]}")
        tokens = self.number("--block-size", BLOCK_TOKENS)
        if tokens < 1 or BLOCK_TOKENS % tokens:
            raise ValueError(f"--block-size is {tokens}; it must divide {BLOCK_TOKENS}, the tokens of a block")

    def has(self, *names: str) -> bool:
        """Returns whether one of these arguments is given."""
        return any(name_of(argument) in names for argument in self.arguments)

    def number(self, name: str, default: int, short: str = "") -> int:
        """Returns the whole number that an argument gives. Raises ValueError when it is none."""
        for index, argument in enumerate(self.arguments):
            if name_of(argument) in (name, short):
                _, given_here, text = argument.partition("=")
                text = text if given_here else "".join(self.arguments[index + 1 : index + 2])
                if not text.isdecimal():
                    raise ValueError(f"{name} is {text!r}; it must be a whole number")
                return int(text)
        return default

    def runs_on(self, device: str) -> bool:
        """Returns whether servers are started here, on that kind of device."""
        return bool(self.version) and self.device == device

    @property
    def gpus_per_server(self) -> int:
        return self.number("--tensor-parallel-size", 1, "-tp") * self.number("--pipeline-parallel-size", 1, "-pp")


def name_of(argument: str) -> str:
    """Returns an argument's name as vLLM reads it: ``--max_model_len=8`` is ``--max-model-len``."""
    name = argument.partition("=")[0]
    return name.partition(".")[0].replace("_", "-") if name.startswith("--") else name


def make_key() -> None:
    """Have a key in the environment of this process, and so of all that it starts; one that is there stays."""
    if not os.environ.get(KEY_VARIABLE):
        os.environ[KEY_VARIABLE] = secrets.token_urlsafe(32)
