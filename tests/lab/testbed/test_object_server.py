"""nginx as an object server, on the loopback interface: no root needed."""

import socket
from pathlib import Path

import httpx
import pytest

from dualpath.lab.testbed import object_server
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.object_server import ObjectServer, free_port, missing_parts


@pytest.fixture
def installed() -> None:
    missing = missing_parts()
    if missing is not None:
        pytest.skip(missing)


def test_objects_come_and_go(installed: None, tmp_path: Path) -> None:
    with (
        ObjectServer(tmp_path / "objects", tmp_path / "work", port=free_port()) as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
    ):
        assert client.put("/a/b/object", content=b"0123456789").status_code == 201
        assert (tmp_path / "objects" / "a" / "b" / "object").read_bytes() == b"0123456789"
        ranged = client.get("/a/b/object", headers={"Range": "bytes=2-4"})
        assert (ranged.status_code, ranged.content) == (206, b"234")
        assert client.delete("/a/b/object").status_code == 204
        assert client.get("/a/b/object").status_code == 404
    with pytest.raises(httpx.ConnectError), httpx.Client(trust_env=False) as client:
        client.get(server.url)


def test_an_upload_that_breaks_off_leaves_no_object(installed: None, tmp_path: Path) -> None:
    with ObjectServer(tmp_path / "objects", tmp_path / "work", port=free_port()) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"PUT /half HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(50_000))
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            assert client.put("/whole", content=b"1").status_code == 201
        assert [path.name for path in (tmp_path / "objects").iterdir()] == ["whole"]


def test_a_port_that_is_taken_is_told(installed: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TestbedError, match=f"nginx did not start at http://127.0.0.1:{port}: .*in use"):
            ObjectServer(tmp_path / "objects", tmp_path / "work", port=port).__enter__()


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(object_server, "_nginx", lambda: "/usr/sbin/nginx")
    monkeypatch.setattr(object_server, "MODULE_DIRECTORIES", (str(tmp_path),))
    with pytest.raises(TestbedError, match=r"nginx has no ngx_http_dav_ext_module\.so: install nginx and its dav-ext"):
        ObjectServer(tmp_path, tmp_path).__enter__()
    monkeypatch.setattr(object_server, "_nginx", lambda: None)
    assert missing_parts().startswith("there is no nginx: install")
