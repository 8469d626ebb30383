import io

from rich.console import Console

from dualpath.lab.report.store import fsck_lines, stat_table

SPACE = {
    "namespace": "ab" * 16,
    "description": {
        "model_fingerprint": "0123456789abcdef",
        "layout": {
            "kinds": [
                {"parts": [{"name": "k", "heads": 4, "dim": 64}], "window_tokens": None},
                {"parts": [{"name": "k", "heads": 8, "dim": 64}], "window_tokens": 128},
            ],
            "layer_kinds": [0, 1, 1],
            "dtype": "float32",
        },
    },
    "blocks": 1234,
    "physical_bytes": 1_300_000_000,
    "deepest_chain_blocks": 60,
    "newest_mtime_ns": None,
    "unreadable_files": 1,
    "quarantined_files": 2,
}
CLEAN = {
    "location": "kv",
    "namespaces": 1,
    "checked_blocks": 10,
    "sound_blocks": 10,
    "checked_bytes": 5_000_000,
    "bad_files": [],
    "orphans": [],
    "leftovers": [],
    "undescribed": [],
    "unavailable": [],
    "not_repaired": [],
    "repaired": False,
}


def test_a_namespace_is_a_row():
    console = Console(file=io.StringIO(), width=130)
    console.print(stat_table({"location": "kv", "namespaces": [SPACE, SPACE | {"description": None}]}))
    first, second = [line.split() for line in console.file.getvalue().splitlines() if "abababab" in line]
    assert first == [
        *("abababab", "0123456789ab", "1", "layer,", "k", "4×64;", "2", "layers,", "k", "8×64,", "window", "128,"),
        *("float32", "1,234", "1.3", "GB", "60", "–", "1", "2"),
    ]
    assert second[:3] == ["abababab", "?", "?"]


def test_a_sound_store_takes_one_line():
    assert list(fsck_lines(CLEAN | {"repaired": True})) == [
        "kv: 10 of 10 blocks are sound (5.0 MB checked in 1 namespaces)"
    ]


def test_findings_are_listed_up_to_a_bound_and_say_what_to_do():
    bad = [{"path": f"kv/{i}.kv", "cause": "checksum", "detail": "layer 3"} for i in range(22)]
    lines = list(fsck_lines(CLEAN | {"bad_files": bad, "orphans": ["kv/o.kv"]}))
    assert lines[1:3] == ["22 bad files", "  kv/0.kv: checksum: layer 3"]
    assert lines[22] == "  and 2 more; --json FILE lists them all"
    assert lines[24] == "  kv/o.kv"
    assert lines[-1].startswith("nothing was changed; --repair")
    unread = list(fsck_lines(CLEAN | {"unavailable": [{"path": "kv/1.kv", "cause": "unavailable", "detail": "EIO"}]}))
    assert unread[1:3] == ["1 blocks or folders that can't be read now, and are left alone", "  kv/1.kv: EIO"]
    repaired = list(fsck_lines(CLEAN | {"leftovers": ["kv/x"], "repaired": True}))
    assert repaired[-1] == "repaired: bad files are set aside, orphans and leftovers deleted"
    partly = list(fsck_lines(CLEAN | {"leftovers": ["kv/x"], "not_repaired": ["kv/x: read-only"], "repaired": True}))
    assert partly[-3:-1] == ["1 repairs that failed", "  kv/x: read-only"]
    assert partly[-1] == "repaired: the rest of the bad files are set aside, orphans and leftovers deleted"
