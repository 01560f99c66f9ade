"""bsns.chain against a real Anvil: deployment, decoding, errors, and the protocol rules that Solidity and Python both
compute.
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import test_utils, web

from bsns.chain.artifacts import CONTRACT_NAMES, contract_artifact
from bsns.chain.client import Web3ChainClient, _open
from bsns.chain.deployment import ETHER, Deployment, EscrowTerms, Terms, deploy
from bsns.chain.errors import (
    ChainUnavailableError,
    ContractError,
    EndpointRefusedError,
    InsufficientFundsError,
    UnknownBlockError,
    WrongChainError,
)
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.protocol.commitments import sealed_sketch, stage_commitment
from bsns.protocol.identifiers import RequestId, address, request_id
from bsns.protocol.sketch import distance
from bsns.protocol.typed_data import NODE_KEY_PROOF, registry_domain, signing_digest
from tests.anvil import Anvil, running_anvil

FAR_FUTURE = 2**40


@pytest_asyncio.fixture
async def anvil() -> AsyncIterator[Anvil]:
    async with running_anvil() as running:
        yield running


@dataclasses.dataclass
class Network:
    anvil: Anvil
    deployment: Deployment
    client: Web3ChainClient
    operator: KeySigner
    submitter: Submitter


@pytest_asyncio.fixture
async def network(anvil: Anvil) -> AsyncIterator[Network]:
    operator = await anvil.funded_signer()
    deployment = await deploy(anvil.rpc_url, operator, Terms.for_devnet())
    async with await Web3ChainClient.connect(anvil.rpc_url, deployment) as client:
        yield Network(anvil, deployment, client, operator, Submitter(client, operator))


def key_proof(network: Network, node: KeySigner, certificate_hash: bytes, endpoint: str) -> bytes:
    domain = registry_domain(network.deployment.chain_id, network.deployment.node_registry)
    values = (network.operator.address, node.address, certificate_hash, endpoint, FAR_FUTURE)
    return node.sign_digest(signing_digest(domain, NODE_KEY_PROOF, values))


async def test_deployment_addresses_are_precomputed_and_terms_readable(network: Network) -> None:
    terms = Terms.for_devnet()
    registry = await network.client.call("NodeRegistry", "terms")
    assert (registry.minimumStake, registry.activationDelay, registry.thawPeriod) == (
        terms.registry.minimum_stake,
        terms.registry.activation_delay,
        terms.registry.thaw_period,
    )
    verification = await network.client.call("OutputVerification", "terms")
    assert verification.tolerance == terms.verification.tolerance
    assert await network.client.call("InferenceEscrow", "verification") == network.deployment.output_verification
    assert await network.client.call("InferenceEscrow", "tabs") == network.deployment.request_tabs
    tabs = await network.client.call("RequestTabs", "terms")
    assert tabs.tokensPerDraw == terms.tabs.tokens_per_draw


async def test_deployment_by_an_account_that_cannot_pay_names_it(anvil: Anvil) -> None:
    pauper = KeySigner(secrets.token_bytes(32))
    with pytest.raises(InsufficientFundsError, match=pauper.address):
        await deploy(anvil.rpc_url, pauper, Terms.for_devnet())


async def test_deployment_with_unsafe_windows_is_refused_by_the_constructor(anvil: Anvil) -> None:
    deployer = await anvil.funded_signer()
    unsafe = dataclasses.replace(Terms.for_devnet(), escrow=EscrowTerms(verification_window=1))
    with pytest.raises(ContractError, match="WindowOutOfRange"):
        await deploy(anvil.rpc_url, deployer, unsafe)


async def test_submit_register_emits_decoded_event(network: Network) -> None:
    node, certificate_hash, endpoint = KeySigner(secrets.token_bytes(32)), secrets.token_bytes(32), "127.0.0.1:7001"
    proof = key_proof(network, node, certificate_hash, endpoint)
    receipt = await network.submitter.submit(
        "NodeRegistry", "register", node.address, certificate_hash, endpoint, FAR_FUTURE, proof, value=2 * ETHER
    )
    (event,) = receipt.events
    assert event.name == "NodeRegistered"
    assert event.arguments["node"] == node.address
    assert event.arguments["certificateHash"] == certificate_hash
    assert event.arguments["endpoint"] == endpoint
    found = await network.client.events_between(
        0, receipt.block_number, name="NodeRegistered", filters={"node": node.address}
    )
    assert found == (event,)
    assert await network.client.events(receipt.block_hash) == (event,)
    account = await network.client.call("NodeRegistry", "accountOf", node.address)
    assert account.staked == 2 * ETHER
    assert account.operator == network.operator.address


async def test_submit_refused_call_raises_decoded_custom_error(network: Network) -> None:
    with pytest.raises(ContractError) as refused:
        await network.submitter.submit(
            "NodeRegistry",
            "register",
            KeySigner(secrets.token_bytes(32)).address,
            b"\1" * 32,
            "x:1",
            1,
            b"",
            value=1,
        )
    assert refused.value.name == "StakeBelowMinimum"
    assert refused.value.arguments == {"expected": ETHER, "actual": 1}


async def test_signature_for_another_chain_is_refused(network: Network) -> None:
    node = KeySigner(secrets.token_bytes(32))
    domain = registry_domain(network.deployment.chain_id + 1, network.deployment.node_registry)
    values = (network.operator.address, node.address, b"\1" * 32, "x:1", FAR_FUTURE)
    foreign = node.sign_digest(signing_digest(domain, NODE_KEY_PROOF, values))
    with pytest.raises(ContractError, match="ProofInvalid"):
        await network.submitter.submit(
            "NodeRegistry", "register", node.address, b"\1" * 32, "x:1", FAR_FUTURE, foreign, value=ETHER
        )


async def test_commitment_rules_equal_solidity(network: Network) -> None:
    request = RequestId(secrets.token_bytes(32))
    root, sketch, salt = (secrets.token_bytes(32) for _ in range(3))
    seal = sealed_sketch(sketch, salt)
    assert await network.client.call("OutputVerification", "sealOf", sketch, salt) == seal
    node = network.operator.address
    assert await network.client.call(
        "OutputVerification", "commitmentOf", request, 2, 3, node, root, seal, 17
    ) == stage_commitment(request, 2, 3, node, root, seal, 17)
    other = secrets.token_bytes(32)
    assert await network.client.call("OutputVerification", "sketchDistance", sketch, other) == distance(sketch, other)
    assert await network.client.call("InferenceEscrow", "requestIdOf", node, 99) == request_id(
        network.deployment.chain_id, network.deployment.inference_escrow, node, 99
    )


async def test_orphaned_block_hash_raises_unknown_block(network: Network) -> None:
    await network.anvil.rpc("anvil_mine", hex(3))
    orphan = await network.client.head()
    await network.anvil.rpc("anvil_reorg", 2, [])
    with pytest.raises(UnknownBlockError):
        await network.client.events(orphan.hash)
    assert await network.client.block_by_hash(orphan.hash) is None


async def test_connect_to_another_chain_is_refused_with_both_ids(network: Network) -> None:
    async with running_anvil(chain_id=1_234) as other:
        with pytest.raises(WrongChainError, match=r"chain 1234.*chain 31337"):
            await Web3ChainClient.connect(other.rpc_url, network.deployment)


async def test_connect_to_a_chain_without_the_contracts_is_refused(anvil: Anvil, network: Network) -> None:
    async with running_anvil() as empty:
        with pytest.raises(WrongChainError, match="no NodeRegistry"):
            await Web3ChainClient.connect(empty.rpc_url, network.deployment)


async def test_endpoint_that_is_down_or_silent_is_unavailable_within_the_timeout(network: Network) -> None:
    with pytest.raises(ChainUnavailableError, match="check that it runs"):
        await Web3ChainClient.connect("http://127.0.0.1:9", network.deployment, timeout_s=2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ChainUnavailableError):
            await Web3ChainClient.connect(url, network.deployment, timeout_s=0.3)


async def test_account_that_cannot_pay_is_named_whether_value_or_gas_is_missing(network: Network) -> None:
    pauper = KeySigner(secrets.token_bytes(32))
    poor = Submitter(network.client, pauper)
    with pytest.raises(InsufficientFundsError, match=rf"{pauper.address}.*fund it") as estimated:
        await poor.transfer(network.operator.address, 1)
    assert estimated.value.account == pauper.address
    await network.submitter.transfer(pauper.address, 1_000)
    with pytest.raises(InsufficientFundsError, match=rf"{pauper.address}.*fund it"):
        await poor.transfer(network.operator.address, 1_000)
    assert await network.client.transaction_count(pauper.address) == 0
    transaction = await network.client.prepare_transfer(network.operator.address, 1, sender=pauper.address, nonce=0)
    with pytest.raises(InsufficientFundsError, match=pauper.address):
        await network.client.send_raw(pauper.sign_transaction(transaction))


@pytest.mark.parametrize(("pruned", "served"), [(2, True), (3, False)])
async def test_read_of_the_newest_state_that_was_pruned_meanwhile_is_begun_again(pruned: int, served: bool) -> None:
    """What Anvil says with --prune-history when a block comes between resolving "latest" and reading."""
    refusal = {"code": -32602, "message": "BlockOutOfRangeError: block height is 12 but requested was 11"}
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        query = await request.json()
        if query["method"] == "eth_chainId":  # web3 asks for it on its own
            return web.json_response({"jsonrpc": "2.0", "id": query["id"], "result": hex(31_337)})
        asked.append(query["method"])
        outcome = {"error": refusal} if len(asked) <= pruned else {"result": "0x" + "00" * 31 + "05"}
        return web.json_response({"jsonrpc": "2.0", "id": query["id"], **outcome})

    application = web.Application()
    application.router.add_post("/", answer)
    zero = address("0x" + "00" * 20)
    deployment = Deployment(31_337, zero, zero, zero, zero, zero, zero, 1)
    async with test_utils.TestServer(application) as server:
        client = Web3ChainClient(_open(str(server.make_url("/")), 5), deployment)
        try:
            if served:
                assert await client.call("NodeRegistry", "minimumStake") == 5
                assert asked == ["eth_call"] * (pruned + 1)
            else:
                with pytest.raises(ChainUnavailableError, match="BlockOutOfRange"):
                    await client.call("NodeRegistry", "minimumStake")
                asked.clear()
                with pytest.raises(ChainUnavailableError, match="BlockOutOfRange"):
                    await client.call("NodeRegistry", "minimumStake", block=11)
                assert asked == ["eth_call"], "a block that was asked for by number is gone for good"
        finally:
            await client.close()


def test_key_signer_of_bytes_that_are_no_key_does_not_show_them() -> None:
    for wrong in (b"", bytes(32), b"\xff" * 32, b"\1" * 31):
        with pytest.raises(ValueError, match="curve order") as refused:
            KeySigner(wrong)
        assert str(int.from_bytes(wrong) or "no number") not in str(refused.value)


def test_artifacts_carry_every_contract_below_the_size_limit() -> None:
    for name in CONTRACT_NAMES:
        artifact = contract_artifact(name)
        assert artifact.abi
        assert len(bytes.fromhex(artifact.bytecode[2:])) < 2 * 24_576


async def test_state_by_hash_is_that_of_the_block_and_of_no_other_fork(network: Network) -> None:
    client, escrow = network.client, network.deployment.inference_escrow
    before = await client.head()
    snapshot = await network.anvil.rpc("evm_snapshot")
    await network.anvil.mine()  # the next line changes the newest state without a block of its own
    await network.anvil.rpc("anvil_setBalance", escrow, hex(7))
    await network.anvil.mine()
    after = await client.head()
    assert await client.balance(escrow, block=before.hash) == 0
    assert await client.balance(escrow, block=after.hash) == await client.balance(escrow) == 7
    terms = await client.call("InferenceEscrow", "terms", block=before.hash)
    assert terms == await client.call("InferenceEscrow", "terms")
    node = address("0x" + "11" * 20)
    assert (await client.call("NodeRegistry", "accountOf", node, block=after.hash)).staked == 0
    with pytest.raises(ContractError) as caught:
        await client.call("ShardAssignments", "modelOf", bytes([1] * 32), block=after.hash)
    assert caught.value.name == "ModelUnknown"
    await network.anvil.rpc("evm_revert", snapshot)
    await network.anvil.pass_time(3)
    await network.anvil.mine()
    assert (await client.head()).number == after.number
    with pytest.raises(EndpointRefusedError):
        await client.balance(escrow, block=after.hash)
    with pytest.raises(EndpointRefusedError):
        await client.call("NodeRegistry", "stakeOf", node, block=after.hash)


async def test_log_with_text_that_is_no_utf8_is_read_with_escapes(network: Network) -> None:
    """A contract takes any bytes for a string, so that one bad name would hide the logs of everybody."""
    submitter = network.submitter
    await submitter.submit("ShardAssignments", "registerModel", bytes([1] * 32), bytes([2] * 32), 3, "grüezi")
    data = network.client._contracts["ShardAssignments"].encode_abi(
        "registerModel", args=[bytes([3] * 32), bytes([4] * 32), 5, "ZZZZ"]
    )
    call = {"from": network.operator.address, "to": network.deployment.shard_assignments}
    await network.anvil.rpc("anvil_impersonateAccount", network.operator.address)
    sent = await network.anvil.rpc("eth_sendTransaction", {**call, "data": data.replace("5a5a5a5a", "c35a28ff")})
    await network.anvil.mine()  # it answers before it has mined
    receipt = await network.client.receipt(bytes.fromhex(sent[2:]))
    assert receipt is not None
    events = await network.client.events_between(0, receipt.block_number, name="ModelRegistered")
    assert [item.arguments["name"] for item in events] == ["grüezi", "\\xc3Z(\\xff"]
    assert events[-1] in await network.client.events(receipt.block_hash)
    assert receipt.events == events[-1:]
