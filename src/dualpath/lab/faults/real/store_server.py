"""An object server of a directory whose answers can be made slow, late, wrong or missing at any moment.

It speaks as much WebDAV as the cluster's store of objects needs. `faulty` decides for each request how it is answered.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from dualpath.lab.faults.matrix import Fault
from dualpath.spec.whole_file import write_whole

LATE_S = 2.0
SLOW_BYTES_PER_S = 300_000


class StoreServer(ThreadingHTTPServer):
    """Serves `root` at `url`. `fault` is what is wrong at present; None, nothing."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault: Fault | None = None
        self.healed = threading.Event()
        self.folders = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Say nothing of connections that end."""


@contextmanager
def store_server(root: Path) -> Iterator[StoreServer]:
    server = StoreServer(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.healed.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StoreServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Say nothing."""

    def _path(self) -> Path:
        return self.server.root / unquote(self.path).lstrip("/")

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(body)

    def _send(self, body: bytes) -> None:
        if self.server.fault is not Fault.SLOW:
            self.wfile.write(body)
            return
        for start in range(0, len(body), 8192):
            self.wfile.write(body[start : start + 8192])
            time.sleep(8192 / SLOW_BYTES_PER_S)

    def _is_hurt(self) -> bool:
        """Returns whether the request has had its answer, or never gets one."""
        fault = self.server.fault
        if fault is Fault.LATE:
            time.sleep(LATE_S)
        elif fault is Fault.HUNG:
            self.server.healed.wait()
            self.close_connection = True
            return True
        elif fault is Fault.WRONG:
            self._answer(500, b"this is no block")
            return True
        return False

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def do_GET(self) -> None:
        path = self._path()
        if self._is_hurt():
            return
        try:
            body, changed = path.read_bytes(), formatdate(path.stat().st_mtime, usegmt=True)
        except OSError:
            self._answer(404)
            return
        facts = {"Last_Modified": changed, "ETag": f'"{path.stat().st_mtime_ns:x}"'}
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes="):
            self._answer(200, body, **facts)
            return
        first, last = (int(end) if end else None for end in asked[6:].split("-"))
        part = body[first : None if last is None else last + 1] if first is not None else body[-(last or 0) :]
        start = first if first is not None else len(body) - len(part)
        self._answer(206, part, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(body)}", **facts)

    do_HEAD = do_GET  # noqa: N815 (the base class's names)

    def do_PUT(self) -> None:
        body = self._body()
        if self.server.fault is Fault.FULL:
            self._answer(507)
        elif not self._is_hurt():
            with self.server.folders:
                self._path().parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path(), body)
            self._answer(201)

    def do_DELETE(self) -> None:
        if not self._is_hurt():
            self._path().unlink(missing_ok=True)
            with self.server.folders, suppress(OSError):
                self._path().parent.rmdir()  # as in a bucket, where folders are names
                self._path().parent.parent.rmdir()
            self._answer(204)

    def do_PROPFIND(self) -> None:
        self._body()
        path = self._path()
        if self._is_hurt():
            return
        if not path.exists():
            self._answer(404)
            return
        deep = {"0": [], "1": path.iterdir()}.get(self.headers.get("Depth", ""), path.rglob("*"))
        entries = "".join(map(self._entry, [path, *deep]))
        body = f'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">{entries}</D:multistatus>'
        self._answer(207, body.encode(), Content_Type="application/xml")

    def _entry(self, path: Path) -> str:
        facts = path.stat()
        kind = "<D:collection/>" if path.is_dir() else ""
        name = "/" + quote(str(path.relative_to(self.server.root))).removeprefix(".") + ("/" if kind else "")
        return (
            f"<D:response><D:href>{escape(name.replace('//', '/'))}</D:href><D:propstat><D:prop>"
            f"<D:getlastmodified>{formatdate(facts.st_mtime, usegmt=True)}</D:getlastmodified>"
            f"<D:getcontentlength>{facts.st_size}</D:getcontentlength><D:resourcetype>{kind}</D:resourcetype>"
            f"</D:prop><D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
        )
