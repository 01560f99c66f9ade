"""Whether cheating pays at the shipped terms, and how fast the evidence of many requests exposes a careful cheat.

The arithmetic is `bsns.protocol.deterrence` and `bsns.protocol.accumulated_evidence`; here are the terms of the two
shipped deployments (`bsns.chain.deployment`), an assumed price, and the tables.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.result import Figure
from benchmarks.verification_capture import Coalition, Verdict, exact, network
from benchmarks.verification_cheats import INT8_ROWS, Cheat, integer_rows
from benchmarks.verification_detection import sampling_of, texts
from benchmarks.verification_judge import request_seed, sketches_at
from benchmarks.verification_traces import CUTS, answer, honest_stages, in_one_pass
from bsns.chain.deployment import ETHER, Terms
from bsns.protocol.accumulated_evidence import EXCEEDANCE, FALSE_ALARM, MEAN_SHARE, AccumulatedEvidence
from bsns.protocol.commitments import BASIS_POINTS
from bsns.protocol.deterrence import ExecutorCheat, LazyMember, verifier_share_for
from bsns.protocol.sketch import TOLERANCES, SketchTolerance, distance
from bsns.requester.chat_tokenizer import ChatTokenizer

# Assumed, since a plan sets its own price: that of the local network, 10⁻⁶ ether a token, over three stages.
FEE_PER_TOKEN = 1e-6
TOKENS = 306
STAGES = 3
FEE = FEE_PER_TOKEN * TOKENS / STAGES
# Of its work, what an executor saves with weights in bfloat16, which are half as many bytes to read.
BFLOAT16_SAVES = 0.25
# What an honest execution costs, of the fee.
COST_SHARE = 0.8
# A busy node: 0.4 requests a second (115 tokens a second, docs/performance.md), and up to 45 minutes from a commitment
# to a backup committee's verdict at the public terms (secret, two attest and two reveal windows).
IN_FLIGHT = 1_000
# Of a member that lives off committees and stages: what a term in jail costs it.
REQUESTS_PER_SECOND = 0.1
SAVINGS = {"all of its work": 1.0, "half of its work (8-bit weights)": 0.5}
PUBLIC, DEVNET = "public", "devnet"
TERMS = {PUBLIC: Terms(), DEVNET: Terms.for_devnet()}
NODES = {PUBLIC: 100, DEVNET: 4}


@dataclass(frozen=True)
class Measured:
    """What other sections measured: the share of cheats detected that is shown at least, and what a full check costs
    over the generation it checks. The defaults are those sections' goals.
    """

    detected: float = 0.999
    check_share: float = 0.08


@dataclass(frozen=True)
class Line:
    """One row of the table. `proposal`: what would end it, if cheating pays."""

    name: str
    gain: float
    smallest: str
    proposal: str = ""

    @property
    def pays(self) -> bool:
        return self.gain > 0


def executor_of(
    terms: Terms, *, saved: float, in_flight: int, detected: float = 1.0, convicted: float = 1.0
) -> ExecutorCheat:
    """A cheat with the smallest stake that a deployment accepts. Money in ether."""
    verification, escrow = terms.verification, terms.escrow
    return ExecutorCheat(
        sampling=verification.sampling_rate_bps / BASIS_POINTS,
        stake=terms.registry.minimum_stake / ETHER,
        # Only a request that is drawn can be lost, and of its fee the committee has a share.
        fee=FEE * (1 - (escrow.protocol_fee_bps + escrow.verifier_share_bps) / BASIS_POINTS),
        saved=saved * COST_SHARE * FEE,
        incorrect_slash=verification.incorrect_slash_bps / BASIS_POINTS,
        withhold_slash=verification.withhold_slash_bps / BASIS_POINTS,
        detected=detected,
        convicted=convicted,
        in_flight=in_flight,
    )


def conviction(terms: Terms, nodes: int, share: float, coalition: Coalition) -> float:
    """That a drawn cheat is convicted although `share` of the stake stands behind it (exact sum)."""
    verification = terms.verification
    net = network(share, coalition, verification.committee_seats, verification.minimum_reveals, nodes)
    return exact(net)[Verdict.CONVICTED]


def executor_lines(deployment: str, measured: Measured) -> Iterator[Line]:
    """Executors alone and with friends on the committees, who save a re-execution each time they sit."""
    terms, nodes = TERMS[deployment], NODES[deployment]
    seats = terms.verification.committee_seats
    for name, saved in SAVINGS.items():
        for in_flight in (1, IN_FLIGHT):
            alone = conviction(terms, nodes, 0.0, Coalition.EQUAL_KEYS)
            cheat = executor_of(terms, saved=saved, in_flight=in_flight, detected=measured.detected, convicted=alone)
            yield _line(f"executor saves {name}, {in_flight} in flight", cheat)
    whole = partial(executor_of, terms, saved=1.0, in_flight=IN_FLIGHT, detected=measured.detected)
    shares = (0.2, 1 / 3, 0.45) if deployment == PUBLIC else (0.25,)
    # A pair is an executor with one accomplice of the same size.
    pair = 2 / nodes
    for label, share, coalition in (
        ("a pair", pair, Coalition.EQUAL_KEYS),
        *((f"{100 * share:.0f} % of the stake", share, Coalition.EQUAL_KEYS) for share in shares),
        *((f"{100 * share:.0f} % of the stake", share, Coalition.ONE_KEY) for share in (0.05, 0.1, 0.2)),
    ):
        if share * nodes < 1:
            continue
        cheat = whole(convicted=conviction(terms, nodes, share, coalition))
        sits = min(1.0, seats / nodes) * max(0.0, share * nodes - 1)
        saves = cheat.sampling * sits * measured.check_share * COST_SHARE * FEE
        name = f"executor with {label} in {coalition.value}, {IN_FLIGHT} in flight"
        yield _line(name, replace(cheat, verification_saved=saves), "none")
    unseen = executor_of(terms, saved=0.5, in_flight=1, detected=0.0)
    remedy = "declare another class; the evidence of many requests exposes it (below)"
    yield _line("executor of a bfloat16 class with 8-bit weights (not detected)", unseen, remedy)
    # It serves from lighter weights and sketches one honest pass, as a member would make it.
    name = f"executor that serves from 8-bit weights and sketches honestly, {IN_FLIGHT} in flight"
    saved = max(0.0, 0.5 - measured.check_share)
    yield _line(name, executor_of(terms, saved=saved, in_flight=IN_FLIGHT, detected=measured.detected))
    name = "executor that so serves from bfloat16 weights and hands on in 8 bits (not detected)"
    saved = max(0.0, BFLOAT16_SAVES - measured.check_share)
    remedy = "compare the codes with those of the member's own rows, not only the distance"
    yield _line(name, executor_of(terms, saved=saved, in_flight=1, detected=0.0), remedy)


def _line(name: str, cheat: ExecutorCheat, remedy: str = "") -> Line:
    """`remedy`: what helps where terms do not."""
    rate, slash, most = cheat.smallest_sampling(), cheat.smallest_slash(), cheat.most_in_flight()
    smallest = (
        f"stake {cheat.smallest_stake():.3g}, p {'-' if rate is None else f'{rate:.3g}'}, slash "
        f"{'-' if slash is None else f'{slash:.3g}'}, in flight {'any' if most > 1 << 60 else f'{most:.3g}'}"
    )
    proposal = ""
    if not cheat.is_deterred:
        proposal = remedy or f"both slashes at least {slash:.3g}" if slash is not None or remedy else "a higher stake"
    return Line(name, cheat.expected_gain, smallest, proposal)


def member_lines(deployment: str, measured: Measured) -> Iterator[Line]:
    """Members of committees: whether sitting pays at all, and whether copying does."""
    terms = TERMS[deployment]
    verification = terms.verification
    seats = min(verification.committee_seats, NODES[deployment] - 1)
    share = terms.escrow.verifier_share_bps / BASIS_POINTS
    check = measured.check_share * COST_SHARE * FEE
    jail = verification.jail_period * REQUESTS_PER_SECOND * (1 - COST_SHARE) * FEE
    lazy = LazyMember(
        reexecution=check,
        reward=share * FEE / seats,
        found_rate=1.0,
        stake=terms.registry.minimum_stake / ETHER,
        incorrect_slash=verification.incorrect_slash_bps / BASIS_POINTS,
        jail_loss=jail,
    )
    needed = verifier_share_for(seats, measured.check_share, COST_SHARE)
    yield Line(
        f"member that does not sit, against one that executes ({seats} seats share {100 * share:.0f} % of the fee)",
        lazy.reexecution - lazy.reward,
        f"verifier share {needed:.3g}",
        f"verifier_share_bps at least {needed * BASIS_POINTS:.0f}" if lazy.honest_gain < 0 else "",
    )
    alone = replace(lazy, found_rate=0.0)
    for name, member in (
        ("member that copies, its rows inside are compared", lazy),
        ("the same where nothing is inside: stages of one unit, copies of what a first round revealed", alone),
    ):
        rate = member.smallest_found_rate()
        yield Line(
            name,
            member.expected_gain,
            f"found {'-' if rate is None else f'{rate:.2e}'} of copies",
            "" if member.is_deterred else f"find {'all' if rate is None else f'{rate:.2e}'} of the copies",
        )


def lines(measured: Measured) -> dict[str, list[Line]]:
    return {name: [*executor_lines(name, measured), *member_lines(name, measured)] for name in TERMS}


def show_deterrence(table: dict[str, list[Line]], measured: Measured) -> None:
    print(
        f"\nassumed: {FEE_PER_TOKEN:g} ether a token, {TOKENS} tokens, {STAGES} stages: fee {FEE:.3g} ether a stage, "
        f"cost {COST_SHARE:g} of it, a check {measured.check_share:.2g} of the cost; the smallest stake"
    )
    for deployment, rows in table.items():
        terms = TERMS[deployment]
        verification = terms.verification
        slashes = verification.incorrect_slash_bps / BASIS_POINTS, verification.withhold_slash_bps / BASIS_POINTS
        print(
            f"\n{deployment} terms, {NODES[deployment]} nodes: p {verification.sampling_rate_bps / BASIS_POINTS:g}, "
            f"{verification.committee_seats} seats, stake {terms.registry.minimum_stake / ETHER:g} ether, slashes "
            f"{slashes[0]:g} and {slashes[1]:g}"
        )
        print(f"{'who, and how':82} {'gain/request':>12}  verdict    never pays from (stake in ether)")
        for row in rows:
            verdict = "PAYS" if row.pays else "does not"
            print(f"{row.name:82} {row.gain:12.2e}  {verdict:9}  {row.smallest}")
            if row.proposal:
                print(f"{'':82} {'':12}  {'':9}  proposed: {row.proposal}")


def deterrence_figures(table: dict[str, list[Line]], measured: Measured) -> list[Figure]:
    found = []
    for deployment, rows in table.items():
        alone = [row for row in rows if row.name.startswith("executor saves")]
        pays = sum(row.pays for row in alone)
        label, count = f"cheats of one executor that pay, {deployment} terms", len(alone)
        note = f"at {FEE_PER_TOKEN:g} ether a token, {TOKENS} tokens; detected {measured.detected:.5g}"
        found.append(Figure(label, pays, "of the table", 0, count, count, "== 0", note))
        paying = [row.name for row in rows if row.pays]
        label, count = f"lines of the deterrence table that pay, {deployment} terms", len(rows)
        found.append(Figure(label, len(paying), "of the table", 0, count, count, None, "; ".join(paying)))
    cheat = executor_of(TERMS[PUBLIC], saved=1.0, in_flight=IN_FLIGHT, detected=measured.detected)
    # Every amount but the stake is proportional to the fee.
    fee = FEE_PER_TOKEN * cheat.stake / cheat.smallest_stake()
    found.append(
        Figure("largest fee at which saving all work does not pay, public terms", fee, "ether a token", fee, fee, 1,
               None, f"{TOKENS} tokens, {STAGES} stages, {IN_FLIGHT} requests in flight")
    )  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------------- accumulated evidence

# Honest distances of the small networks measured: none is above r/6 in float32 and int8.
HONEST_DISTANCES = (0, 0, 1, 2, 2, 3, 4, 5, 7, 10)
LONGEST = 20_000
TOLERANCE = TOLERANCES["torch-cpu/float32/sdpa"]
BFLOAT16 = TOLERANCES["torch-cpu/bfloat16/sdpa"]
Source = Callable[[random.Random], int]


@dataclass(frozen=True)
class Exposure:
    """Judged requests until the alarm over several runs; `longest` where it never came."""

    name: str
    requests: Sequence[int]
    longest: int = LONGEST

    @property
    def unalarmed(self) -> int:
        """Runs without an alarm."""
        return sum(count == self.longest for count in self.requests)


def requests_until_alarm(
    source: Source, runs: int, tolerance: SketchTolerance = TOLERANCE, longest: int = LONGEST
) -> list[int]:
    """Of each run of a node whose distances come from `source`."""
    found = []
    for run in range(runs):
        generator = random.Random(run)
        evidence = AccumulatedEvidence(tolerance)
        while evidence.observations < longest and not evidence.observe(source(generator)):
            pass
        found.append(evidence.observations)
    return found


def _mixed(share: float, gap: int, generator: random.Random) -> int:
    return gap if generator.random() < share else generator.choice(HONEST_DISTANCES)


def _from(gaps: Sequence[int], generator: random.Random) -> int:
    return generator.choice(gaps)


def substitute_distances(folder: Path, prompts: int, seeds: int) -> tuple[list[int], list[int]]:
    """Distances of honest stages and of 8-bit weights where bfloat16 is declared, which a single verdict lets pass."""
    torch.set_num_threads(1)
    tokenizer, stages = ChatTokenizer(folder), honest_stages(folder, CUTS, "bfloat16")
    honest, cheats = [], []
    for place, text in enumerate(texts()[:prompts]):
        answers = answer(stages, [tokenizer.prompt_token_ids(text)], 8, [sampling_of(place)])[0]
        for number, (stage, recording) in enumerate(zip(stages, answers, strict=True)):
            bounds, last = (CUTS[number], CUTS[number + 1]), number == len(stages) - 1
            expected = in_one_pass(stage)(recording)
            made = in_one_pass(Cheat(integer_rows(8)).stage(folder, bounds, "bfloat16"))(recording)
            for sample in range(seeds):
                seed = request_seed(number, "evidence", place, sample)
                truth, own, false = (
                    sketches_at(rows, seed, BFLOAT16.unit, (8,), centred=last)[8]
                    for rows in (expected, recording.outputs, made)
                )
                honest.append(distance(truth, own))
                cheats.append(distance(truth, false))
    return honest, cheats


def exposures(folder: Path, *, quick: bool, report: Callable[[str], None]) -> list[Exposure]:
    report("evidence: requests until the alarm")
    runs, longest, tau = 5 if quick else 40, 500 if quick else 2_000, TOLERANCE.pay_within
    found = []
    for share in (1.0, 0.1):
        for part in (0.6, 0.9, 1.2):
            how = "always" if share == 1 else f"in {100 * share:.0f} % of its requests"
            source = partial(_mixed, share, round(part * tau))
            found.append(Exposure(f"{how} at {part:g} τ", requests_until_alarm(source, 1 if share == 1 else runs)))
    honest, cheats = substitute_distances(folder, 1 if quick else 3, 4 if quick else 16)
    for name, gaps in (
        (f"bfloat16 class, {INT8_ROWS} (measured distances {min(cheats)} to {max(cheats)})", cheats),
        (f"bfloat16 class, honest (measured distances {min(honest)} to {max(honest)})", honest),
    ):
        source = partial(_from, gaps)
        found.append(Exposure(name, requests_until_alarm(source, runs, BFLOAT16, longest), longest))
    source = partial(_from, HONEST_DISTANCES)
    found.append(Exposure("honest", requests_until_alarm(source, runs, TOLERANCE, longest), longest))
    return found


def show_evidence(found: Sequence[Exposure]) -> None:
    rate = TERMS[PUBLIC].verification.sampling_rate_bps / BASIS_POINTS
    print(
        f"\nfalse alarm at most {FALSE_ALARM:g} ever; null: P(D > r) <= {EXCEEDANCE:g} and E[min(D, τ)] <= "
        f"{MEAN_SHARE:g} τ, given the past"
    )
    print(f"{'node':76} {'judged requests until the alarm':>32} {'served, at p = ' + format(rate, 'g'):>20}")
    for item in found:
        middle, worst = statistics.median(item.requests), max(item.requests)
        if item.unalarmed == len(item.requests):
            print(f"{item.name:76} {'no alarm in ' + str(worst):>32}")
            continue
        more = f", {item.unalarmed} of {len(item.requests)} runs without" if item.unalarmed else ""
        print(f"{item.name:76} {middle:16.0f} (most {worst:6}) {middle / rate:20.0f}{more}")


def evidence_figures(found: Sequence[Exposure]) -> list[Figure]:
    return [
        Figure(f"judged requests until the alarm, {item.name}", statistics.median(item.requests), "requests",
               min(item.requests), max(item.requests), len(item.requests), None,
               f"{item.unalarmed} runs of {item.longest} without an alarm" if item.unalarmed else "")
        for item in found
    ]  # fmt: skip
