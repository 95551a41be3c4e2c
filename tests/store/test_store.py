"""What a store keeps and gives back."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import msgspec
import pytest

from bdprune.errors import StoreError
from bdprune.record import Attachment, Evidence, Result
from bdprune.store import EvidenceKey, Store

from .conftest import LIPSCHITZ, failed, key, result

EVIDENCE = EvidenceKey("2" * 64, "", {"id": "bdprune.lipschitz", "params": {}}, {"budget": "default"}, "1")


def test_results_come_back_as_they_were(store: Store) -> None:
    both = [result(), result(risk=None, findings=())]
    store.save(key(), "a.pth", both)
    assert store.find(key(), "a.pth") == tuple(both)
    (kept,) = store.scans()
    assert (kept.name, kept.model, kept.settings["seed"], kept.results) == ("a.pth", "1" * 64, 0, tuple(both))


def test_any_other_key_finds_nothing(store: Store) -> None:
    store.save(key(), "a.pth", [result()])
    one = key()
    others = [
        key("9" * 64),
        key(seed=1),
        type(one)(one.model, "data", one.settings, one.version),
        type(one)(one.model, one.data, one.settings, "2"),
    ]
    assert [store.find(other, "a.pth") for other in others] == [()] * 4


def test_the_same_bytes_under_two_names_are_kept_once(store: Store) -> None:
    store.save(key(), "a.pth", [result("a.pth")])
    (found,) = store.find(key(), "b.pth")
    assert found.artifact and found.artifact.path == "b.pth"
    assert [(kept.name, kept.results[0].name) for kept in store.scans()] == [("a.pth", "a.pth"), ("b.pth", "b.pth")]
    with store.database.reading() as connection:
        assert connection.execute("SELECT count(*) FROM results").fetchone() == (1,)


def test_a_failed_scan_is_kept_but_not_taken_and_then_replaced(store: Store) -> None:
    store.save(key(), "a.pth", [failed()])
    store.save(key(), "b.pth", [failed("b.pth")])
    assert store.find(key(), "a.pth") == () and store.names() == ["a.pth", "b.pth"]
    store.save(key(), "a.pth", [result()])
    assert store.find(key(), "a.pth") == (result(),)
    assert [kept.results[0].verdict for kept in store.scans()] == ["inconclusive"] * 2
    store.save(key(), "a.pth", [failed()])
    assert store.find(key(), "a.pth") == (result(),)


def test_the_latest_scan_of_a_name_counts_and_the_others_stay(store: Store) -> None:
    store.save(key(seed=1), "a.pth", [result(risk=0.1)])
    store.save(key(seed=2), "a.pth", [result(risk=0.2)])
    assert [kept.results[0].risk for kept in store.scans()] == [0.2]
    assert [kept.results[0].risk for kept in store.scans("a.pth")] == [0.2, 0.1]
    store.find(key(seed=1), "a.pth")
    assert [kept.results[0].risk for kept in store.scans()] == [0.1]


def test_evidence_comes_back_by_its_whole_key(store: Store) -> None:
    store.save(key(), "a.pth", [result()], evidence=[(EVIDENCE, LIPSCHITZ)])
    assert store.find_evidence(EVIDENCE) == LIPSCHITZ
    other = EvidenceKey("2" * 64, "", {"id": "bdprune.lipschitz", "params": {"threshold": 5}}, EVIDENCE.settings, "1")
    assert store.find_evidence(other) is None


def test_attachments_are_files_named_by_their_digest(store: Store) -> None:
    content = b"a tensor"
    digest = hashlib.sha256(content).hexdigest()
    one = Attachment(name="masks", media_type="application/safetensors", sha256=digest, bytes=len(content))
    seen = msgspec.structs.replace(LIPSCHITZ, attachments=(one,))
    store.save(key(), "a.pth", [result(detectors=(seen,))], contents={digest: content})
    assert store.contents([seen]) == {digest: content}
    (store.attachments / digest).write_bytes(b"a TENSOR")
    assert store.contents([seen]) is None
    (store.attachments / digest).unlink()
    assert store.contents([seen]) is None


def attached(content: bytes) -> tuple[str, Evidence]:
    digest = hashlib.sha256(content).hexdigest()
    one = Attachment(name="masks", media_type="application/safetensors", sha256=digest, bytes=len(content))
    return digest, msgspec.structs.replace(LIPSCHITZ, attachments=(one,))


def test_a_damaged_attachment_of_the_same_size_is_written_again(store: Store) -> None:
    digest, seen = attached(b"a tensor")
    store.save(key(), "a.pth", [result(detectors=(seen,))], contents={digest: b"a tensor"})
    (store.attachments / digest).write_bytes(b"a TENSOR")
    store.save(key(seed=1), "a.pth", [result(detectors=(seen,))], contents={digest: b"a tensor"})
    assert store.contents([seen]) == {digest: b"a tensor"}


def test_a_save_that_fails_leaves_no_attachment_after_the_next(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (lost, one), (kept, other) = attached(b"lost"), attached(b"kept")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("bdprune.store.store._name", lambda *args: (_ for _ in ()).throw(RuntimeError()))
        store.save(key(), "a.pth", [result(detectors=(one,))], contents={lost: b"lost"})
    assert store.names() == []
    store.save(key(), "a.pth", [result(detectors=(other,))], contents={kept: b"kept"})
    assert [path.name for path in store.attachments.iterdir()] == [kept]


def test_the_next_process_removes_what_a_killed_one_left(store: Store) -> None:
    (named, one), (orphan, _) = attached(b"named"), attached(b"orphan")
    store.save(key(), "a.pth", [result(detectors=(one,))], contents={named: b"named"})
    (store.attachments / orphan).write_bytes(b"orphan")
    (store.attachments / "pending-1").write_text(f"{orphan}\n{named}\n../../scans.db\n")
    (store.attachments / ".bdprune-1").write_bytes(b"half of")
    Store(store.path).close()
    assert [path.name for path in store.attachments.iterdir()] == [named] and store.path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE results SET document = replace(document, '0.25', '0.75')",
        "UPDATE results SET place = 1 - place",
        "UPDATE scans SET failed = 0, settings = replace(settings, ':0', ':1')",
        "UPDATE scans SET model = 'x'",
        "DELETE FROM results WHERE place = 0",
    ],
)
def test_rows_that_changed_are_damage(store: Store, damage: str) -> None:
    store.save(key(), "a.pth", [result(), result(risk=0.5)])
    with store.database.transaction() as connection:
        for statement in _places_apart(damage):
            connection.execute(statement)
    for use in (lambda: store.find(key(), "a.pth"), lambda: list(store.scans()), lambda: list(store.scans("a.pth"))):
        with pytest.raises(StoreError, match="damaged"):
            use()


def _places_apart(damage: str) -> list[str]:
    """A swap of two places in steps, because each place is unique."""
    if "1 - place" not in damage:
        return [damage]
    return ["UPDATE results SET place = place + 5", "UPDATE results SET place = 6 - place"]


def test_names_and_evidence_that_changed_are_damage(store: Store) -> None:
    store.save(key(), "a.pth", [result()], evidence=[(EVIDENCE, LIPSCHITZ)])
    with store.database.transaction() as connection:
        connection.execute("UPDATE sources SET name = 'b.pth'")
        connection.execute("UPDATE evidence SET document = replace(document, '1.5', '9.5')")
    with pytest.raises(StoreError, match="damaged"):
        list(store.scans())
    with pytest.raises(StoreError, match="damaged"):
        store.find_evidence(EVIDENCE)


def test_names_that_are_not_utf8(store: Store) -> None:
    name = b"caf\xe9.pth".decode(errors="surrogateescape")
    store.save(key(), name, [result(name)])
    other = b"caf\xe8.pth".decode(errors="surrogateescape")
    store.save(key("2" * 64), other, [result(other)])
    assert store.find(key(), name) and store.names() == [r"caf\xe8.pth", r"caf\xe9.pth"]


def test_a_store_can_be_sent_to_another_process(store: Store) -> None:
    store.save(key(), "a.pth", [result()])
    with pickle.loads(pickle.dumps(store)) as other:
        assert other.names() == ["a.pth"]


@pytest.mark.parametrize("settings", ["{", "[]", "null", "x'ff'"])
def test_settings_that_cannot_be_read_are_one_error(store: Store, settings: str) -> None:
    store.save(key(), "a.pth", [result()])
    with store.database.transaction() as connection:
        connection.execute(f"UPDATE scans SET settings = {settings if settings[0] == 'x' else repr(settings)}")
    with pytest.raises(StoreError, match="is damaged"):
        list(store.scans())


@pytest.mark.parametrize(("table", "column"), [("results", "document"), ("scans", "model"), ("sources", "name")])
def test_text_that_is_not_utf_8_is_damage(store: Store, table: str, column: str) -> None:
    store.save(key(), "a.pth", [result()])
    with store.database.transaction() as connection:
        connection.execute(f"UPDATE {table} SET {column} = CAST(x'61ff62' AS TEXT)")
    with pytest.raises(StoreError, match="is damaged"):
        list(store.scans())


def test_a_result_of_another_version_is_not_taken_and_named_when_shown(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Result, "to_json", lambda self, indent=None: '{"kind": "scan"}')
        store.save(key(), "a.pth", [result()])
    assert store.find(key(), "a.pth") == ()
    with pytest.raises(StoreError, match="cannot be read"):
        list(store.scans())


def test_an_empty_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="empty"):
        Store("")
