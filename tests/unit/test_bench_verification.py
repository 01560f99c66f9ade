"""The adversary suite's own arithmetic: intervals, verdicts, committees, gas, and the tests that it names."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from benchmarks import verification_capture, verification_cost, verification_economics, verification_protocol
from benchmarks.verification_capture import Coalition, Network, Verdict, exact, network, simulated, verdict_of_round
from benchmarks.verification_cheats import (
    integer_rows,
    other_weights,
    perturbed,
    random_outputs,
    replayed,
    truncated_cache,
)
from benchmarks.verification_detection import threshold
from benchmarks.verification_judge import (
    Departure,
    Outcome,
    first_departure,
    first_refused,
    outcome,
    request_seed,
    sketches_at,
)
from benchmarks.verification_published import is_refused
from benchmarks.verification_statistics import clopper_pearson, shown_share
from benchmarks.verification_traces import Recording
from bsns.protocol.sampling import SamplingParameters, draw
from bsns.protocol.sketch import TOLERANCES, StageSketch
from bsns.runtime.activation_codec import TensorEncoding
from bsns.runtime.ragged_attention import DecoderSession, RaggedBatch

TOLERANCE = TOLERANCES["torch-cpu/float32/sdpa"]


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (10, 10), (3, 17), (499, 500)])
def test_interval_is_where_the_tails_have_their_probability(hits: int, trials: int) -> None:
    low, high = clopper_pearson(hits, trials)
    assert low <= hits / trials <= high
    if hits:
        assert binom.sf(hits - 1, trials, low) == pytest.approx(0.025)
    if hits < trials:
        assert binom.cdf(hits, trials, high) == pytest.approx(0.025)


def test_goal_of_999_in_a_thousand_needs_3688_samples_without_a_miss() -> None:
    assert shown_share("cheat", 3_688, 3_688, ">= 99.9").met is True
    assert shown_share("cheat", 3_687, 3_687, ">= 99.9").met is False
    assert shown_share("cheat", 3_839, 3_840, ">= 99.9").met is False


def test_counts_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="trials"):
        clopper_pearson(3, 2)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [(0, Outcome.PAID), (128, Outcome.PAID), (129, Outcome.UNPAID), (256, Outcome.UNPAID), (257, Outcome.INCORRECT)],
)
def test_verdict_changes_where_the_contract_changes_it(distance: int, expected: Outcome) -> None:
    assert outcome(distance, TOLERANCE) is expected


def test_evidence_that_does_not_hold_is_slashed_at_any_distance() -> None:
    assert outcome(0, TOLERANCE, evidence_holds=False) is Outcome.NO_EVIDENCE
    assert Outcome.NO_EVIDENCE.is_slashed
    assert not Outcome.UNPAID.is_slashed


def test_seeds_of_requests_and_stages_differ() -> None:
    assert len({request_seed(stage, "a", place) for stage in range(3) for place in range(5)}) == 15


def test_sketch_at_a_length_is_that_of_an_answer_that_ended_there() -> None:
    generator, seed = np.random.default_rng(0), bytes(32)
    outputs = [generator.normal(size=(rows, 64)).astype(np.float32) for rows in (5, 1, 1)]
    found = sketches_at(outputs, seed, 1e-5, (1, 3), centred=False)
    for length in (1, 3):
        sketch = StageSketch(seed, 64, 1e-5)
        for rows in outputs[:length]:
            sketch.add(rows)
        assert found[length] == sketch.value()
    assert found.keys() == {1, 3}


def test_departure_names_the_first_other_and_the_first_false_token() -> None:
    parameters = SamplingParameters(temperature=1.0, seed=3)
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    honest = [draw(row, parameters, step) for step, row in enumerate(logits)]
    assert first_departure(logits, parameters, honest.__getitem__, 1e-3) == Departure()
    false = list(honest)
    false[4] = int(logits[4].argmin())
    assert first_departure(logits, parameters, false.__getitem__, 1e-3) == Departure(4, 4)
    # With a tolerance beyond all differences every token can be a draw.
    assert first_departure(logits, parameters, false.__getitem__, 100.0) == Departure(4, None)


def test_first_refused_names_the_step_whose_rows_are_not_those_computed() -> None:
    own = [np.random.default_rng(2).normal(size=(rows, 128)).astype(np.float32) for rows in (5, 1, 1)]
    noisy = perturbed(3e-6, 0)(Recording(outputs=own))
    changed = [own[0], *perturbed(1e-3, 0)(Recording(outputs=own[1:]))]
    for encoding in (TensorEncoding.RAW_FLOAT32, TensorEncoding.FLOAT16, TensorEncoding.BLOCKWISE_INT8):
        assert first_refused(noisy, own, encoding, TOLERANCE) is None
    assert first_refused(changed, own, TensorEncoding.RAW_FLOAT32, TOLERANCE) == 1


def test_threshold_is_where_every_larger_deviation_is_caught_too() -> None:
    found = {
        1e-5: Counter({Outcome.PAID: 4}),
        1e-4: Counter({Outcome.INCORRECT: 4}),
        2e-4: Counter({Outcome.INCORRECT: 3, Outcome.UNPAID: 1}),
        1e-3: Counter({Outcome.INCORRECT: 4}),
    }
    assert threshold(found, lambda verdict: verdict.is_slashed) == 1e-3
    assert threshold(found, lambda verdict: verdict is not Outcome.PAID) == 1e-4
    assert threshold({1e-5: found[1e-5]}, lambda verdict: verdict.is_slashed) == math.inf


def recording() -> Recording:
    generator = np.random.default_rng(0)
    return Recording(outputs=[generator.normal(size=(rows, 32)).astype(np.float32) for rows in (4, 1, 1)])


def test_perturbation_has_the_size_that_is_asked_for() -> None:
    honest = recording().outputs
    for own, changed in zip(honest, perturbed(1e-3, 0)(recording()), strict=True):
        centred = own - own.mean(axis=1, keepdims=True)
        gap = np.linalg.norm(changed.astype(np.float64) - own, axis=1) / np.linalg.norm(centred, axis=1)
        assert gap == pytest.approx(np.full(len(own), 1e-3), rel=1e-2)


def test_made_up_outputs_have_the_shapes_of_the_true_ones() -> None:
    own = recording()
    shorter = Recording(outputs=[own.outputs[0][:2]])
    for made in (replayed(shorter)(own), random_outputs(0)(own)):
        assert [rows.shape for rows in made] == [rows.shape for rows in own.outputs]
    assert np.array_equal(replayed(shorter)(own)[0][2:], shorter.outputs[0])


def test_truncated_cache_hides_all_but_the_newest_positions() -> None:
    device = torch.device("cpu")
    session = DecoderSession(1, 1, 4, 8, device)
    session.advance(2)
    batch = RaggedBatch.of([(session, 3)], device, "sdpa")
    with truncated_cache(2):
        seen = batch._mask(batch.segments[0], 2)
    expected = [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert seen.int().tolist() == [row for row in expected for _ in range(2)]
    assert bool(RaggedBatch.of([(session, 3)], device, "sdpa")._mask(batch.segments[0], 1)[2].all())


def test_other_weights_keep_shape_and_spread() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.1
    changed = other_weights(weight)
    assert changed.shape == weight.shape
    assert float(changed.std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.allclose(changed, weight)
    assert float((integer_rows(8)(weight) - weight).abs().max()) <= float(weight.abs().max()) / 127


# ---------------------------------------------------------------------------------------------------------- committees


def test_verdict_of_a_round_follows_the_contract() -> None:
    net = Network(honest=90, honest_stake=1, colluding=10, colluding_stake=1, seats=5, minimum_reveals=3)
    assert verdict_of_round(net, 1, 3, 0) is Verdict.ACCEPTED  # nobody contradicts
    assert verdict_of_round(net, 1, 2, 0) is None  # too few reveals
    assert verdict_of_round(net, 1, 9, 1) is None  # one voice calls the backup committee
    assert verdict_of_round(net, 2, 4, 2) is Verdict.ACCEPTED  # exactly two thirds
    assert verdict_of_round(net, 2, 3, 6) is Verdict.CONVICTED
    assert verdict_of_round(net, 2, 3, 5) is None
    assert verdict_of_round(net, 2, 0, 2) is None  # honest, but too few
    assert verdict_of_round(net, 3, 3, 5) is Verdict.UNDECIDED


def test_large_key_votes_with_what_it_was_drawn_from_and_outvotes_no_committee() -> None:
    net = network(0.2, Coalition.ONE_KEY, seats=5, minimum_reveals=3)
    assert (net.colluding, net.colluding_stake, net.honest) == (1, 20 * net.honest_stake, 80)
    assert net.seated(2, net.colluding_stake) == 1.0
    assert net.vote(2, net.colluding_stake) == 2 * net.vote(2, net.honest_stake)
    assert verdict_of_round(net, 2, 1, 8) is Verdict.CONVICTED
    assert exact(net)[Verdict.CONVICTED] > 0.999
    small = network(0.05, Coalition.ONE_KEY, seats=5, minimum_reveals=3)
    assert small.vote(2, small.colluding_stake) == small.vote(2, small.honest_stake)


def test_many_other_keys_do_not_make_a_large_one_stronger() -> None:
    for nodes in (20, 100, 1_000):
        one, many = (
            exact(network(0.2, coalition, 5, 3, nodes)) for coalition in (Coalition.ONE_KEY, Coalition.EQUAL_KEYS)
        )
        assert one[Verdict.CONVICTED] > many[Verdict.CONVICTED] > 0.98
        assert one[Verdict.ACCEPTED] < many[Verdict.ACCEPTED]


def test_full_round_takes_those_who_come_first() -> None:
    net = network(0.45, Coalition.FIRST_TO_COMMIT, seats=5, minimum_reveals=3)
    assert net.committed(9, 11) == (9, 7)
    assert net.committed(20, 5) == (16, 0)
    assert network(0.45, Coalition.EQUAL_KEYS, 5, 3).committed(9, 11) == (7, 9)


@pytest.mark.parametrize("coalition", [Coalition.EQUAL_KEYS, Coalition.ONE_KEY])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_exact_probabilities_add_up_and_agree_with_the_draws_of_the_protocol(
    coalition: Coalition, share: float
) -> None:
    net = network(share, coalition, seats=5, minimum_reveals=3, nodes=10)
    chances = exact(net)
    assert sum(chances.values()) == pytest.approx(1.0)
    counted = simulated(net, 60, 0)
    for verdict, chance in chances.items():
        low, high = clopper_pearson(counted[verdict], 60, 1 - 0.05 / 18)
        assert low - 1e-9 <= chance <= high + 1e-9, verdict


def test_coalition_of_nobody_never_spares_the_liar() -> None:
    assert exact(network(0.0, Coalition.EQUAL_KEYS, 5, 3))[Verdict.CONVICTED] == pytest.approx(1.0, abs=1e-6)


# --------------------------------------------------------------------------------------------- gas, tests, published


def test_naive_gas_adds_what_each_shard_sends() -> None:
    lifecycle = {
        "commitStage": 10, "commitStage, last": 20, "drawCommittee": 5, "revealStage": 7, "tally, unsampled": 3,
        "commitAttestations for 3 stages": 100, "revealAttestation": 11, "tally of 3 reveals": 2,
        "tally of 3 reveals, last": 4,
    }  # fmt: skip
    found = verification_cost.naive_gas(lifecycle, 4)
    opened = 3 * 10 + 20 + 5 + 4 * 7
    assert found["without a committee"] == opened + 4 * 3
    assert found["with 3 members a stage"] == opened + 4 * 100 + 12 * 11 + 3 * 2 + 4
    assert found["from the draw on, with 3 members a stage"] == found["with 3 members a stage"] - 3 * 10 - 20


def test_batch_figures_are_those_of_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lifecycle = (verification_cost.SNAPSHOTS / "Lifecycle.json").read_text()
    monkeypatch.setattr(verification_cost, "SNAPSHOTS", tmp_path)
    (tmp_path / "Lifecycle.json").write_text(lifecycle)
    of_one, of_eight = verification_cost.BATCHES.values()
    snapshot = {of_one: "6000", of_eight: "10001", f"{of_eight}, first ever": "12000"}
    (tmp_path / "Tabs.json").write_text(json.dumps({**snapshot, verification_cost.OPENED_LEAF: "800000"}))
    _alone, one, eight, _with_leaves = verification_cost.gas_figures()
    assert (one.value, one.met) == (6000, True)
    assert (eight.value, eight.high, eight.met) == (10001, 12000, False)


def test_every_test_that_proves_an_answer_is_there() -> None:
    assert verification_protocol.missing() == []
    invented = verification_protocol.Attack("x", ((verification_protocol.ATTACKS, "test_thatIsNot"),))
    assert verification_protocol.missing((invented,)) == ["tests/contracts/Attacks.t.sol: test_thatIsNot"]


def test_published_check_refuses_beyond_any_threshold() -> None:
    assert not is_refused([(38, 10.0, 8.0), (0, 0.0, 0.0)])
    assert is_refused([(0, 0.0, 0.0), (39, 0.0, 0.0)])
    assert is_refused([(0, 10.1, 0.0)])
    assert is_refused([(0, 0.0, 8.5)])


# -------------------------------------------------------------------------------------------------------- economics


def test_no_cheat_of_a_single_executor_pays_at_the_shipped_terms() -> None:
    table = verification_economics.lines(verification_economics.Measured())
    for deployment, rows in table.items():
        assert not [row.name for row in rows if row.name.startswith("executor saves") and row.pays], deployment


def test_sitting_pays_at_the_shipped_terms() -> None:
    for deployment, rows in verification_economics.lines(verification_economics.Measured()).items():
        (sitting,) = (row for row in rows if row.name.startswith("member that does not sit"))
        assert not sitting.pays, deployment


def test_every_line_that_pays_proposes_something() -> None:
    for rows in verification_economics.lines(verification_economics.Measured()).values():
        assert all(bool(row.proposal) == row.pays for row in rows)


def test_requests_until_alarm_are_counted() -> None:
    found = verification_economics.requests_until_alarm(lambda _generator: 200, 2)
    assert found == [found[0]] * 2
    assert 1 < found[0] < 10
    assert verification_economics.requests_until_alarm(lambda _generator: 0, 1, longest=20) == [20]


def test_share_of_stake_is_that_of_the_network() -> None:
    for coalition in Coalition:
        for share in verification_capture.SHARES:
            net = network(share, coalition, 5, 3)
            assert net.colluding * net.colluding_stake / net.total == pytest.approx(share, abs=0.005)
