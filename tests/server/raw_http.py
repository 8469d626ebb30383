"""HTTP by hand, for requests that no client library sends."""

import json
import socket
from typing import Any


def connect(url: str, timeout_s: float = 30) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


def exchange(url: str, *parts: bytes) -> bytes:
    """Returns all that the server sends until it closes the connection, which it must do within 30 s."""
    with connect(url) as connection:
        for part in parts:
            connection.sendall(part)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = bytearray()
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return bytes(received)


def post(path: str, body: bytes, *headers: bytes, close: bool = True) -> bytes:
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: x", b"Content-Length: %d" % len(body), *headers]
    lines += [b"Connection: close"] if close else []
    return b"\r\n".join([*lines, b"", body])


def answers(received: bytes) -> list[tuple[int, Any]]:
    """Returns status and JSON body of each answer, none of which may be chunked."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status_line, *headers = head.split(b"\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in headers)
        length = int(fields[b"content-length"])
        found.append((int(status_line.split()[1]), json.loads(rest[:length]) if length else None))
        received = rest[length:]
    return found


def answer(received: bytes) -> tuple[int, Any]:
    (one,) = answers(received)
    return one


def error_code(received: bytes) -> tuple[int, str]:
    """Returns status and code of the one answer, an error of OpenAI's shape."""
    status, body = answer(received)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return status, body["error"]["code"]
