"""The smallest record of each format: 70 tokens of prompt and 2 generated."""

RECORDS = {
    "weka": {"id": "w", "requests": [{"type": "s", "in": 70, "out": 2, "hash_ids": [1]}]},
    "mooncake": {"timestamp": 0, "input_length": 70, "output_length": 2, "hash_ids": [1]},
    "miniswe": {"timestamp": 0, "session_id": "m", "input": "x" * 280, "output": "y" * 8},
    "chat": {"messages": [{"role": "user", "content": "x" * 280}, {"role": "assistant", "content": "y" * 8}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "x" * 280}, {"from": "gpt", "value": "y" * 8}]},
}
