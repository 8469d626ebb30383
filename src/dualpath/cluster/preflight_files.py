"""What must hold of the files that options name, of the room for buffers, and of devices. Part of `preflight`."""

import ctypes
import logging
import os
import ssl
import stat
from pathlib import Path
from typing import NoReturn

from dualpath.cluster.config import ClusterConfig
from dualpath.spec.log import ROOT
from dualpath.transfer.pool_files import POOL_DIRECTORY

logger = logging.getLogger(f"{ROOT}.server")


class NotReadyError(ValueError):
    """The cluster can't start as it is configured; the message names the option and says what to do."""


class _EncryptedError(Exception):
    """A passphrase was asked for."""


def check_tls(config: ClusterConfig) -> None:
    """Check certificates and the key. Raises NotReadyError; nobody is asked for a passphrase."""
    certificate, key, authorities = config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs
    if certificate is None:
        return
    for option, file in (("--ssl-certfile", certificate), ("--ssl-keyfile", key), ("--ssl-ca-certs", authorities)):
        if file is not None and not Path(file).is_file():
            raise NotReadyError(f"{option}: {file} can't be used: no regular file is there; give PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        _load_pair(context, certificate, key)
        if authorities is not None:
            context.load_verify_locations(authorities)
    except OSError as error:
        raise NotReadyError(f"--ssl-ca-certs: {authorities} can't be used ({error}); give PEM") from error


def _load_pair(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    """Raises NotReadyError."""
    option, holder = ("--ssl-certfile", certificate) if key is None else ("--ssl-keyfile", key)

    def refuse() -> NoReturn:
        raise _EncryptedError

    try:
        if b"PRIVATE KEY-----" not in Path(holder).read_bytes():
            why = "it has no key; give the key with --ssl-keyfile" if key is None else "it has no key; give PEM"
            raise NotReadyError(f"{option}: {holder} can't be used: {why}")
        context.load_cert_chain(certificate, key, password=refuse)
    except _EncryptedError:
        raise NotReadyError(
            f"{option}: the key in {holder} is encrypted; give one without a passphrase, which this user alone can read"
        ) from None
    except OSError as error:
        files = " and ".join(filter(None, (certificate, key)))
        raise NotReadyError(
            f"--ssl-certfile: {files} can't be used ({error}); give a certificate and its key"
        ) from error


def warn_of_open_key(config: ClusterConfig) -> None:
    """Warn of a key that every user of this host may read.

    It is no error, as it is for our own secrets: others put such keys in place, Kubernetes with mode 0644 where nobody
    else can reach them, and other servers take them.
    """
    holder = config.ssl_keyfile or config.ssl_certfile
    if holder is not None and Path(holder).stat().st_mode & stat.S_IRWXO:
        logger.warning("every user of this host has access to the server's key in %s; chmod o-rwx %s", holder, holder)


def check_outputs(config: ClusterConfig) -> None:
    """Check that the files which are written later can be. Raises NotReadyError."""
    if config.journal is not None:
        _check_writable("--journal", Path(config.journal))
    if config.ready_file is not None:
        path = Path(config.ready_file)
        _check_writable("--ready-file", path)
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):  # it would be replaced, /dev/null too
            raise NotReadyError(f"--ready-file: {path} is there and is no regular file; give another place")


def _check_writable(option: str, path: Path) -> None:
    folder = path.parent
    why = ""
    if path.is_dir():
        why = "it is a folder; give a file in it"
    elif not folder.is_dir():
        why = f"there is no folder {folder}; make it, or give another place"
    elif path.exists() and not os.access(path, os.W_OK):
        why = "others have written it, or its disk is read-only; give another place"
    elif (path.is_file() or not path.exists()) and not os.access(folder, os.W_OK | os.X_OK):
        why = f"this user may not write in {folder}; give another place"
    if why:
        raise NotReadyError(f"{option}: {path} can't be written: {why}")


def check_buffers(config: ClusterConfig, engines: int) -> None:
    """Check that this host could have the buffers of so many engines at all. Raises NotReadyError.

    What is free is known only when engines take it: killed ones may have left buffers that are removed before.
    """
    room = os.statvfs(POOL_DIRECTORY)
    whole_bytes, wanted_bytes = room.f_blocks * room.f_frsize, engines * config.buffer_bytes
    if wanted_bytes > whole_bytes:
        raise NotReadyError(
            f"--buffer: {engines} engines of {config.buffer_bytes} bytes each need more than the {whole_bytes} bytes "
            f"of {POOL_DIRECTORY}; make the buffer smaller or the file system larger (docker: --shm-size)"
        )


def cuda_devices() -> int:
    """Returns how many GPUs the driver shows to this process."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
