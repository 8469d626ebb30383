"""What the server must know of the model, by what the first prefill engine has said of it."""

from pathlib import Path

from dualpath.cluster import messages as m
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.generator import ModelFacts


def served_model(config: ClusterConfig, join: m.Join, path: str, version: str) -> ModelFacts:
    """`path` and `version` are those of the weights. Raises ValueError as `ClusterConfig.generation_defaults`."""
    return ModelFacts(
        name=config.served_model_name or Path(config.model).name,
        aliases=config.served_model_aliases,
        path=path,
        max_model_len_tokens=join.max_model_len_tokens,
        vocab_size=join.vocab_size,
        eos_token_ids=join.eos_token_ids,
        defaults=config.generation_defaults(),
        cluster=config.served(join.layout.layers, join.layout.kv_bytes),
        weight_version=version,
    )
