"""A real object server for a directory: nginx with WebDAV, which answers GET (with ranges), PUT, DELETE and PROPFIND.

nginx receives a PUT into a temporary file and renames it, so an object appears whole or not at all; it sends a GET with
sendfile. Objects lie in the directory like the files of a `PosixStore`.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dualpath.lab.testbed.failure import TestbedError

PORT = 9000
START_S = 10.0
STOP_S = 3.0
MODULE = "ngx_http_dav_ext_module.so"
MODULE_DIRECTORIES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
INSTALL = "install nginx and its dav-ext module (Debian: apt-get install nginx-light libnginx-mod-http-dav-ext)"
_CONFIGURATION = """\
load_module {module};
{user}worker_processes 1;
daemon off;
pid {work}/nginx.pid;
error_log {work}/error.log warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  tcp_nodelay on;
  keepalive_requests 1000000;
  client_max_body_size 0;
  client_body_temp_path {work}/uploads;
  proxy_temp_path {work}/unused; fastcgi_temp_path {work}/unused;
  uwsgi_temp_path {work}/unused; scgi_temp_path {work}/unused;
  server {{
    listen {address}:{port};
    root {root};
    location / {{
      dav_methods PUT DELETE;
      dav_ext_methods PROPFIND;
      create_full_put_path on;
      dav_access user:rw group:r all:r;
    }}
  }}
}}
"""


def missing_parts() -> str | None:
    """Says what an object server lacks on this host, and how to get it; None if it can run."""
    if _nginx() is None:
        return f"there is no nginx: {INSTALL}"
    if _module() is None:
        return f"nginx has no {MODULE}: {INSTALL}"
    return None


class ObjectServer:
    """Use as ``with ObjectServer(directory, work) as server``: entered once `server.url` answers.

    `work` holds configuration, logs and uploads under way. `prefix` is put before nginx's command line, to run it
    elsewhere (``ip netns exec NAME``). Raises TestbedError if it can't start.
    """

    def __init__(
        self,
        directory: Path,
        work: Path,
        *,
        address: str = "127.0.0.1",
        port: int = PORT,
        prefix: Sequence[str] = (),
    ) -> None:
        self.url = f"http://{address}:{port}"
        self.directory = directory
        self._work = work
        self._address = address
        self._port = port
        self._prefix = tuple(prefix)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ObjectServer":
        missing = missing_parts()
        if missing is not None:
            raise TestbedError(missing)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._work.mkdir(parents=True, exist_ok=True)
        configuration = self._work / "nginx.conf"
        configuration.write_text(self._configuration())
        command = [*self._prefix, str(_nginx()), "-p", str(self._work.resolve()), "-c", str(configuration.resolve())]
        with (self._work / "output.log").open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            self._wait_until_it_listens()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _configuration(self) -> str:
        return _CONFIGURATION.format(
            module=_module(),
            user="user root;\n" if os.geteuid() == 0 else "",
            work=self._work.resolve(),
            root=self.directory.resolve(),
            address=self._address,
            port=self._port,
        )

    def _wait_until_it_listens(self) -> None:
        """Waits for nginx's pid file, which it writes once it listens, whatever network it is in."""
        assert self._process is not None
        pid_file = self._work / "nginx.pid"
        deadline = time.monotonic() + START_S
        while not (pid_file.exists() and pid_file.read_text().strip()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TestbedError(f"nginx did not start at {self.url}: {self._log() or 'it says nothing'}")
            time.sleep(0.02)

    def _log(self) -> str:
        texts = [path.read_text() for name in ("error.log", "output.log") if (path := self._work / name).exists()]
        return " ".join(" ".join(texts).split())[-600:]

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (self._work / "nginx.pid").unlink(missing_ok=True)


def free_port() -> int:
    """Returns a TCP port of the loopback interface on which nobody listened a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _module() -> Path | None:
    found = (Path(directory) / MODULE for directory in MODULE_DIRECTORIES)
    return next((path for path in found if path.exists()), None)
