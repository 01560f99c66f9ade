"""Test vectors for a second implementation: `python -m tests.vectors` writes docs/protocol-vectors.json.

Inputs are small and fixed; what comes out is computed by `bsns.protocol`. That the rules themselves are right is for
other tests, which compare them with the contracts and with other libraries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from bsns.chain.signer import KeySigner
from bsns.protocol import commitments, identifiers, sketch, typed_data
from bsns.protocol.identifiers import address, keccak256
from bsns.protocol.merkle import MerkleTree, leaf_hash
from bsns.protocol.plan import Assignment, ShardPlan, execution_class_id
from bsns.protocol.sampling import SamplingParameters, draw, uniform
from bsns.protocol.tabs import (
    CollectedBatch,
    CollectedTicket,
    RouteStage,
    Segment,
    SignedTicket,
    StageResult,
    Ticket,
    Voucher,
    drawn_tokens,
    shares_of,
    stage_result_digest,
)

FILE: Final = Path(__file__).resolve().parents[1] / "docs/protocol-vectors.json"
CHAIN: Final = 31_337
CONTRACT: Final = address("0x" + "ab" * 20)
KEYS: Final = tuple(KeySigner(bytes([number]) * 32) for number in (1, 2, 3))


def vectors() -> dict[str, Any]:
    """All of them, as JSON values: bytes are hex with 0x, integers that may be large are text."""
    return {
        "about": "Vectors of the protocol in docs/protocol.md; made by `python -m tests.vectors`.",
        "identifiers": _identifiers(),
        "merkle": _merkle(),
        "plan": _plan(),
        "typed_data": _typed_data(),
        "commitments": _commitments(),
        "draw": _draw(),
        "sampling": _sampling(),
        "sketch": _sketch(),
        "tabs": _tabs(),
    }


def _identifiers() -> dict[str, Any]:
    model = identifiers.model_id(_b(1), _b(2), 32)
    plan = identifiers.plan_id(CHAIN, CONTRACT, KEYS[0].address, model, 7)
    request = identifiers.request_id(CHAIN, CONTRACT, KEYS[1].address, 2**127 + 1)
    return {
        "keys": [{"private_key": _hex(bytes([n]) * 32), "address": key.address} for n, key in enumerate(KEYS, 1)],
        "model_id": {"manifest_hash": _hex(_b(1)), "weight_root": _hex(_b(2)), "units": 32, "id": _hex(model)},
        "plan_id": {
            "chain_id": CHAIN, "contract": CONTRACT, "publisher": KEYS[0].address, "model_id": _hex(model), "epoch": 7,
            "id": _hex(plan),
        },
        "request_id": {
            "chain_id": CHAIN, "contract": CONTRACT, "requester": KEYS[1].address, "nonce": str(2**127 + 1),
            "id": _hex(request),
        },
        "execution_class": {"name": "torch-cpu/float32/sdpa", "id": _hex(execution_class_id("torch-cpu/float32/sdpa"))},
    }  # fmt: skip


def _merkle() -> list[dict[str, Any]]:
    found = []
    for count in (1, 2, 3, 5, 8):
        encoded = [number.to_bytes(32) for number in range(count)]
        tree = MerkleTree([leaf_hash(item) for item in encoded])
        found.append({
            "values": [_hex(item) for item in encoded],
            "leaves": [_hex(leaf_hash(item)) for item in encoded],
            "root": _hex(tree.root),
            "proofs": [[_hex(item) for item in tree.proof(number)] for number in range(count)],
        })  # fmt: skip
    return found


def _assignments() -> tuple[Assignment, ...]:
    kind = execution_class_id("torch-cpu/float32/sdpa")
    return tuple(
        Assignment(stage, 0, 4 * stage, 4 * stage + 4, KEYS[stage].address, 1_000 + stage, kind) for stage in range(3)
    )


def _plan() -> dict[str, Any]:
    plan = ShardPlan(12, _assignments())
    return {
        "assignments": [
            {
                "stage": item.stage, "replica": item.replica, "first_unit": item.first_unit, "end_unit": item.end_unit,
                "node": item.node, "work_weight": str(item.work_weight),
                "execution_class": _hex(item.execution_class), "leaf": _hex(item.leaf),
            }
            for item in plan.assignments
        ],
        "root": _hex(plan.root),
    }  # fmt: skip


def _typed_data() -> list[dict[str, Any]]:
    request, node = _b(9), KEYS[2].address
    cases: list[tuple[typed_data.Domain, str, tuple[object, ...]]] = [
        (typed_data.registry_domain(CHAIN, CONTRACT), typed_data.NODE_KEY_PROOF,
         (KEYS[0].address, node, _b(5), "node.example:7700", 2_000_000_000)),
        (typed_data.registry_domain(CHAIN, CONTRACT), typed_data.ATTACH_PROOF, (node, _b(6))),
        (typed_data.registry_domain(CHAIN, CONTRACT), typed_data.PEER_PROOF, (node, KEYS[1].address, 2_000_000_000)),
        (typed_data.assignments_domain(CHAIN, CONTRACT), typed_data.PLAN_CONSENT,
         (_b(1), KEYS[0].address, 7, 10**12, _b(3), _b(4), 2_000_000_000)),
        (typed_data.assignments_domain(CHAIN, CONTRACT), typed_data.MEASUREMENTS, (_b(1), node, _b(8), 1_900_000_000)),
        (typed_data.escrow_domain(CHAIN, CONTRACT), typed_data.SESSION_TOKEN, (request, _b(7), 2_000_000_000)),
        (typed_data.escrow_domain(CHAIN, CONTRACT), typed_data.STAGE_REPLACEMENT, (request, 1, KEYS[0].address, node)),
        (typed_data.verification_domain(CHAIN, CONTRACT), typed_data.HAND_OVER, (request, 2, True, 11, _b(10))),
        (typed_data.verification_domain(CHAIN, CONTRACT), typed_data.EVIDENCE_QUERY, (request, 2, 2_000_000_000)),
        (typed_data.gateway_domain(CHAIN, CONTRACT), typed_data.ACCOUNT_KEY_REQUEST, (node, "laptop", 2_000_000_000)),
    ]  # fmt: skip
    found = []
    for domain, kind, values in cases:
        digest = typed_data.signing_digest(domain, kind, values)
        found.append({
            "domain": {"name": domain.name, "version": "1", "chainId": CHAIN, "verifyingContract": CONTRACT},
            "domain_separator": _hex(domain.separator),
            "type": kind,
            "values": [_shown(value) for value in values],
            "struct_hash": _hex(typed_data.struct_hash(kind, values)),
            "digest": _hex(digest),
            "signature_by_key_3": _hex(KEYS[2].sign_digest(digest)),
        })  # fmt: skip
    return found


def _commitments() -> dict[str, Any]:
    tokens = (11, 12, 1_000_000)
    prompt = commitments.token_bytes(tokens)
    digest = commitments.content_digest(prompt)
    sampling = SamplingParameters(temperature=0.7, top_p=0.9, top_k=40, seed=2**63, maximum_tokens=16)
    builder = commitments.EvidenceBuilder()
    for number in range(3):
        builder.add(3 if number == 0 else 1, _b(20 + number), _b(30 + number), bytes([number]) * 8)
    evidence = builder.finish()
    value = bytes(range(32))
    sealed = commitments.sealed_sketch(value, _b(41))
    return {
        "prompt": {"token_ids": list(tokens), "bytes": _hex(prompt), "digest": _hex(digest)},
        "sampling": {
            "temperature_millionths": 700_000, "top_k": 40, "top_p_millionths": 900_000, "seed": str(2**63),
            "maximum_tokens": 16, "digest": _hex(sampling.digest()),
        },
        "input_commitment": {
            "salt": _hex(_b(40)),
            "value": _hex(commitments.input_commitment(
                digest, 3, sampling.digest(), _b(40)
            )),
        },
        "secret_hash": {"secret": _hex(_b(42)), "value": _hex(commitments.secret_hash(_b(42)))},
        "step_digests": [
            {"bytes": _hex(prompt), "position": 0, "rows": 3, "value": _hex(commitments.step_digest(prompt, 0, 3))},
            {"bytes": _hex(prompt), "position": 3, "rows": 1, "value": _hex(commitments.step_digest(prompt, 3, 1))},
        ],
        "evidence": {
            "steps": [
                {
                    "step": item.step, "position": item.position, "rows": item.rows,
                    "input_digest": _hex(item.input_digest), "output_digest": _hex(item.output_digest),
                    "input_chain": _hex(item.input_chain), "output_chain": _hex(item.output_chain),
                    "fingerprint": _hex(item.fingerprint), "leaf": _hex(item.leaf),
                }
                for item in evidence.steps
            ],
            "root": _hex(evidence.root),
        },
        "stage_commitment": {
            "request_id": _hex(_b(9)), "round": 0, "stage": 2, "node": KEYS[2].address,
            "evidence_root": _hex(evidence.root), "sealed_sketch": _hex(sealed), "output_tokens": 3,
            "value": _hex(commitments.stage_commitment(
                _request(), 0, 2, KEYS[2].address, evidence.root, sealed, 3
            )),
        },
        "sealed_sketch": {"sketch": _hex(value), "salt": _hex(_b(41)), "value": _hex(sealed)},
        "sketch_seed": {"request_id": _hex(_b(9)), "stage": 2, "value": _hex(commitments.sketch_seed(_request(), 2))},
        "inner_sketch_seed": {
            "request_id": _hex(_b(9)), "stage": 2, "entropy": _hex(_b(43)),
            "value": _hex(commitments.inner_sketch_seed(_request(), 2, _b(43))),
        },
    }  # fmt: skip


def _draw() -> dict[str, Any]:
    digest = commitments.commitments_digest([_b(50), _b(51)])
    seed = commitments.draw_seed(_b(42), digest, _b(52), _request())
    return {
        "commitments": [_hex(_b(50)), _hex(_b(51))],
        "commitments_digest": _hex(digest),
        "secret": _hex(_b(42)), "entropy_block_hash": _hex(_b(52)), "request_id": _hex(_b(9)),
        "seed": _hex(seed),
        "seed_of_round_2": _hex(commitments.next_round_seed(seed, 2)),
        "sampled_at_basis_points": {str(rate): commitments.is_sampled(seed, rate) for rate in (0, 5_000, 10_000)},
        "seats": [
            {
                "round": round_, "stage": stage, "node": key.address, "stake": str(10**18),
                "total_stake": str(10 * 10**18), "committee_seats": 3,
                "is_seated": commitments.is_seated(seed, round_, stage, key.address, 10**18, 10 * 10**18, 3),
            }
            for round_ in (1, 2)
            for stage in (0, 1)
            for key in KEYS
        ],
    }  # fmt: skip


def _sampling() -> dict[str, Any]:
    logits = np.array([0.5, 2.0, -1.0, 2.0, 1.5, 0.0], dtype=np.float32)
    cases = [
        SamplingParameters(maximum_tokens=9),
        SamplingParameters(temperature=1.0, seed=7, maximum_tokens=9),
        SamplingParameters(temperature=0.5, top_k=3, top_p=0.8, seed=2**64 - 1, maximum_tokens=9),
    ]
    return {
        "uniform": [{"seed": str(7), "step": step, "value": uniform(7, step)} for step in range(4)],
        "logits": [float(item) for item in logits],
        "draws": [
            {
                "temperature": item.temperature, "top_k": item.top_k, "top_p": item.top_p, "seed": str(item.seed),
                "tokens": [draw(logits, item, step) for step in range(8)],
            }
            for item in cases
        ],
    }  # fmt: skip


def _sketch() -> dict[str, Any]:
    # Exact in binary: what a second implementation computes from them differs by its order of sums alone.
    rows = [[((7 * row + 3 * column) % 16 - 8) / 4 for column in range(64)] for row in range(3)]
    made = sketch.StageSketch(_b(60), 64, 1e-4)
    fingerprints = [made.add(np.array([row], dtype=np.float32)) for row in rows]
    value = made.value()
    other = bytes((item + 250) % 256 for item in value)
    return {
        "seed": _hex(_b(60)), "width": 64, "unit": 1e-4, "rows": rows,
        "fingerprints": [_hex(item) for item in fingerprints],
        "sketch": _hex(value),
        "other": _hex(other),
        "distance": sketch.distance(value, other),
    }  # fmt: skip


def _tabs() -> dict[str, Any]:
    domain = typed_data.tabs_domain(CHAIN, CONTRACT)
    requester, collector = KEYS[1], KEYS[0].address
    tickets = []
    shown = []
    for number in range(3):
        ticket = Ticket(_b(70), requester.address, number, _b(71 + number), _b(80), 5 + number, 20, 2_000_000_000)
        request = ticket.request_id(domain)
        signed = SignedTicket(ticket, requester.sign_digest(request))
        results = tuple(
            StageResult(
                RouteStage(item, ()), _b(90 + item.stage), 4 + number,
                KEYS[item.stage].sign_digest(
                    stage_result_digest(domain, request, item.stage, _b(90 + item.stage), 4 + number)
                ),
            )
            for item in _assignments()
        )  # fmt: skip
        collected = CollectedTicket(signed, results)
        tickets.append(collected)
        shown.append({
            "number": number, "prompt_tokens": 5 + number, "input_commitment": _hex(_b(71 + number)),
            "request_id": _hex(request), "signature": _hex(signed.signature),
            "commitments": [_hex(item.commitment) for item in results], "output_tokens": 4 + number,
            "leaf": _hex(collected.leaf(domain)), "tokens": collected.tokens,
        })  # fmt: skip
    shares = shares_of(tickets, 10**12, 100)
    segment = Segment(requester.address, 0, 3, sum(item.tokens for item in tickets), 10**15, _b(95))
    batch = CollectedBatch(_b(70), collector, 10**12, 2_000_000_000, (segment,), shares, tuple(tickets))
    voucher = Voucher(requester.address, collector, 10**15, _b(95))
    return {
        "plan_id": _hex(_b(70)), "requester": requester.address, "secret_hash": _hex(_b(80)), "maximum_tokens": 20,
        "deadline": 2_000_000_000, "collector": collector, "fee_per_token": str(10**12), "protocol_fee_bps": 100,
        "tickets": shown,
        "root": _hex(batch.tree(domain).root),
        "shares": [{"node": node, "amount": str(amount)} for node, amount in shares],
        "batch_id": _hex(batch.batch_id(domain)),
        "voucher": {"cumulative": str(10**15), "secret_hash": _hex(_b(95)), "digest": _hex(voucher.digest(domain))},
        "drawn_tokens": {
            "entropy": _hex(_b(96)), "tokens_per_draw": 10,
            "tokens": list(drawn_tokens(batch.batch_id(domain), [segment], _b(96), {_b(95): _b(97)}, 10)),
            "secret": _hex(_b(97)),
        },
    }  # fmt: skip


def _b(number: int) -> bytes:
    """32 bytes that are nobody's."""
    return keccak256(number.to_bytes(2))


def _request() -> identifiers.RequestId:
    return identifiers.RequestId(_b(9))


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _shown(value: object) -> object:
    if isinstance(value, bytes):
        return _hex(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def text() -> str:
    """The file."""
    return json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
