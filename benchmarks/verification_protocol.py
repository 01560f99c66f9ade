"""Attacks whose answer is a rule and not a number: for each the tests that prove it, against the real contracts and
processes. `prove` looks each test up in its file, and runs those of the contracts.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result import Figure

ROOT = Path(__file__).parents[1]
ATTACKS = "tests/contracts/Attacks.t.sol"
TALLY = "tests/contracts/OutputVerification.t.sol"
VOTES = "tests/contracts/Votes.t.sol"
CODEC = "tests/unit/test_runtime_activation_codec.py"
RING = "tests/integration/test_node_ring.py"
NETWORK = "tests/integration/test_network.py"
HAND_OVER = "tests/unit/test_protocol_hand_over.py"
GUARD = "tests/unit/test_node_signing_guard.py"
PLAN = "tests/integration/test_audit_plan.py"


@dataclass(frozen=True)
class Attack:
    """`proofs`: (file, test) pairs; `open`: what of it nothing answers."""

    name: str
    proofs: tuple[tuple[str, str], ...]
    open: str = ""


ANSWERED = (
    Attack(
        "copying a commitment or a reveal",
        (
            (ATTACKS, "test_COPY_01_everyObservedCommitAndReveal_isWorthlessToEverybodyElse"),
            (ATTACKS, "test_COPY_01_executorsOpening_doesNotOpenAnAttestation"),
            (ATTACKS, "test_COPY_01_ownCommitmentOfAnEarlierRound_cannotBeReplayed"),
            (TALLY, "test_CDV_01_revealAttestation_onlyOfOnesOwnEarlierCommitment"),
            (TALLY, "testFuzz_COPY_commitmentOf_bindsEveryField"),
        ),
    ),
    Attack(
        "a member that copies what it is shown",
        (
            (TALLY, "test_CDV_07_memberThatCopiesTheOutput_isSlashedByTheBackupCommittee"),
            (TALLY, "test_CDV_07_copiedOutput_isNoMedoidForThoseWhoComputed"),
            (RING, "test_member_that_copies_what_it_is_shown_loses_stake_and_nobody_else_does"),
        ),
        "stages of one unit; in a backup round, copies of what the first round revealed",
    ),
    Attack(
        "an executor that does not reveal",
        (
            (TALLY, "test_tally_executorThatKeepsItsReveal_isBlamedAndSlashed"),
            (TALLY, "test_unsampled_executorThatKeepsItsReveal_isSlashed"),
            (ATTACKS, "test_CDV_05_liarThatWithholdsAfterTheMembersRevealed_gainsNothing"),
        ),
        "a liar pays withhold_slash_bps instead of incorrect_slash_bps where that is less",
    ),
    Attack(
        "a member that does not reveal",
        (
            (ATTACKS, "test_LIVE_01_silentMember_isJailedAndStopsNobody"),
            (TALLY, "test_challenge_silentMemberOfTheBackupRound_isJailedNotSlashed"),
        ),
        "a member that sees that it would lose keeps silent and is jailed, not slashed",
    ),
    Attack(
        "equivocation",
        (
            (ATTACKS, "test_EQUIV_01_equivocation_slashesEverythingTombstonesAndRefunds"),
            (ATTACKS, "test_EQUIV_01_contradiction_ofItsOwnEvidence_slashesEverything"),
            (ATTACKS, "test_EQUIV_01_signaturesOfOthers_revert"),
            (GUARD, "test_guard_in_any_history_with_restarts_permits_one_digest_a_duty"),
        ),
    ),
    Attack(
        "inputs withheld from the committee",
        ((TALLY, "test_tally_executorThatWithheldItsEvidence_isSlashedByTheBackupCommittee"),),
    ),
    Attack(
        "inputs or outputs that were not handed over",
        (
            (RING, "test_executor_that_invents_its_inputs_has_no_valid_evidence_and_loses_its_stake_and_no_other_does"),
            (HAND_OVER, "test_linkage_with_invented_inputs_blames_the_receiver_by_its_receipt"),
            (HAND_OVER, "test_linkage_with_changed_outputs_blames_the_sender_by_its_own_statement"),
            (HAND_OVER, "test_linkage_with_a_neighbour_that_made_its_evidence_up_does_not_blame_the_honest_end"),
        ),
    ),
    Attack(
        "an honest sketch, and other bytes handed on",
        (
            (RING, "test_stage_that_sketches_honestly_and_hands_on_other_rows_has_a_sketch_that_is_nobodys"),
            (CODEC, "test_other_rows_cannot_be_handed_on"),
            (CODEC, "test_rows_with_float_noise_can_be_handed_on_in_any_encoding"),
        ),
        "rows that travel in 8 bits may differ by as much as 8 bits round: weights in bfloat16 pass",
    ),
    Attack(
        "another model or arithmetic, end to end",
        (
            (NETWORK, "test_dishonest_node_and_no_other_is_slashed_and_the_requester_refunded"),
            (RING, "test_executor_that_hands_on_other_activations_is_far_from_what_the_committee_attests"),
        ),
    ),
    Attack(
        "a requester that grinds the draw",
        (
            (TALLY, "test_drawCommittee_withTheSecret_fixesTheSeed"),
            (TALLY, "test_drawCommittee_refusals"),
            (TALLY, "test_drawCommittee_afterARenewal_anybodyMayDraw"),
            (ATTACKS, "test_LIVE_01_requesterThatKeepsItsSecret_delaysOnlyForTheSecretWindow"),
        ),
        "one bit: it may use its secret or let it lapse, which squares its sampling rate",
    ),
    Attack(
        "colluding committees",
        (
            (TALLY, "test_tally_lessThanTwoThirds_areNone"),
            (TALLY, "test_tally_exactlyTwoThirds_areAQuorum"),
            (TALLY, "test_tally_lyingMember_callsTheBackupCommitteeWhichSlashesIt"),
            (TALLY, "test_tally_noQuorumInThreeRounds_refundsAndSlashesNobody"),
            (ATTACKS, "test_CDV_04_accompliceThatWithholds_doesNotSpareTheLiar"),
            (VOTES, "test_CDV_06_largeKeyOfAFifth_cannotSpareALiarNorHurtTheHonest"),
        ),
        "section capture: a third of the votes blocks, two thirds decide",
    ),
    Attack(
        "an executor on its own committee",
        ((TALLY, "test_isSeated_nodesOfTheExecutorsOperator_areNot"),),
        "operators are addresses: nothing ties two of them to one person",
    ),
    Attack(
        "stake moved in for a draw",
        ((TALLY, "test_isSeated_stakeAfterTheSnapshot_doesNotCount"),),
    ),
    Attack(
        "a coordinator with a wrong plan",
        (
            (PLAN, "test_plan_that_is_not_the_planners_fails_by_what_differs"),
            (PLAN, "test_plan_from_a_forged_measurement_names_the_node"),
            (PLAN, "test_plan_of_its_record_holds_and_lists_active_nodes_that_were_left_out"),
        ),
    ),
    Attack(
        "signatures replayed elsewhere",
        (
            (ATTACKS, "test_REPLAY_01_handOver_onAnotherChainOrContract_isRefused"),
            (ATTACKS, "test_REPLAY_01_consent_onAnotherChainOrContract_isRefused"),
            (ATTACKS, "test_REPLAY_01_nodeKeyProof_onAnotherChainOrContract_isRefused"),
        ),
    ),
)


def missing(attacks: tuple[Attack, ...] = ANSWERED) -> list[str]:
    """Tests that are not in their files."""
    absent = []
    for attack in attacks:
        for file, test in attack.proofs:
            path = ROOT / file
            text = path.read_text() if path.exists() else ""
            if re.search(rf"\b(?:function|def) {test}\(", text) is None:
                absent.append(f"{file}: {test}")
    return absent


def run_contract_tests(forge: str) -> tuple[int, str]:
    """Runs the named tests of the contracts; how many there are, and what went wrong (empty: all hold)."""
    names = sorted({test for attack in ANSWERED for file, test in attack.proofs if file.endswith(".sol")})
    command = [forge, "test", "--match-test", f"^({'|'.join(names)})\\("]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return len(names), "" if done.returncode == 0 else (done.stdout + done.stderr)[-2_000:]


def show() -> None:
    print()
    for attack in ANSWERED:
        print(f"{attack.name}: proven by")
        for file, test in attack.proofs:
            print(f"    {file}  {test}")
        if attack.open:
            print(f"    open: {attack.open}")


def figures(forge: str | None) -> list[Figure]:
    """`forge`: the program that runs the contracts' tests, or None to look the names up only."""
    absent = missing()
    tests = sum(len(attack.proofs) for attack in ANSWERED)
    found = [
        Figure("attacks answered by a rule whose tests are missing", len(absent), "tests", 0, tests, tests, "== 0",
               "; ".join(absent) or f"{len(ANSWERED)} attacks")
    ]  # fmt: skip
    if forge is not None:
        count, wrong = run_contract_tests(forge)
        if wrong:
            print(wrong)
        note = "run now; those of the processes run with make test-python"
        found.append(Figure("tests of the contracts that fail", float(bool(wrong)), "runs", 0, 1, count, "== 0", note))
    return found
