"""What only stores of objects can get wrong: servers that go away or keep something else, URLs, the way back."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from obstore.store import HTTPStore, LocalStore, MemoryStore

from dualpath.kv import (
    BlockError,
    BlockFault,
    BlockKey,
    KVLayout,
    Namespace,
    PrefixIndex,
    StoreError,
    StoreLocationError,
    StoreWriteError,
    block_keys,
    namespace,
    open_store,
    rebuild,
)
from dualpath.kv.stores.arriving import WORTH_A_REQUEST_BYTES, worthwhile
from dualpath.kv.stores.block_file import PAGE_BYTES
from dualpath.kv.stores.bucket import COOL_S, Body, Bucket, ObjectRecord
from dualpath.kv.stores.conformance import LAYOUT
from dualpath.kv.stores.inspection import fsck
from dualpath.kv.stores.objects import ObjectStore
from dualpath.lab.testbed.object_server import ObjectServer, free_port, missing_parts

PayloadOf = Callable[[BlockKey], np.ndarray]


@pytest.fixture
def bucket() -> Bucket:
    return Bucket(MemoryStore(), "memory://")


@pytest.fixture
def store(bucket: Bucket) -> ObjectStore:
    return ObjectStore(bucket)


@pytest.fixture
def nginx() -> None:
    missing = missing_parts()
    if missing is not None:
        pytest.skip(missing)


@pytest.fixture
def server(nginx: None, tmp_path: Path) -> Iterator[ObjectServer]:
    with ObjectServer(tmp_path / "objects", tmp_path / "nginx", port=free_port()) as running:
        yield running


def name_of(space: Namespace, key: BlockKey) -> str:
    return f"{space.hex}/{key.hex()[:2]}/{key.hex()}.kv"


class Forgetful(Bucket):
    """Keeps something else than what it was given."""

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        raw = bytearray(b"".join(parts))
        if name.endswith(".kv"):
            raw[self.wrong_byte] ^= 1
        super().put(name, [bytes(raw)])

    wrong_byte = PAGE_BYTES + 300


@pytest.mark.parametrize(
    ("wrong_byte", "cause"),
    [(PAGE_BYTES + 300, BlockFault.CHECKSUM), (90, BlockFault.HEADER), (-1, BlockFault.CHECKSUM)],
)
def test_a_server_that_keeps_something_else_is_found_out(
    layout: KVLayout, space: Namespace, payload_of: PayloadOf, wrong_byte: int, cause: BlockFault
) -> None:
    bucket = Forgetful(MemoryStore(), "memory://")
    bucket.wrong_byte = wrong_byte
    store = ObjectStore(bucket)
    (key,) = block_keys(space.root, range(16), 16)
    with pytest.raises(StoreWriteError, match=key.hex()) as caught:
        store.write(space, key, space.root, payload_of(key))
    assert isinstance(caught.value.__cause__, BlockError) and caught.value.__cause__.cause is cause
    assert bucket.record(name_of(space, key)) is None, "what is not known to be sound is not left behind"
    trusting = ObjectStore(bucket, verify_writes=False)
    trusting.write(space, key, space.root, payload_of(key))
    with pytest.raises(BlockError, match=cause.value):
        trusting.read(space, key, bytearray(768))


class Chatty(Bucket):
    """Says one length and sends another."""

    def get(self, name: str, ends: tuple[int, int] | None = None) -> Body | None:
        body = super().get(name, ends)
        assert body is not None
        pieces = [bytes(piece) for piece in body.pieces]
        changed = [b"".join(pieces) + b"more"] if self.more else [b"".join(pieces)[:-5]]
        return Body(body.n_bytes, (memoryview(piece) for piece in changed))

    more = True


@pytest.mark.parametrize(
    ("more", "message"), [(True, "header: the server sent more"), (False, "truncated: .* 763 payload")]
)
def test_an_answer_of_another_length_than_announced(
    layout: KVLayout, space: Namespace, payload_of: PayloadOf, more: bool, message: str
) -> None:
    objects = MemoryStore()
    (key,) = block_keys(space.root, range(16), 16)
    ObjectStore(Bucket(objects, "memory://")).write(space, key, space.root, payload_of(key))
    bucket = Chatty(objects, "memory://")
    bucket.more = more
    with pytest.raises(BlockError, match=message):
        ObjectStore(bucket).read(space, key, bytearray(768))


def test_a_server_that_goes_away_is_no_fault_of_the_blocks(
    nginx: None, tmp_path: Path, layout: KVLayout, space: Namespace, payload_of: PayloadOf
) -> None:
    with ObjectServer(tmp_path / "objects", tmp_path / "nginx", port=free_port()) as server:
        store = open_store(server.url)
        first, second = block_keys(space.root, range(32), 16)
        store.write(space, first, space.root, payload_of(first))
    for refused in (
        lambda: store.read(space, first, bytearray(768)),
        lambda: list(store.scan()),
        lambda: store.delete(space.root, first),
        lambda: store.quarantine(space.root, first),
        lambda: store.write(space, second, first, payload_of(second)),
    ):
        with pytest.raises(StoreError, match=r"http://127.0.0.1:\d+") as caught:
            refused()
        assert "\n" not in str(caught.value), "one line, not pages of debugging"


def test_who_asks_just_after_a_failure_is_told_at_once(
    nginx: None, tmp_path: Path, layout: KVLayout, space: Namespace, payload_of: PayloadOf
) -> None:
    now = 0.0
    port = free_port()
    url, plain = f"http://127.0.0.1:{port}/", {"allow_http": True}
    objects = HTTPStore.from_url(url, client_options=plain, retry_config={"max_retries": 0})
    bucket = Bucket(objects, "the bucket", clock=lambda: now)
    with pytest.raises(StoreError, match=r"can't be read: .*error"):
        bucket.head_bytes("any", 1)
    with ObjectServer(tmp_path / "objects", tmp_path / "nginx", port=port):
        now = COOL_S / 2
        with pytest.raises(StoreError, match="the bucket: any can't be read: the server did not answer a moment ago"):
            bucket.head_bytes("any", 1)
        now = COOL_S
        (key,) = block_keys(space.root, range(16), 16)
        store = ObjectStore(bucket)
        store.write(space, key, space.root, payload_of(key))
        store.read(space, key, bytearray(768))
        with pytest.raises(BlockError, match="missing"):
            store.read(space, b"0" * 16, bytearray(768))
        store.read(space, key, bytearray(768))


def test_a_restart_finds_every_namespace_and_block_again(
    server: ObjectServer, layout: KVLayout, space: Namespace, payload_of: PayloadOf
) -> None:
    other = namespace("tiny-model", "1", layout, tenant_salt="somebody")
    before = open_store(f"{server.url}/kv/blocks")
    keys = {}
    for owner in (space, other):
        keys[owner.hex] = block_keys(owner.root, range(16 * 40), 16)
        for key, parent in zip(keys[owner.hex], [owner.root, *keys[owner.hex]], strict=False):
            before.write(owner, key, parent, payload_of(key))
    after = open_store(f"{server.url}/kv/blocks/")
    index = PrefixIndex()
    report = rebuild(index, after, clean=True)
    assert (report.published_blocks, report.orphans, report.bad) == (80, (), ())
    assert [index.match(keys[owner.hex]) for owner in (space, other)] == [40, 40]
    for where in (after, open_store(server.directory / "kv" / "blocks")):
        found = fsck(where)
        assert found.is_clean and found.sound_blocks == 80, "and the files behind the server are a store themselves"


def test_rebuilding_cleans_what_is_bad_or_out_of_reach(
    store: ObjectStore, bucket: Bucket, payload_of: PayloadOf, space: Namespace
) -> None:
    keys = block_keys(space.root, range(16 * 5), 16)
    for key, parent in zip(keys, [space.root, *keys], strict=False):
        store.write(space, key, parent, payload_of(key))
    bucket.put(name_of(space, keys[2]), [b"no block"])
    report = rebuild(PrefixIndex(), store, clean=True)
    assert report.published_blocks == 2 and report.orphans == (keys[3], keys[4])
    assert [(file.key, file.cause) for file in report.bad] == [(keys[2], BlockFault.TRUNCATED)]
    assert sorted(record.key for record in store.scan()) == sorted(keys[:2])
    assert bucket.record(f"{space.hex}/bad/{keys[2].hex()}.truncated") is not None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/kv", "unknown kind of store 'ftp'; choose from file, s3, gs, az, http, https"),
        ("s3://bucket/kv?secret_access_key=x", "secret_access_key in a URL shows in process lists"),
        ("s3://bucket/kv?colour=blue", "cannot be opened"),
        ("s3://", "cannot be opened"),
    ],
)
def test_urls_that_make_no_store(url: str, message: str) -> None:
    with pytest.raises(StoreLocationError, match=message):
        open_store(url)


def test_parts_of_a_block_that_lie_near_are_one_request() -> None:
    near, far = WORTH_A_REQUEST_BYTES - 1, WORTH_A_REQUEST_BYTES
    assert worthwhile([(0, 10), (10 + near, 200_000), (200_000 + far, 300_000)]) == [
        (0, 200_000),
        (200_000 + far, 300_000),
    ]
    assert worthwhile([]) == []


def test_blocks_in_s3(
    layout: KVLayout, space: Namespace, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against moto's S3 where it is installed: a prefix, an endpoint of one's own, everything a store does."""
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]' to test against an S3 server")
    boto3 = pytest.importorskip("boto3")
    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y"), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="blocks")
        store = open_store(f"s3://blocks/some/prefix?endpoint={endpoint}")
        keys = block_keys(space.root, range(16 * 3), 16)
        for key, parent in zip(keys, [space.root, *keys], strict=False):
            assert store.write(space, key, parent, payload_of(key)) == PAGE_BYTES + 768
        into = bytearray(768)
        store.read(space, keys[1], into)
        assert into == payload_of(keys[1]).tobytes()
        assert store.delete(space.root, keys[2]) and not store.delete(space.root, keys[2])
        assert list(store.descriptions()) == [space.root]
        assert sorted(record.key for record in store.scan()) == sorted(keys[:2])
    finally:
        server.stop()


