"""The follower against a real chain: reorganisations of Anvil, outages, and a full replay as the judge."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from bsns.chain.errors import ChainUnavailableError, UnknownBlockError
from bsns.chain.submitter import Submitter
from coordinator.chain_follower import ChainFollower, FollowerLimits
from coordinator.network_state import NetworkState, fold
from coordinator.storage import Intent, IntentState, Storage, migrate
from coordinator.transaction_outbox import OutboxLimits, TransactionOutbox
from tests.anvil import running_anvil
from tests.integration.coordinator_fixtures import DeployedNetwork, ScriptedNode, deployed_network, tiny_manifest

pytestmark = [pytest.mark.chain, pytest.mark.slow]


async def _replay(network: DeployedNetwork, folder: Path, name: str) -> NetworkState:
    """What a follower that begins now on an empty database stores."""
    url = f"sqlite:///{folder / name}"
    migrate(url)
    storage = Storage(url)
    try:
        follower = ChainFollower(network.client, storage, network.deployment, limits=FollowerLimits())
        await follower.require_right_chain()
        await follower.catch_up()
        assert fold(NetworkState(), storage.history()) == storage.network_state()
        return storage.network_state()
    finally:
        storage.close()


async def _follow(follower: ChainFollower) -> None:
    """One poll as `run` makes it: what was orphaned under our hands is seen at the next."""
    while True:
        try:
            await follower.catch_up()
        except (UnknownBlockError, ChainUnavailableError):
            await asyncio.sleep(0.05)
            continue
        return


async def test_follower_through_anvils_reorganisations_equals_a_full_replay(tmp_path: Path) -> None:
    seed = 20_261_123
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with running_anvil() as anvil, deployed_network(anvil) as network:
        url = f"sqlite:///{tmp_path / 'followed.sqlite'}"
        migrate(url)
        storage = Storage(url)
        follower = ChainFollower(network.client, storage, network.deployment, limits=FollowerLimits())
        await follower.require_right_chain()
        deepest = 0
        nodes = [await ScriptedNode.create(network) for _ in range(2)]
        for _ in range(3):
            await anvil.rpc("evm_mine")
        for turn in range(6):
            node = chance.choice(nodes)
            operator = Submitter(network.client, node.operator)
            await operator.submit("NodeRegistry", "addStake", node.node, value=chance.randrange(1, 10**18))
            await operator.submit("NodeRegistry", "changeEndpoint", node.node, bytes([turn + 1]) * 32, f"host-{turn}:1")
            await _follow(follower)
            head = await network.client.head()
            cursor = storage.cursor()
            assert cursor is not None
            assert cursor.hash == head.hash
            depth = chance.randrange(1, 4)
            deepest = max(deepest, depth)
            # Replaces the last blocks by empty ones of the same number: their transactions are gone.
            await anvil.rpc("anvil_reorg", depth, [])
            await _follow(follower)
            cursor = storage.cursor()
            assert cursor is not None
            assert cursor.hash == (await network.client.head()).hash
            assert storage.network_state() == await _replay(network, tmp_path, f"replay-{turn}.sqlite")
        assert sum(item.orphaned_events for item in follower.reorganisations) > 0
        print(f"reorganisations survived {len(follower.reorganisations)}, deepest {deepest}, events lost 0, doubled 0")
        storage.close()


async def test_follower_on_a_chain_rolled_back_to_fewer_blocks_follows_it_down(tmp_path: Path) -> None:
    async with running_anvil() as anvil, deployed_network(anvil) as network:
        url = f"sqlite:///{tmp_path / 'c.sqlite'}"
        migrate(url)
        storage = Storage(url)
        follower = ChainFollower(network.client, storage, network.deployment, limits=FollowerLimits())
        await follower.require_right_chain()
        kept = await ScriptedNode.create(network)
        lost = await ScriptedNode.create(network)
        await _follow(follower)
        assert set(storage.nodes()) == {kept.node, lost.node}
        await anvil.rpc("anvil_rollback", 1)
        await _follow(follower)
        assert set(storage.nodes()) == {kept.node}
        storage.close()


async def test_intent_whose_block_anvil_orphans_is_mined_again_once(tmp_path: Path) -> None:
    async with running_anvil() as anvil, deployed_network(anvil) as network:
        url = f"sqlite:///{tmp_path / 'c.sqlite'}"
        migrate(url)
        storage = Storage(url)
        storage.bind(network.deployment)
        clock = 0.0
        outbox = TransactionOutbox(
            network.client,
            storage,
            network.publisher,
            limits=OutboxLimits(confirmations=2, rebroadcast_seconds=1),
            clock=lambda: clock,
        )
        manifest = tiny_manifest()
        arguments = (manifest.manifest_hash, manifest.weight_root, len(manifest.units), manifest.name)
        await outbox.want(Intent("registerModel", "ShardAssignments", "registerModel", arguments))
        await outbox.step()
        await outbox.step()
        record = storage.intent("registerModel")
        assert record is not None
        assert record.state == IntentState.MINED
        await anvil.rpc("anvil_reorg", 1, [])
        for _ in range(20):
            clock += 2
            await outbox.step()
            await anvil.rpc("evm_mine")
            record = storage.intent("registerModel")
            assert record is not None
            if record.state == IntentState.CONFIRMED:
                break
        assert record.state == IntentState.CONFIRMED
        head = (await network.client.head()).number
        found = await network.client.events_between(network.deployment.first_block, head, name="ModelRegistered")
        assert len(found) == 1
        # The contract's refusal of the same again is decoded and stored.
        await outbox.want(Intent("again", "ShardAssignments", "registerModel", arguments))
        await outbox.step()
        refused = storage.intent("again")
        assert refused is not None
        assert refused.state == IntentState.REFUSED
        assert refused.reason is not None
        assert refused.reason.startswith("ModelAlreadyRegistered(")
        storage.close()
