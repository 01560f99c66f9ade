"""What verification costs: bytes kept, time of evidence in every step, time of a full check, gas.

Times are measured in turn with the stage's own decoding, one thread, so that drift of the machine falls on both. The
evidence of a step has a part that its successor waits for (the digest of what is handed on) and a part that is done
beside it (sketch, fingerprint, leaf of the Merkle tree), as in `node_client.pipeline`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import Figure
from benchmarks.verification_detection import DECLARED, EXECUTION_CLASS, STAGE_NAMES, sampling_of, texts
from benchmarks.verification_economics import TOKENS
from benchmarks.verification_judge import first_departure, request_seed
from benchmarks.verification_traces import CUTS, Recording, answer, honest_stages
from bsns.chain.deployment import TabTerms, VerificationTerms
from bsns.protocol.commitments import BASIS_POINTS, EvidenceBuilder, content_digest
from bsns.protocol.sketch import FINGERPRINT_BYTES, TOLERANCES, StageSketch
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import iterate_reexecution
from node_client.evidence_store import EvidenceStore, InputOpening

SNAPSHOTS = Path(__file__).parents[1] / "tests" / "contracts" / "snapshots"
BATCH = 64
BATCHES = {1: "per request, 64 requests of 1", 8: "per request, 64 requests of 8"}
"""By requesters: a request's part of all transactions of a batch of 64 (contracts/RequestTabs.sol), in Tabs.json."""
OPENED_LEAF = "openLeaf, 4 stages, 1 of 64"
STEPS = 32


@dataclass(frozen=True)
class Size:
    prompts: int = 3
    tokens: int = 128
    rounds: int = 3


QUICK = Size(prompts=1, tokens=16, rounds=1)


@dataclass
class Cost:
    """Seconds by stage: of decoding one token, of its evidence on and off the critical path, of generating an answer
    with its prompt, and of checking it. `kept_bytes`: of a middle stage and 32 tokens, by what it is.
    """

    decode: dict[int, list[float]] = field(default_factory=dict)
    critical: dict[int, list[float]] = field(default_factory=dict)
    beside: dict[int, list[float]] = field(default_factory=dict)
    generation: list[float] = field(default_factory=list)
    check: list[float] = field(default_factory=list)
    kept_bytes: dict[str, int] = field(default_factory=dict)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _evidence(cost: Cost, stages: list[StageExecutor], prompt: list[int], place: int, tokens: int) -> None:
    """Decodes one answer; after each token each stage's evidence for it."""
    answers = answer(stages, [prompt], tokens, [sampling_of(place)])[0]
    for number, (stage, recording) in enumerate(zip(stages, answers, strict=True)):
        width, centred = recording.outputs[0].shape[1], number == len(stages) - 1
        sketch = StageSketch(request_seed(number, "cost"), width, TOLERANCES[EXECUTION_CLASS].unit, centred=centred)
        builder, session = EvidenceBuilder(), stage.new_session(len(prompt) + tokens)
        for step in recording.steps:
            began = time.perf_counter()
            output = stage.forward(session, step.inputs, position=step.position).numpy()
            decoded = time.perf_counter()
            payload = output.tobytes() if not centred else output[-1:, :1].tobytes()
            digest = content_digest(payload)
            handed_on = time.perf_counter()
            fingerprint = sketch.add(output)
            _ = builder.add(len(step.inputs), digest, digest, fingerprint).leaf
            recorded = time.perf_counter()
            if step.position:
                for times, seconds in (
                    (cost.decode, decoded - began),
                    (cost.critical, handed_on - decoded),
                    (cost.beside, recorded - handed_on),
                ):
                    times.setdefault(number, []).append(seconds)


def _check(cost: Cost, stages: list[StageExecutor], prompt: list[int], place: int, tokens: int) -> None:
    """Generates one answer through all stages, then checks all of them as a member does: pass, sketches, draws."""
    answers: list[list[Recording]] = []
    sampling, tolerance = sampling_of(place), TOLERANCES[EXECUTION_CLASS]
    cost.generation.append(_seconds(lambda: answers.extend(answer(stages, [prompt], tokens, [sampling]))))

    def check() -> None:
        for number, (stage, recording) in enumerate(zip(stages, answers[0], strict=True)):
            last, logits = number == len(stages) - 1, []
            width = recording.outputs[0].shape[1]
            sketch = StageSketch(request_seed(number, "cost"), width, tolerance.unit, centred=last)
            inner_width = stage.manifest.row_width(stage.end_unit - 1)
            inner = StageSketch(request_seed(number, "inside"), inner_width, tolerance.unit)
            for output in iterate_reexecution(
                stage, recording.steps, inside=lambda rows, inner=inner: (inner.add(rows.numpy()), None)[1]
            ):
                rows = output.numpy()
                sketch.add(rows)
                if last:
                    logits.append(rows[-1])
            sketch.value(), inner.value()
            if last:
                sent = [int(step.inputs[0]) for step in answers[0][0].steps[1:]]
                departure = first_departure(logits[:-1], sampling, sent.__getitem__, tolerance.logit_tolerance)
                assert departure.is_false is None, departure

    cost.check.append(_seconds(check))