@pytest.mark.parametrize("removed", ["shards", "all"])
def test_objects_removed_under_a_live_store(
    tmp_path: Path, space: Namespace, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    """They are misses, and can be written again; so is the description, after a while."""
    store = ObjectStore(Bucket(LocalStore(tmp_path), "bucket"))
    keys = block_keys(space.root, range(16 * 40), 16)

    def write_all() -> None:
        for key, parent in zip(keys, [space.root, *keys], strict=False):
            store.write(space, key, parent, payload_of(key))

    write_all()
    assert [record.key for record in store.find(space.root, keys)] == keys
    for path in tmp_path.glob("*/??" if removed == "shards" else "*"):
        shutil.rmtree(path)
    assert store.find(space.root, keys) == [] and not store.delete(space.root, keys[0])
    assert store.quarantine(space.root, keys[0]) is None
    with pytest.raises(BlockError, match="missing"):
        store.read(space, keys[0], bytearray(768))
    monkeypatch.setattr("dualpath.kv.stores.object_namespaces.DESCRIBE_S", 0.0)
    write_all()
    assert [record.key for record in store.find(space.root, keys)] == keys
    assert fsck(store).is_clean


def test_a_look_for_a_block_that_is_not_there_is_one_request(space: Namespace) -> None:
    class Counting(Bucket):
        asked = 0

        def record(self, name: str) -> ObjectRecord | None:
            self.asked += 1
            return super().record(name)

    bucket = Counting(MemoryStore(), "memory://")
    assert ObjectStore(bucket).find(space.root, block_keys(space.root, range(16 * 100), 16)) == []
    assert bucket.asked == 1


def test_without_obstore_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dualpath.kv.stores.find_spec", lambda name: None)
    with pytest.raises(StoreLocationError, match=r"pip install 'dualpath\[s3\]'"):
        open_store("s3://bucket/prefix")
    open_store(tmp_path)
    open_store(f"file://{tmp_path}/made").prepare(namespace("model", "1", LAYOUT))
    assert list(tmp_path.iterdir())


def test_importing_the_stores_starts_no_object_library() -> None:
    """The supervisor's fork server imports the runtime; obstore has threads, which do not survive a fork."""
    code = "import sys, dualpath.kv, dualpath.cluster.agent.block_io; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
