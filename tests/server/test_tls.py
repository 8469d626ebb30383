"""HTTPS, and clients that must show a certificate: uvicorn's options, by our connections and bounds."""

import datetime
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from fake_cluster import FakeGenerator, running_server, says

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.preflight_files import NotReadyError, check_tls, warn_of_open_key
from dualpath.server import tls_door

DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates, and writes each with its key into one PEM file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.pem = self._write("authority", self._key, self._certificate(self._name, self._key, is_authority=True))

    def issue(self, name: str) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return self._write(name, key, self._certificate(subject, key, is_authority=False))

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, is_authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - DAY).not_valid_after(now + DAY)
        made = made.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return made.sign(self._key, hashes.SHA256())

    def _write(self, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Path:
        pem = self._directory / f"{name}.pem"
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*form))
        return pem


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings(**tls: object) -> ClusterConfig:
    return ClusterConfig(model="m", store="s", **tls)  # type: ignore[arg-type]


def trusting(authority: Authority, shown: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.pem))
    if shown is not None:
        context.load_cert_chain(shown)
    return context


def test_a_certificate_makes_it_https(authority: Authority) -> None:
    config = settings(ssl_certfile=str(authority.issue("server")))
    with running_server(FakeGenerator(says("ab")), tls=config.tls) as url:
        url = url.replace("http://127.0.0.1", "https://localhost")
        assert httpx.get(f"{url}/livez", verify=trusting(authority)).status_code == 200
        body = {"prompt": "a", "max_tokens": 2, "stream": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, verify=trusting(authority))
        assert answer.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"{url}/livez")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url.replace("https", "http"))


def test_who_shakes_no_hands_has_to_go_and_others_are_served(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_door, "MAX_HANDSHAKES", 4)
    monkeypatch.setattr(tls_door, "HANDSHAKE_S", 60.0)
    config, trusted = settings(ssl_certfile=str(authority.issue("server"))), trusting(authority)
    with running_server(FakeGenerator(says("ab")), tls=config.tls) as url:
        port = int(url.rpartition(":")[2])
        url = f"https://localhost:{port}"
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
        assert httpx.get(f"{url}/livez", verify=trusted, timeout=30).status_code == 200  # not after the deadline
        for one in idle[:-4]:
            one.settimeout(30)
            assert one.recv(1) == b"", "it is still there"
        with ThreadPoolExecutor(16) as clients:  # more than there is room for, who come at once
            answers = list(
                clients.map(lambda _: httpx.get(f"{url}/livez", verify=trusted, timeout=30).status_code, range(48))
            )
        assert answers == [200] * 48
        for one in idle:
            one.close()


def test_a_handshake_has_a_deadline(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_door, "HANDSHAKE_S", 0.2)
    config = settings(ssl_certfile=str(authority.issue("server")))
    running = running_server(FakeGenerator(says("ab")), tls=config.tls)
    with running as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
        slow.sendall(b"\x16\x03\x01")
        slow.settimeout(10)
        assert slow.recv(1) == b""


def test_clients_must_show_a_certificate_of_the_authority(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    config = settings(ssl_certfile=str(authority.issue("server")), ssl_ca_certs=str(authority.pem), ssl_cert_reqs=2)
    with running_server(FakeGenerator(says("ab")), tls=config.tls) as url:
        url = f"{url.replace('http://127.0.0.1', 'https://localhost')}/livez"
        assert httpx.get(url, verify=trusting(authority, authority.issue("client"))).status_code == 200
        for shown in (None, stranger.issue("client")):
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                httpx.get(url, verify=trusting(authority, shown))


def test_what_can_not_be_is_told_before_engines_start(authority: Authority, tmp_path: Path) -> None:
    certificate = str(authority.issue("server"))
    check_tls(settings())
    check_tls(settings(ssl_certfile=certificate, ssl_ca_certs=str(authority.pem)))
    nothing, encrypted, fifo = (tmp_path / f"{name}.pem" for name in ("nothing", "encrypted", "fifo"))
    nothing.write_text("nothing")
    os.mkfifo(fifo)
    bare, key = tmp_path / "bare.pem", load_pem_private_key(Path(certificate).read_bytes(), None)
    bare.write_text(Path(certificate).read_text().partition("-----BEGIN PRIVATE")[0])
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    encrypted.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"sesame")))
    for wrong, complaint in (
        (
            {"ssl_certfile": str(tmp_path / "missing.pem")},
            "--ssl-certfile: .*missing.pem can't be used: no reg",
        ),
        ({"ssl_certfile": str(fifo)}, "--ssl-certfile: .*fifo.pem can't be used: no regular file"),
        (
            {"ssl_certfile": certificate, "ssl_keyfile": str(fifo)},
            "--ssl-keyfile: .*fifo.pem can't be used: no regular",
        ),
        ({"ssl_certfile": str(bare)}, "--ssl-certfile: .*bare.pem .*: it has no key; give the key with --ssl-keyfile"),
        ({"ssl_certfile": str(bare), "ssl_keyfile": str(nothing)}, "--ssl-keyfile: .*nothing.pem .*: it has no key"),
        ({"ssl_certfile": str(bare), "ssl_keyfile": str(encrypted)}, "--ssl-keyfile: the key in .* is encrypted; give"),
        ({"ssl_certfile": certificate, "ssl_keyfile": str(authority.pem)}, "can't be used .*KEY_VALUES_MISMATCH"),
        ({"ssl_certfile": certificate, "ssl_ca_certs": str(nothing)}, "--ssl-ca-certs: .*nothing.pem can't be used"),
    ):
        with pytest.raises(NotReadyError, match=complaint):
            check_tls(settings(**wrong))


def test_settings_that_contradict_each_other(authority: Authority) -> None:
    certificate = str(authority.issue("server"))
    for wrong, complaint in (
        ({"ssl_keyfile": certificate}, "^--ssl-keyfile, .* need --ssl-certfile"),
        ({"ssl_certfile": certificate, "ssl_cert_reqs": 2}, "^--ssl-cert-reqs needs --ssl-ca-certs"),
        ({"ssl_certfile": certificate, "ssl_cert_reqs": 3}, "^--ssl-cert-reqs is 3; it must be 0, 1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            settings(**wrong)


def test_a_key_that_every_user_can_read_is_warned_of(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pem = authority.issue("server")
    for mode, warnings in ((0o640, 0), (0o644, 1)):
        pem.chmod(mode)
        caplog.clear()
        warn_of_open_key(settings(ssl_certfile=str(pem)))
        assert len(caplog.messages) == warnings
    assert caplog.messages[0].endswith(f"access to the server's key in {pem}; chmod o-rwx {pem}")
    warn_of_open_key(settings())
