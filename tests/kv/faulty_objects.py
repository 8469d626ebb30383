"""A WebDAV server of objects in memory that fails as it is told: what a real one does on a bad day."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

from dualpath.kv.stores.bucket import Bucket

CUT = "cut"
"""A fault: half of the body comes, then the connection ends. Another fault is a status code."""
RESET = "reset"
"""A fault: the connection ends at once."""
HANG = "hang"
"""A fault: no answer comes while the server runs."""


class FaultyObjects:
    """`faults` maps (method, a part of the object's name) to a status code or a fault; "" is in every name."""

    def __init__(self, port: int = 0) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], int | str] = {}
        self.asked: Counter[str] = Counter()
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/kv"

    @contextmanager
    def running(self) -> Iterator["FaultyObjects"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def bucket(self) -> Bucket:
        return Bucket.open(self.url)

    def fault(self, method: str, name: str) -> int | str | None:
        self.asked[method] += 1
        return next((fault for (of, part), fault in self.faults.items() if of == method and part in name), None)

    def listing(self, folder: str) -> bytes | None:
        names = {name[len(folder) :].split("/")[0] for name in self.objects if name.startswith(folder)}
        if not names:
            return None
        entries = [folder] + [
            f"{folder}{name}" if folder + name in self.objects else f"{folder}{name}/" for name in names
        ]
        return (
            b'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">'
            + b"".join(map(self._entry, entries))
            + b"</D:multistatus>"
        )

    def _entry(self, name: str) -> bytes:
        kind = "<D:collection/>" if name.endswith("/") else ""
        size = len(self.objects.get(name, b""))
        return (
            f"<D:response><D:href>/{quote(name)}</D:href><D:propstat><D:prop>"
            f"<D:getlastmodified>{formatdate(usegmt=True)}</D:getlastmodified><D:getcontentlength>{size}"
            f"</D:getcontentlength><D:resourcetype>{kind}</D:resourcetype></D:prop>"
            "<D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
        ).encode()

    def _handler(outer) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # an answer is one packet

            def answer(self) -> None:
                name, fault = unquote(self.path).lstrip("/"), None
                body = self.body()
                fault = outer.fault(self.command, name)
                if fault == HANG:
                    outer.over.wait()
                if fault in (RESET, HANG):
                    self.connection.close()
                    self.close_connection = True
                elif isinstance(fault, int):
                    self.reply(fault, b"no")
                elif self.command == "PUT":
                    outer.objects[name] = body
                    self.reply(201)
                elif self.command == "DELETE":
                    self.reply(404 if outer.objects.pop(name, None) is None else 204)
                elif self.command == "PROPFIND":
                    found = outer.listing(name.rstrip("/") + "/" if name else "")
                    self.reply(404 if found is None else 207, found or b"")
                else:
                    self.send_object(name, cut=fault == CUT)

            do_GET = do_HEAD = do_PUT = do_DELETE = do_PROPFIND = answer  # noqa: N815

            def body(self) -> bytes:
                if self.headers.get("transfer-encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("content-length", 0)))
                chunks = []
                while n_bytes := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(n_bytes))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def send_object(self, name: str, *, cut: bool) -> None:
                raw = outer.objects.get(name)
                if raw is None:
                    return self.reply(404)
                status, extra = 200, {"Last-Modified": formatdate(usegmt=True), "ETag": f'"{hash(raw)}"'}
                if "range" in self.headers:
                    first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
                    part = raw[first : last + 1]
                    extra["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(raw)}"
                    status, raw = 206, part
                return self.reply(status, raw, extra, cut=cut)

            def reply(
                self, status: int, body: bytes = b"", extra: dict[str, str] | None = None, *, cut: bool = False
            ) -> None:
                self.send_response(status)
                for header, value in ({"Content-Length": str(len(body))} | (extra or {})).items():
                    self.send_header(header, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        return Handler
