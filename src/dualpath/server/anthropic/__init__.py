"""Anthropic's Messages API: a body becomes a chat (`request`), and the chat's answer a message (`answer`)."""
