"""The models that `dualpath checkpoint` can make, apart from what makes them, which needs torch."""

from typing import Literal

Architecture = Literal[
    "qwen2",
    "qwen3",
    "llama",
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "gpt_oss",
    "mimo_v2_flash",
    "gemma2",
    "gemma3_text",
    "olmo3",
    "exaone4",
    "cohere2",
    "mistral",
]
