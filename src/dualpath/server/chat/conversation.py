"""Builds chat messages out of the finer parts that other APIs send: blocks of a turn, items of a response."""

from dualpath.server.protocol import ChatMessage


class Conversation:
    """Chat messages in the making.

    Everything that the assistant says between two messages of others is one message, and so is everything that a user
    says. Instructions at the start are one system message, because many templates take no other; later ones keep
    their role.
    """

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._texts: list[list[str]] = []

    def say(self, role: str, text: str) -> None:
        """Add text of a system, developer, user or assistant message."""
        if role in ("system", "developer") and all(message.role == "system" for message in self._messages):
            role = "system"
        self._open(role)
        self._texts[-1].append(text)

    def think(self, text: str) -> None:
        message = self._open("assistant")
        message.reasoning_content = (
            text if message.reasoning_content is None else f"{message.reasoning_content}\n{text}"
        )

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """Add a tool call; `arguments` is JSON text."""
        message = self._open("assistant")
        if message.tool_calls is None:
            message.tool_calls = []
        message.tool_calls.append(
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        )

    def result(self, call_id: str, text: str) -> None:
        """Add the result of a tool call."""
        self._messages.append(ChatMessage(role="tool", tool_call_id=call_id))
        self._texts.append([text])

    def messages(self) -> list[ChatMessage]:
        for message, texts in zip(self._messages, self._texts, strict=True):
            if len(texts) == 1:
                message.content = texts[0]
            elif texts:
                message.content = [{"type": "text", "text": text} for text in texts]
        return self._messages

    def _open(self, role: str) -> ChatMessage:
        """Returns the message that `role` is writing."""
        if not self._messages or self._messages[-1].role != role:
            self._messages.append(ChatMessage(role=role))
            self._texts.append([])
        return self._messages[-1]
