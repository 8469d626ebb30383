"""What a forked engine process runs first. Imports nothing heavy itself, so that the supervisor can name it."""

from dualpath.runtime.messages import EngineConfig


def engine_entry(config: EngineConfig) -> None:
    """Run one engine in this process."""
    from dualpath.runtime.engine_main import run_engine

    run_engine(config)