def kept_bytes(recording: Recording, opening: InputOpening) -> dict[str, int]:
    """What a stage keeps for its first 32 tokens, in bytes, and the growth of its database file."""
    steps = recording.steps[:STEPS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evidence.sqlite"
        store = EvidenceStore(path, 1 << 30)
        empty, builder = path.stat().st_size, EvidenceBuilder()
        store.open_stage(bytes(32), 1, opening, 0)
        for step in steps:
            data = step.inputs.numpy().tobytes()
            leaf = builder.add(len(step.inputs), content_digest(data), content_digest(data), bytes(FINGERPRINT_BYTES))
            store.add_step(bytes(32), 1, leaf, 1, data, data)
        store.close()
        grown = path.stat().st_size - empty
    leaf_bytes = 3 * 4 + 4 * 32
    return {
        "fingerprints": FINGERPRINT_BYTES * len(steps),
        "digests, chains and positions of the leaves": leaf_bytes * len(steps),
        "inputs, float32 (as exact bytes, so that a committee can execute)": sum(
            step.inputs.numpy().nbytes for step in steps
        ),
        "sketch, salt, root of the sealed result": 32 * 3,
        "database file": grown,
    }


def measure(folder: Path, size: Size, report: Callable[[str], None]) -> Cost:
    report("cost: evidence and full checks")
    torch.set_num_threads(1)
    cost, tokenizer, stages = Cost(), ChatTokenizer(folder), honest_stages(folder, CUTS, DECLARED)
    prompts = [tokenizer.prompt_token_ids(text) for text in texts()[: size.prompts]]
    recording = answer(stages, [prompts[0]], STEPS, [sampling_of(0)])[0][1]
    opening = InputOpening(bytes(32), len(prompts[0]), sampling_of(0), bytes(32))
    cost.kept_bytes = kept_bytes(recording, opening)
    for _ in range(size.rounds):
        for place, prompt in enumerate(prompts):
            _evidence(cost, stages, prompt, place, size.tokens)
            _check(cost, stages, prompt, place, size.tokens)
    return cost


def show(cost: Cost) -> None:
    print("\nmiddle stage, prompt and 32 tokens, bytes kept")
    for name, count in cost.kept_bytes.items():
        print(f"{name:70} {count:9}")
    print(f"\n{'stage':7} {'decode ms':>10} {'digest µs':>10} {'sketch and leaf µs':>19}   a token, median")
    for number, name in enumerate(STAGE_NAMES):
        decode, critical, beside = (statistics.median(it[number]) for it in (cost.decode, cost.critical, cost.beside))
        print(f"{name:7} {1e3 * decode:10.2f} {1e6 * critical:10.1f} {1e6 * beside:19.1f}")


def check_share(cost: Cost) -> float:
    """What a full check takes over the generation it checks, the median of neighbours."""
    return statistics.median(check / whole for check, whole in zip(cost.check, cost.generation, strict=True))


def _share(name: str, ours: list[float], whole: list[float], goal: str | None, note: str) -> Figure:
    """The median of ratios of neighbours, in %."""
    ratios = [100 * mine / all_ for mine, all_ in zip(ours, whole, strict=True)]
    low, high = np.quantile(ratios, (0.05, 0.95))
    return Figure(name, statistics.median(ratios), "% of generation", float(low), float(high), len(ratios), goal, note)


def figures(cost: Cost, size: Size) -> list[Figure]:
    kept = cost.kept_bytes["fingerprints"]
    others = "; ".join(f"{name} {count}" for name, count in cost.kept_bytes.items() if name != "fingerprints")
    found = [Figure("fingerprints a stage and 32 tokens", kept, "bytes", kept, kept, 1, "<= 258", f"besides: {others}")]
    all_stages = list(cost.decode)
    steps = range(len(cost.decode[0]))
    whole = [sum(cost.decode[stage][step] for stage in all_stages) for step in steps]
    quantiles = "low and high: 5 % and 95 %"
    for part, times in (("that the next stage waits for", cost.critical), ("beside it", cost.beside)):
        together = [sum(times[stage][step] for stage in all_stages) for step in steps]
        found.append(_share(f"evidence {part}, all stages", together, whole, "<= 0.5", quantiles))
        for stage, name in enumerate(STAGE_NAMES):
            found.append(_share(f"evidence {part}, {name} stage", times[stage], cost.decode[stage], None, quantiles))
    rate = VerificationTerms().sampling_rate_bps / BASIS_POINTS
    note = f"prompt and {size.tokens} tokens; pass of 256 rows at a time, sketch and draws, all stages, one thread"
    found.append(_share("full check", cost.check, cost.generation, "<= 8", note))
    amortised = [rate * seconds for seconds in cost.check]
    note = f"by one member at the shipped sampling rate of {100 * rate:g} %"
    found.append(_share("full check, amortised", amortised, cost.generation, "<= 1", note))
    seats = VerificationTerms().committee_seats
    amortised = [seats * seconds for seconds in amortised]
    note = f"by {seats} seats on average"
    found.append(_share("full check, amortised, whole committee", amortised, cost.generation, None, note))
    return found


# ----------------------------------------------------------------------------------------------------------------- gas


def gas_snapshot(name: str) -> dict[str, int]:
    """Gas by call, as `make test-contracts` left it; empty where no test writes that file."""
    path = SNAPSHOTS / name
    return {key: int(value) for key, value in json.loads(path.read_text()).items()} if path.exists() else {}


def naive_gas(lifecycle: dict[str, int], stages: int) -> dict[str, int]:
    """Gas beyond the escrow of one request of `stages` stages in which each shard sends its own transactions: without
    a committee, and with three members on each stage, of which each sits on three stages; and of the latter, as of a
    leaf of a batch that is opened, what comes after the commitments.
    """
    commits = (stages - 1) * lifecycle["commitStage"] + lifecycle["commitStage, last"]
    opened = commits + lifecycle["drawCommittee"] + stages * lifecycle["revealStage"]
    seats = 3 * stages
    attested = -(-seats // 3) * lifecycle["commitAttestations for 3 stages"] + seats * lifecycle["revealAttestation"]
    tallied = (stages - 1) * lifecycle["tally of 3 reveals"] + lifecycle["tally of 3 reveals, last"]
    return {
        "without a committee": opened + stages * lifecycle["tally, unsampled"],
        "with 3 members a stage": opened + attested + tallied,
        "from the draw on, with 3 members a stage": opened + attested + tallied - commits,
    }


def show_gas(stages: int = 4) -> None:
    lifecycle = gas_snapshot("Lifecycle.json")
    print("\ngas by call (tests/contracts/snapshots)")
    for name, gas in lifecycle.items():
        print(f"{name:50} {gas:10}")
    for name, gas in naive_gas(lifecycle, stages).items():
        print(f"a request of {stages} stages {name}, one transaction a shard and step: {gas}, {gas // stages} a stage")
    print("\na batch of 64 requests of 4 stages, gas a request: post, draw, settle")
    for name, gas in gas_snapshot("Tabs.json").items():
        if name.startswith("per request, 64"):
            print(f"{name:50} {gas:10}")


def gas_figures(stages: int = 4) -> list[Figure]:
    rate = VerificationTerms().sampling_rate_bps / BASIS_POINTS
    naive = naive_gas(gas_snapshot("Lifecycle.json"), stages)
    plain, judged = naive["without a committee"], naive["with 3 members a stage"]
    average = (1 - rate) * plain + rate * judged
    note = f"{stages} stages, one transaction a shard and step; {100 * rate:g} % of requests with 3 members a stage"
    found = [
        Figure("gas of a verified request alone, beyond the escrow", average, "gas", plain, judged, 1, "<= 60000", note)
    ]
    tabs = gas_snapshot("Tabs.json")
    first = tabs["per request, 64 requests of 8, first ever"]
    for requesters, key in BATCHES.items():
        batched, high = tabs[key], first if requesters == 8 else tabs[key]
        label = f"gas of a request in a batch of 64 of {requesters} requester{'s' if requesters > 1 else ''}"
        note = (
            f"4 stages, post, draw and settle; a leaf that is drawn costs {tabs[OPENED_LEAF]} and a committee besides"
        )
        note += "; high: the first batch of everybody" if requesters == 8 else ""
        found.append(Figure(label, batched, "gas", batched, high, 1, "<= 10000", note))
    per_draw = TabTerms().tokens_per_draw
    draws = -(-BATCH * TOKENS // per_draw)
    leaves = draws * (tabs[OPENED_LEAF] + naive["from the draw on, with 3 members a stage"]) / BATCH
    low, high = (tabs[key] + leaves for key in BATCHES.values())
    note = f"{BATCH} requests of {TOKENS} tokens, one draw for each begun {per_draw}: {draws} leaves with a committee"
    found.append(
        Figure("gas of a request in a batch of 64, with its drawn leaves", high, "gas", low, high, 1, None, note)
    )
    return found
