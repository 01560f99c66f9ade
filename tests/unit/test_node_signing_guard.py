"""SIGN-01: of all callers of one history file, in one process or several, at most one digest a duty is permitted."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node_client.errors import SigningRefusedError, StorageError, StorageFullError
from node_client.signing_guard import DutyKind, SigningGuard

REQUEST = b"\x01" * 32
ATTEMPTS = 40


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


duties = st.tuples(
    st.sampled_from(list(DutyKind)),
    st.integers(0, 1).map(digest),
    st.integers(0, 1),
    st.integers(0, 2),
    st.integers(0, 2).map(digest),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(duties, max_size=25), st.lists(st.integers(0, 24), max_size=3))
def test_guard_in_any_history_with_restarts_permits_one_digest_a_duty(
    attempts: list[tuple[DutyKind, bytes, int, int, bytes]], restarts: list[int]
) -> None:
    model: dict[tuple[DutyKind, bytes, int, int], bytes] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "guard.sqlite"
        guard = SigningGuard(path)
        for number, (kind, request, stage, position, chosen) in enumerate(attempts):
            if number in restarts:
                guard.close()
                guard = SigningGuard(path)
            key = (kind, request, stage, position)
            if model.setdefault(key, chosen) == chosen:
                guard.permit(kind, request, stage, position, chosen)
            else:
                with pytest.raises(SigningRefusedError):
                    guard.permit(kind, request, stage, position, chosen)
        assert len(guard.export_history()["signed"]) == len(model)
        guard.close()


def _try_all(path: str, offset: int, results: multiprocessing.Queue[list[tuple[int, int]]]) -> None:
    guard = SigningGuard(Path(path))
    permitted = []
    for position in range(ATTEMPTS):
        try:
            guard.permit(DutyKind.COMMITMENT, REQUEST, 0, position, digest(offset))
            permitted.append((position, offset))
        except SigningRefusedError:
            continue
    guard.close()
    results.put(permitted)


def test_guard_in_two_processes_permits_each_duty_to_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "guard.sqlite"
    SigningGuard(path).close()
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[tuple[int, int]]] = context.Queue()
    processes = [context.Process(target=_try_all, args=(str(path), offset, results)) for offset in (1, 2)]
    for process in processes:
        process.start()
    permitted = [item for _ in processes for item in results.get(timeout=60)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted(position for position, _ in permitted) == list(range(ATTEMPTS))


def test_history_exported_and_imported_refuses_what_the_first_guard_refused(tmp_path: Path) -> None:
    first, second = SigningGuard(tmp_path / "first.sqlite"), SigningGuard(tmp_path / "second.sqlite")
    first.permit(DutyKind.HAND_OVER_SENT, REQUEST, 2, 8, digest(1))
    assert second.import_history(first.export_history()) == 1
    with pytest.raises(SigningRefusedError):
        second.permit(DutyKind.HAND_OVER_SENT, REQUEST, 2, 8, digest(2))
    assert second.has_signed(REQUEST, 2)
    assert not second.has_signed(REQUEST, 1)
    first.close()
    second.close()


def test_history_that_contradicts_is_imported_not_at_all(tmp_path: Path) -> None:
    first, second = SigningGuard(tmp_path / "first.sqlite"), SigningGuard(tmp_path / "second.sqlite")
    first.permit(DutyKind.COMMITMENT, REQUEST, 0, 0, digest(1))
    first.permit(DutyKind.COMMITMENT, REQUEST, 1, 0, digest(1))
    second.permit(DutyKind.COMMITMENT, REQUEST, 1, 0, digest(2))
    with pytest.raises(SigningRefusedError):
        second.import_history(first.export_history())
    assert not second.has_signed(REQUEST, 0)
    with pytest.raises(StorageError):
        second.import_history({"format": 1, "signed": [{"kind": "commitment"}]})
    first.close()
    second.close()


def test_guard_with_a_full_disk_permits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "guard.sqlite"
    guard = SigningGuard(path)
    pages = guard._database.execute("PRAGMA page_count").fetchone()[0]
    guard._database.execute(f"PRAGMA max_page_count = {pages}")
    refused = None
    for position in range(200):
        try:
            guard.permit(DutyKind.COMMITMENT, REQUEST, 0, position, digest(1))
        except StorageFullError:
            refused = position
            break
    assert refused is not None, "the file never filled"
    guard.close()
    with sqlite3.connect(path) as database:
        stored = database.execute("SELECT COUNT(*) FROM signed").fetchone()[0]
    database.close()
    assert stored == refused
