"""Chats: how messages become a prompt, and how generated text becomes a message again."""
