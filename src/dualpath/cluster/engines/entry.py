"""What a forked engine process runs first. Imports nothing heavy itself, so that the supervisor can name it."""

from dualpath.cluster.messages import EngineConfig


def engine_entry(config: EngineConfig) -> None:
    """Run one engine in this process."""
    from dualpath.cluster.engines.main import run_engine

    run_engine(config)
