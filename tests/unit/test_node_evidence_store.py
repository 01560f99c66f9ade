"""The evidence store: sealed results survive, unsealed ones do not, and a full disk is an error of one session."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsns.protocol.commitments import EvidenceBuilder
from bsns.protocol.hand_over import Contradiction, Statement
from bsns.protocol.sampling import SamplingParameters
from node_client.errors import StorageError, StorageFullError
from node_client.evidence_store import EvidenceStore, InputOpening, StageResult

REQUEST = b"\x07" * 32
OPENING = InputOpening(b"\x01" * 32, 3, SamplingParameters(0.7, 5, 0.9, 2**64 - 1, 9), b"\x02" * 32)
RESULT = StageResult(b"\x03" * 32, b"\x04" * 32, b"\x05" * 32, 2)
BUDGET = 1_000_000


def filled(path: Path, budget: int = BUDGET) -> EvidenceStore:
    store = EvidenceStore(path, budget)
    store.open_stage(REQUEST, 1, OPENING, 100)
    builder = EvidenceBuilder()
    for number, rows in enumerate((3, 1)):
        step = builder.add(rows, bytes([number]) * 32, bytes([9]) * 32, b"f" * 8)
        store.add_step(REQUEST, 1, step, 2, b"x" * rows * 4)
    return store


def test_sealed_stage_after_reopening_is_complete(tmp_path: Path) -> None:
    store = filled(tmp_path / "e.sqlite")
    store.save_statement(REQUEST, 1, Statement(0, True, 8, b"c" * 32, b"s" * 65))
    store.save_statement(REQUEST, 1, Statement(0, True, 0, b"d" * 32, b"s" * 65))
    store.seal(REQUEST, 1, RESULT)
    store.close()
    store = EvidenceStore(tmp_path / "e.sqlite", BUDGET)
    (recorded,) = store.sealed_stages()
    assert (recorded.opening, recorded.result) == (OPENING, RESULT)
    assert [step.rows for step in store.steps(REQUEST, 1).steps] == [3, 1]
    assert store.step_input(REQUEST, 1, 0) == (2, b"x" * 12)
    assert [item.step for item in store.statements(REQUEST, 1)] == [8], "an older statement does not replace a newer"
    store.close()


def test_outputs_that_are_kept_survive_and_count_against_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "e.sqlite"
    store = filled(path)
    used = store.bytes_used
    step = store.steps(REQUEST, 1).steps[1]
    with pytest.raises(StorageFullError):
        store.add_step(REQUEST, 1, step, 2, b"", b"x" * BUDGET)
    store.add_step(REQUEST, 1, step, 2, b"x" * 4, b"tokens")
    store.seal(REQUEST, 1, RESULT)
    store.close()
    store = EvidenceStore(path, BUDGET)
    assert (store.step_output(REQUEST, 1, 0), store.step_output(REQUEST, 1, 1)) == (None, b"tokens")
    assert store.bytes_used == used + len(b"tokens")
    store.forget(REQUEST)
    assert store.step_output(REQUEST, 1, 1) is None
    assert store.bytes_used == 0
    store.close()


def test_unsealed_stage_after_reopening_is_gone(tmp_path: Path) -> None:
    store = filled(tmp_path / "e.sqlite")
    store.add_step(REQUEST, 1, store.steps(REQUEST, 1).steps[1], 2, b"", b"tokens")
    store.close()
    store = EvidenceStore(tmp_path / "e.sqlite", BUDGET)
    assert store.sealed_stages() == ()
    assert store.step_output(REQUEST, 1, 1) is None
    assert store.bytes_used == 0
    store.close()


def test_stage_sealed_twice_keeps_the_first_result(tmp_path: Path) -> None:
    store = filled(tmp_path / "e.sqlite")
    store.seal(REQUEST, 1, RESULT)
    store.seal(REQUEST, 1, RESULT)
    with pytest.raises(StorageError):
        store.seal(REQUEST, 1, StageResult(RESULT.evidence_root, RESULT.sketch, b"\x06" * 32, 2))
    store.close()


def test_attestation_saved_twice_returns_the_first(tmp_path: Path) -> None:
    store = EvidenceStore(tmp_path / "e.sqlite", BUDGET)
    other = StageResult(RESULT.evidence_root, RESULT.sketch, b"\x06" * 32, 2)
    assert store.save_attestation(REQUEST, 1, 0, RESULT) == RESULT
    assert store.save_attestation(REQUEST, 1, 0, other) == RESULT
    store.close()


def test_contradiction_after_reopening_and_the_end_of_the_dispute_is_complete_until_it_is_dropped(
    tmp_path: Path,
) -> None:
    store = filled(tmp_path / "e.sqlite")
    evidence = store.steps(REQUEST, 1)
    found = Contradiction(
        Statement(1, False, 1, b"c" * 32, b"s" * 65), evidence.steps[1], (*evidence.tree.proof(1), b"p" * 32)
    )
    store.save_contradiction(REQUEST, found)
    store.save_contradiction(REQUEST, found)
    store.forget(REQUEST)
    store.close()
    store = EvidenceStore(tmp_path / "e.sqlite", BUDGET)
    assert store.contradicted_requests() == (REQUEST,)
    assert store.contradictions(REQUEST) == (found,)
    store.drop_contradiction(REQUEST, found)
    assert store.contradicted_requests() == ()
    store.close()


def test_budget_used_up_refuses_the_step_and_forgetting_frees_it(tmp_path: Path) -> None:
    store = filled(tmp_path / "e.sqlite", budget=800)
    builder = EvidenceBuilder()
    step = builder.add(3, b"\x01" * 32, b"\x09" * 32, b"f" * 8)
    with pytest.raises(StorageFullError):
        store.add_step(REQUEST, 1, step, 2, b"x" * 600)
    store.forget(REQUEST)
    assert store.bytes_free == 800
    store.close()


def test_disk_full_while_a_step_is_stored_is_an_error_and_the_store_goes_on(tmp_path: Path) -> None:
    store = filled(tmp_path / "e.sqlite")
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    builder = EvidenceBuilder()
    step = builder.add(3, b"\x01" * 32, b"\x09" * 32, b"f" * 8)
    with pytest.raises(StorageFullError):
        store.add_step(REQUEST, 1, step, 2, b"x" * 100_000)
    assert len(store.steps(REQUEST, 1).steps) == 2
    store._database.execute("PRAGMA max_page_count = 1000000")
    store.add_step(b"\x08" * 32, 1, step, 2, b"x" * 100_000)
    store.close()
