"""The cluster's secret: what its processes know and nobody else does. All keys of both planes follow from it.

An operator gives it in a file or in the environment. Without one, a coordinator makes one at start for processes of its
own user on its own host (`cluster_secret`), and may then listen at nothing but loopback (`cluster.preflight`).
"""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from dualpath.spec.log import ROOT
from dualpath.spec.private_files import read_secret, runtime_directory
from dualpath.transfer.pool_files import create_locked, sweep_dead_files

logger = logging.getLogger(f"{ROOT}.cluster")

SECRET_VARIABLE = "DUALPATH_CLUSTER_SECRET"
MIN_CHARACTERS = 32
"""Whoever listens on the network can try guesses against what he has seen, so a secret must be beyond guessing."""
HOW_TO_GIVE = f"give one with --cluster-secret-file or ${SECRET_VARIABLE} (openssl rand -hex 32 makes one)"


class ClusterSecret:
    """A secret that no text shows: not `repr`, not a log line, not an encoded message (it is no msgspec type)."""

    __slots__ = ("_key",)

    def __init__(self, text: str) -> None:
        """Raises ValueError for one that could be guessed; the message does not have it."""
        text = text.strip()
        if len(text) < MIN_CHARACTERS:
            raise ValueError(
                f"the cluster's secret has {len(text)} characters; it must have {MIN_CHARACTERS} or more, such as of "
                "openssl rand -hex 32"
            )
        self._key = blake2b(text.encode(), digest_size=32, person=b"dualpath secret").digest()

    @classmethod
    def random(cls) -> "ClusterSecret":
        return cls(secrets.token_hex(32))

    @classmethod
    def of_file(cls, path: Path) -> "ClusterSecret":
        """Raises ValueError that names the file when it can't be read, others may read it, or it has no good secret."""
        text = read_secret(path)
        try:
            return cls(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def key(self, purpose: str) -> bytes:
        """Returns 32 bytes for one purpose, from which nothing about the secret or another purpose's key follows."""
        return blake2b(purpose.encode(), digest_size=32, key=self._key, person=b"dualpath key").digest()

    @property
    def data_key(self) -> bytes:
        """The key of a data server and its peers (`transfer.transport`)."""
        return self.key("data")

    def __repr__(self) -> str:
        return "ClusterSecret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterSecret) and secrets.compare_digest(self._key, other._key)

    def __hash__(self) -> int:
        return hash(self._key)


def secret_of_environment() -> ClusterSecret | None:
    """Raises ValueError for a secret that could be guessed."""
    text = os.environ.get(SECRET_VARIABLE)
    try:
        return None if text is None else ClusterSecret(text)
    except ValueError as error:
        raise ValueError(f"${SECRET_VARIABLE}: {error}") from None


class MadeSecret:
    """A secret for processes of this user on this host, in a file of this user's alone until `close`.

    The file is locked as long as its maker lives, so that a killed maker's is found and removed.
    """

    def __init__(self) -> None:
        """Raises OSError when there is no place for it."""
        directory = runtime_directory()
        sweep_dead_files(directory, "*.secret")
        text = secrets.token_hex(32)
        self.secret = ClusterSecret(text)
        self.path = directory / f"cluster-{os.getpid()}-{secrets.token_hex(4)}.secret"
        self._descriptor = create_locked(self.path)
        os.write(self._descriptor, f"{text}\n".encode())

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def cluster_secret(given: ClusterSecret | None, tell: Callable[[Path], None] | None = None) -> Iterator[ClusterSecret]:
    """Yields the secret that was given, or one made for this host, whose file `tell` gets. Raises OSError."""
    if given is not None:
        yield given
        return
    made = MadeSecret()
    try:
        if tell is not None:
            tell(made.path)
        yield made.secret
    finally:
        made.close()


def tell_engines(path: Path) -> None:
    """Log how engines may join that this process does not start."""
    logger.info("engines of this user on this host may join with --cluster-secret-file %s", path)
