// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Test} from "forge-std/Test.sol";

import {IInferenceEscrow, Request, RequestStatus} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeAccount} from "../../contracts/interfaces/INodeRegistry.sol";
import {
    EvidenceStep,
    HandOver,
    IOutputVerification,
    Phase,
    StageRecord,
    StageVerdict,
    Verification
} from "../../contracts/interfaces/IOutputVerification.sol";
import {IRequestTabs} from "../../contracts/interfaces/IRequestTabs.sol";
import {IShardAssignments, Plan} from "../../contracts/interfaces/IShardAssignments.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {ModelId, PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {EscrowTerms, RegistryTerms, TabTerms, VerificationTerms} from "../../contracts/types/Terms.sol";

/// @notice A deployed network, nodes with keys, plans with consents, and requests driven one act at a time.
/// @dev Written against the interfaces alone and by the letter of their NatSpec and of EIP-712, so that it is a second opinion on
///      how every digest is formed. Node i has hot key `_hot(i)` and operator `_operator(i)`.
abstract contract Swarm is Test {
    /// What a node says about a stage, with the salt of its commitment.
    struct Claim {
        bytes32 root;
        bytes32 sketch;
        bytes32 salt;
        uint32 tokens;
    }

    bytes32 internal constant EXECUTION_CLASS = keccak256("torch-cpu/float32/sdpa");
    bytes32 internal constant INPUT_COMMITMENT = keccak256("input");
    bytes32 internal constant SECRET = keccak256("secret of the requester");
    bytes32 internal constant MEASUREMENTS = keccak256("measurements");
    bytes32 internal constant CERTIFICATE_HASH = keccak256("certificate");
    string internal constant HOST = "127.0.0.1:7400";
    uint128 internal constant FEE = 1 gwei;
    uint32 internal constant PROMPT_TOKENS = 7;
    uint32 internal constant MAXIMUM_TOKENS = 20;
    uint32 internal constant ANSWER_TOKENS = 12;
    uint256 internal constant STAKE = 10 ether;

    INodeRegistry internal registry;
    IShardAssignments internal shards;
    IInferenceEscrow internal escrow;
    IOutputVerification internal verification;
    IRequestTabs internal tabs;
    address internal treasury = makeAddr("treasury");
    address internal publisher = makeAddr("plan publisher");
    address internal requester = makeAddr("requester");

    mapping(uint256 i => address) private _hotKeys;
    mapping(address node => uint256) private _indices;
    mapping(PlanId => Assignment[]) private _leaves;
    mapping(RequestId => PlanId) private _planOf;
    mapping(bytes32 key => Claim) private _claims;
    uint256 private _nextNonce;
    uint32 private _nextModel;

    // -------------------------------------------------------------------------------------------------------- deployment

    function _registryTerms() internal view virtual returns (RegistryTerms memory) {
        return RegistryTerms({minimumStake: 1 ether, activationDelay: 100, thawPeriod: 1 days});
    }

    /// @dev The shortest verification window that OutputVerification accepts for the terms below: 60 + 3 * 1500 + 3600.
    function _escrowTerms() internal view virtual returns (EscrowTerms memory) {
        return EscrowTerms({
            protocolFeeBps: 250,
            verifierShareBps: 1000,
            routeWindow: 300,
            commitWindow: 600,
            verificationWindow: 8160,
            maximumTokens: 1000
        });
    }

    /// @dev Every request is sampled, and with at most 16 nodes of equal stake every node has a seat. r = 32, tau = 64.
    function _verificationTerms() internal view virtual returns (VerificationTerms memory) {
        return VerificationTerms({
            samplingRateBps: 10_000,
            committeeSeats: 16,
            minimumReveals: 2,
            tolerance: 64,
            secretWindow: 60,
            attestWindow: 600,
            revealWindow: 300,
            challengeWindow: 600,
            jailPeriod: 1 hours,
            challengeBond: 1 ether,
            incorrectSlashBps: 5000,
            withholdSlashBps: 1000,
            memberShareBps: 2000,
            reporterShareBps: 1000
        });
    }

    /// @dev A batch of up to 1024 tokens has one draw.
    function _tabTerms() internal view virtual returns (TabTerms memory) {
        return TabTerms({
            secretWindow: 60,
            drawWindow: 600,
            openingWindow: 1200,
            closePeriod: 3600,
            tokensPerDraw: 1024,
            challengeBond: 1 ether
        });
    }

    /// @dev Five contracts that know one another by address from the start; nothing can be rewired later.
    function _deployNetwork() internal {
        vm.warp(1_800_000_000);
        vm.roll(1000);
        uint256 nonce = vm.getNonce(address(this));
        address escrowAt = vm.computeCreateAddress(address(this), nonce + 2);
        address verificationAt = vm.computeCreateAddress(address(this), nonce + 3);
        address tabsAt = vm.computeCreateAddress(address(this), nonce + 4);
        registry =
            INodeRegistry(_create("NodeRegistry", abi.encode(escrowAt, verificationAt, tabsAt, _registryTerms())));
        shards = IShardAssignments(_create("ShardAssignments", abi.encode(registry, uint64(50))));
        escrow = IInferenceEscrow(
            _create("InferenceEscrow", abi.encode(registry, shards, verificationAt, tabsAt, treasury, _escrowTerms()))
        );
        verification =
            IOutputVerification(_create("OutputVerification", abi.encode(registry, escrow, _verificationTerms())));
        tabs = IRequestTabs(_create("RequestTabs", abi.encode(registry, shards, escrow, _tabTerms())));
        vm.label(address(registry), "NodeRegistry");
        vm.label(address(shards), "ShardAssignments");
        vm.label(address(escrow), "InferenceEscrow");
        vm.label(address(verification), "OutputVerification");
        vm.label(address(tabs), "RequestTabs");
    }

    /// @dev From the artifact, so that no test carries the code of five contracts in its own. Reverts as the constructor does.
    function _create(string memory name, bytes memory arguments) internal returns (address created) {
        bytes memory code = bytes.concat(vm.getCode(string.concat(name, ".sol:", name)), arguments);
        assembly ("memory-safe") {
            created := create(0, add(code, 32), mload(code))
            if iszero(created) {
                returndatacopy(0, 0, returndatasize())
                revert(0, returndatasize())
            }
        }
    }

    /// @dev `_create` as a call of its own, so that its revert can be expected.
    function create(string calldata name, bytes calldata arguments) external returns (address) {
        return _create(name, arguments);
    }

    // ------------------------------------------------------------------------------------------------------------ nodes

    function _secretKey(uint256 i) internal pure returns (uint256) {
        return uint256(keccak256(abi.encode("node key", i)));
    }

    function _hot(uint256 i) internal view returns (address node) {
        node = _hotKeys[i];
        if (node == address(0)) node = vm.addr(_secretKey(i));
    }

    function _operator(uint256 i) internal pure returns (address) {
        return vm.addr(uint256(keccak256(abi.encode("operator key", i))));
    }

    /// @dev Index of a known hot key.
    function _indexOf(address node) internal view returns (uint256 i) {
        i = _indices[node];
        require(_hotKeys[i] == node, "not a known node of the swarm");
    }

    /// @dev Deriving an address from a key costs a curve multiplication: done once.
    function _know(uint256 i) internal {
        address node = vm.addr(_secretKey(i));
        _hotKeys[i] = node;
        _indices[node] = i;
    }

    function _addNode(uint256 i, uint256 stake) internal {
        _know(i);
        bytes memory proof = _nodeKeyProof(i, _operator(i), CERTIFICATE_HASH, HOST, block.timestamp);
        vm.deal(_operator(i), _operator(i).balance + stake);
        vm.prank(_operator(i));
        registry.register{value: stake}(_hot(i), CERTIFICATE_HASH, HOST, block.timestamp, proof);
    }

    /// @dev Nodes [first, first + count) with equal stake, active on return.
    function _addNodes(uint256 first, uint256 count) internal {
        for (uint256 i = first; i < first + count; i++) {
            _addNode(i, STAKE);
        }
        vm.warp(block.timestamp + registry.activationDelay());
    }

    // ------------------------------------------------------------------------------------------------------- signatures

    function _domainSeparator(string memory name, address target) internal view returns (bytes32) {
        return keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256(bytes(name)),
                keccak256("1"),
                block.chainid,
                target
            )
        );
    }

    /// @dev What requester and witness sign for another node in the place of the one that stopped.
    function _replacementDigest(RequestId id, uint16 stage, address replaced, address node)
        internal
        view
        returns (bytes32)
    {
        return _typedDigest(
            "bsns InferenceEscrow",
            address(escrow),
            keccak256(
                abi.encode(
                    keccak256("StageReplacement(bytes32 requestId,uint16 stage,address replaced,address node)"),
                    id,
                    stage,
                    replaced,
                    node
                )
            )
        );
    }

    function _requesterSigns(bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(uint256(keccak256(abi.encodePacked("requester"))), digest);
        return abi.encodePacked(r, s, v);
    }

    function _typedDigest(string memory name, address target, bytes32 structHash) internal view returns (bytes32) {
        return keccak256(abi.encodePacked(hex"1901", _domainSeparator(name, target), structHash));
    }

    function _sign(uint256 i, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(_secretKey(i), digest);
        return abi.encodePacked(r, s, v);
    }

    /// @dev The other signature that ecrecover takes for the same message: (r, n - s, v xor 1).
    function _malleated(bytes memory signature) internal pure returns (bytes memory) {
        uint256 order = 0xfffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141;
        (bytes32 r, uint256 s) = abi.decode(signature, (bytes32, uint256));
        return abi.encodePacked(r, order - s, uint8(signature[64]) == 27 ? uint8(28) : uint8(27));
    }

    function _nodeKeyDigest(
        address operator,
        address node,
        bytes32 certificate,
        string memory endpoint,
        uint256 deadline
    ) internal view returns (bytes32) {
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256(
                    "NodeKeyProof(address operator,address node,bytes32 certificateHash,string endpoint,uint256 deadline)"
                ),
                operator,
                node,
                certificate,
                keccak256(bytes(endpoint)),
                deadline
            )
        );
        return _typedDigest("bsns NodeRegistry", address(registry), structHash);
    }

    function _nodeKeyProof(uint256 i, address operator, bytes32 certificate, string memory endpoint, uint256 deadline)
        internal
        view
        returns (bytes memory)
    {
        return _sign(i, _nodeKeyDigest(operator, _hot(i), certificate, endpoint, deadline));
    }

    function _consentDigest(
        ModelId model,
        address by,
        uint64 epoch,
        uint128 fee,
        bytes32 measurements,
        bytes32 root,
        uint256 deadline
    ) internal view returns (bytes32) {
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256(
                    "PlanConsent(bytes32 modelId,address publisher,uint64 epoch,uint128 feePerToken,bytes32 measurementsHash,bytes32 planRoot,uint256 deadline)"
                ),
                model,
                by,
                epoch,
                fee,
                measurements,
                root,
                deadline
            )
        );
        return _typedDigest("bsns ShardAssignments", address(shards), structHash);
    }

    function _handOverDigest(HandOver memory statement) internal view returns (bytes32) {
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256("HandOver(bytes32 requestId,uint16 stage,bool sent,uint32 step,bytes32 chain)"),
                statement.requestId,
                statement.stage,
                statement.sent,
                statement.step,
                statement.chain
            )
        );
        return _typedDigest("bsns OutputVerification", address(verification), structHash);
    }

    function _signHandOver(uint256 i, HandOver memory statement) internal view returns (bytes memory) {
        return _sign(i, _handOverDigest(statement));
    }

    // ------------------------------------------------------------------------------------------------------ naive merkle

    function _pair(bytes32 a, bytes32 b) internal pure returns (bytes32) {
        return a < b ? keccak256(abi.encodePacked(a, b)) : keccak256(abi.encodePacked(b, a));
    }

    /// @dev Root of the leaves [0, n) by the definition: level after level, a lone node promoted.
    function _merkleRoot(bytes32[] memory level) internal pure returns (bytes32) {
        while (level.length > 1) {
            level = _parents(level);
        }
        return level[0];
    }

    function _merkleProof(bytes32[] memory level, uint256 index) internal pure returns (bytes32[] memory proof) {
        while (level.length > 1) {
            uint256 sibling = index % 2 == 0 ? index + 1 : index - 1;
            if (sibling < level.length) proof = _append(proof, level[sibling]);
            level = _parents(level);
            index /= 2;
        }
    }

    function _parents(bytes32[] memory level) private pure returns (bytes32[] memory parents) {
        parents = new bytes32[]((level.length + 1) / 2);
        for (uint256 i = 0; i < parents.length; i++) {
            parents[i] = 2 * i + 1 < level.length ? _pair(level[2 * i], level[2 * i + 1]) : level[2 * i];
        }
    }

    function _append(bytes32[] memory list, bytes32 item) private pure returns (bytes32[] memory longer) {
        longer = new bytes32[](list.length + 1);
        for (uint256 i = 0; i < list.length; i++) {
            longer[i] = list[i];
        }
        longer[list.length] = item;
    }

    function _leafOf(Assignment memory assignment) internal pure returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(assignment))));
    }

    function _leavesOf(Assignment[] memory assignments) internal pure returns (bytes32[] memory leaves) {
        leaves = new bytes32[](assignments.length);
        for (uint256 i = 0; i < leaves.length; i++) {
            leaves[i] = _leafOf(assignments[i]);
        }
    }

    // ------------------------------------------------------------------------------------------------------------ plans

    /// @dev A model of its own each time.
    function _newModel(uint32 unitCount) internal returns (ModelId) {
        return shards.registerModel(
            keccak256(abi.encode("manifest", _nextModel++)), keccak256("weights"), unitCount, "a model"
        );
    }

    /// @dev One replica per stage on the nodes [first, first + stages), two units each, weights 100, 101, ...
    function _chainOf(uint256 stages, uint256 first) internal view returns (Assignment[] memory assignments) {
        assignments = new Assignment[](stages);
        for (uint16 i = 0; i < stages; i++) {
            assignments[i] = Assignment(i, 0, 2 * i, 2 * i + 2, _hot(first + i), 100 + i, EXECUTION_CLASS);
        }
    }

    function _consents(Assignment[] memory assignments, bytes32 digest)
        internal
        view
        returns (bytes[] memory consents)
    {
        consents = new bytes[](assignments.length);
        for (uint256 i = 0; i < consents.length; i++) {
            consents[i] = _sign(_indexOf(assignments[i].node), digest);
        }
    }

    /// @dev Published by `publisher` with the consent of all, not yet in effect.
    function _publish(ModelId model, uint128 fee, Assignment[] memory assignments) internal returns (PlanId plan) {
        uint64 epoch = shards.nextEpoch(model, publisher);
        bytes32 digest = _consentDigest(
            model, publisher, epoch, fee, MEASUREMENTS, _merkleRoot(_leavesOf(assignments)), block.timestamp
        );
        bytes[] memory consents = _consents(assignments, digest);
        vm.prank(publisher);
        plan = shards.publishPlan(model, epoch, fee, MEASUREMENTS, assignments, block.timestamp, consents);
        for (uint256 i = 0; i < assignments.length; i++) {
            _leaves[plan].push(assignments[i]);
        }
    }

    /// @dev A plan in effect: `stages` stages on the nodes [0, stages).
    function _newPlan(uint256 stages) internal returns (PlanId plan) {
        plan = _publish(_newModel(uint32(2 * stages)), FEE, _chainOf(stages, 0));
        vm.warp(block.timestamp + shards.planActivationDelay());
    }

    // --------------------------------------------------------------------------------------------------------- requests

    function _open(PlanId plan) internal returns (RequestId) {
        return _openWith(plan, PROMPT_TOKENS, MAXIMUM_TOKENS, 0);
    }

    function _openWith(PlanId plan, uint32 promptTokens, uint32 maximumTokens, uint256 extra)
        internal
        returns (RequestId id)
    {
        uint256 deposit = escrow.quote(plan, promptTokens, maximumTokens) + extra;
        vm.deal(requester, requester.balance + deposit);
        vm.prank(requester);
        id = escrow.open{value: deposit}(
            plan, _nextNonce++, INPUT_COMMITMENT, keccak256(abi.encode(SECRET)), promptTokens, maximumTokens
        );
        _planOf[id] = plan;
    }

    /// @dev The first replica of each stage.
    function _routeOf(RequestId id) internal view returns (Assignment[] memory, bytes32[][] memory) {
        return _routeOver(_planOf[id], new uint16[](shards.planOf(_planOf[id]).stageCount));
    }

    /// @dev The leaves of the chosen replicas, one per stage, and their proofs.
    function _routeOver(PlanId plan, uint16[] memory replicas)
        internal
        view
        returns (Assignment[] memory route, bytes32[][] memory proofs)
    {
        Assignment[] memory all = _leaves[plan];
        bytes32[] memory leaves = _leavesOf(all);
        route = new Assignment[](replicas.length);
        proofs = new bytes32[][](replicas.length);
        for (uint256 i = 0; i < all.length; i++) {
            uint16 stage = all[i].stage;
            if (all[i].replica != replicas[stage]) continue;
            route[stage] = all[i];
            proofs[stage] = _merkleProof(leaves, i);
        }
    }

    function _route(RequestId id) internal {
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(id);
        vm.prank(publisher);
        escrow.route(id, route, proofs);
    }

    /// @dev Opened and routed over the first replica of each stage.
    function _newRequest(PlanId plan) internal returns (RequestId id) {
        id = _open(plan);
        _route(id);
    }

    // ----------------------------------------------------------------------------------------------------------- claims

    /// @dev The true evidence of a stage: what every honest node computes.
    function _truth(RequestId id, uint16 stage) internal pure returns (Claim memory) {
        bytes32 root = keccak256(abi.encode("evidence", id, stage));
        return Claim(root, keccak256(abi.encode("sketch", id, stage)), 0, ANSWER_TOKENS);
    }

    /// @dev `claim` moved by `distance` (at most 32 * 128) in the metric of the sketches.
    function _moved(Claim memory claim, uint256 distance) internal pure returns (Claim memory) {
        return Claim(claim.root, _moveSketch(claim.sketch, distance), claim.salt, claim.tokens);
    }

    function _moveSketch(bytes32 sketch, uint256 distance) internal pure returns (bytes32) {
        bytes memory moved = abi.encodePacked(sketch);
        for (uint256 i = 0; i < 32 && distance > 0; i++) {
            uint256 step = distance < 128 ? distance : 128;
            moved[i] = bytes1(uint8((uint256(uint8(moved[i])) + step) % 256));
            distance -= step;
        }
        return bytes32(moved);
    }

    function _claimKey(RequestId id, uint8 round, uint16 stage, address node) private pure returns (bytes32) {
        return keccak256(abi.encode(id, round, stage, node));
    }

    /// @dev What `node` committed, to be revealed.
    function _claimOf(RequestId id, uint8 round, uint16 stage, address node) internal view returns (Claim memory) {
        return _claims[_claimKey(id, round, stage, node)];
    }

    /// @dev Remembers the claim under a salt of its own and gives the commitment.
    function _seal(RequestId id, uint8 round, uint16 stage, address node, Claim memory claim)
        internal
        returns (bytes32)
    {
        claim.salt = keccak256(abi.encode("salt", id, round, stage, node));
        _claims[_claimKey(id, round, stage, node)] = claim;
        return _commitment(id, round, stage, node, claim);
    }

    function _commitment(RequestId id, uint8 round, uint16 stage, address node, Claim memory claim)
        internal
        view
        returns (bytes32)
    {
        bytes32 sealedSketch = verification.sealOf(claim.sketch, claim.salt);
        return verification.commitmentOf(id, round, stage, node, claim.root, sealedSketch, claim.tokens);
    }

    /// @dev The same by the letter of bsns.protocol.commitments.
    function _commitmentByTheLetter(RequestId id, uint8 round, uint16 stage, address node, Claim memory claim)
        internal
        pure
        returns (bytes32)
    {
        return keccak256(
            abi.encode(
                keccak256(
                    "StageCommitment(bytes32 requestId,uint8 round,uint16 stage,address node,bytes32 evidenceRoot,bytes32 sealedSketch,uint32 outputTokens)"
                ),
                id,
                round,
                stage,
                node,
                claim.root,
                keccak256(abi.encode(claim.sketch, claim.salt)),
                claim.tokens
            )
        );
    }

    function _executorOf(RequestId id, uint16 stage) internal view returns (address) {
        return escrow.stageOf(id, stage).node;
    }

    function _commitStage(RequestId id, uint16 stage, Claim memory claim) internal {
        address node = _executorOf(id, stage);
        bytes32 commitment = _seal(id, 0, stage, node, claim);
        vm.prank(node);
        verification.commitStage(id, stage, commitment);
    }

    /// @dev Every stage not in `except` commits the truth.
    function _commitAll(RequestId id) internal {
        uint16 stages = escrow.requestOf(id).stageCount;
        for (uint16 i = 0; i < stages; i++) {
            _commitStage(id, i, _truth(id, i));
        }
    }

    /// @dev The draw with the requester's secret, past the entropy block.
    function _draw(RequestId id) internal {
        uint256 entropyBlock = verification.verificationOf(id).entropyBlock;
        if (block.number <= entropyBlock) vm.roll(entropyBlock + 1);
        verification.drawCommittee(id, SECRET);
    }

    function _attest(RequestId id, uint16 stage, address node, Claim memory claim) internal {
        uint8 round = verification.verificationOf(id).round;
        uint16[] memory stages = new uint16[](1);
        bytes32[] memory commitments = new bytes32[](1);
        stages[0] = stage;
        commitments[0] = _seal(id, round, stage, node, claim);
        vm.prank(node);
        verification.commitAttestations(id, stages, commitments);
    }

    function _revealStage(RequestId id, uint16 stage) internal {
        address node = _executorOf(id, stage);
        Claim memory claim = _claimOf(id, 0, stage, node);
        vm.prank(node);
        verification.revealStage(id, stage, claim.root, claim.sketch, claim.tokens, claim.salt);
    }

    function _revealAttestation(RequestId id, uint16 stage, address node) internal {
        Claim memory claim = _claimOf(id, verification.verificationOf(id).round, stage, node);
        vm.prank(node);
        verification.revealAttestation(id, stage, claim.root, claim.sketch, claim.tokens, claim.salt);
    }

    function _revealAllStages(RequestId id) internal {
        uint16 stages = escrow.requestOf(id).stageCount;
        for (uint16 i = 0; i < stages; i++) {
            _revealStage(id, i);
        }
    }

    /// @dev Nodes [0, count) attest each disputed stage they are seated for: `liar` says `lie` about `lieStage`, the others the truth.
    function _attestRound(RequestId id, uint256 count, uint256 liar, uint16 lieStage, Claim memory lie) internal {
        uint16 stages = escrow.requestOf(id).stageCount;
        for (uint16 stage = 0; stage < stages; stage++) {
            for (uint256 i = 0; i < count; i++) {
                if (!verification.isSeated(id, stage, _hot(i))) continue;
                _attest(id, stage, _hot(i), i == liar && stage == lieStage ? lie : _truth(id, stage));
            }
        }
    }

    function _attestHonestly(RequestId id, uint256 count) internal {
        _attestRound(id, count, type(uint256).max, 0, _truth(id, 0));
    }

    /// @dev All members of the current round open their commitments.
    function _revealMembers(RequestId id) internal {
        Verification memory state = verification.verificationOf(id);
        for (uint16 stage = 0; stage < state.stageCount; stage++) {
            address[] memory members = verification.membersOf(id, state.round, stage);
            for (uint256 i = 0; i < members.length; i++) {
                _revealAttestation(id, stage, members[i]);
            }
        }
    }

    /// @dev Tallies every stage of the round by a medoid with quorum, or without quorum where there is none.
    function _tallyAll(RequestId id) internal {
        Verification memory state = verification.verificationOf(id);
        for (uint16 stage = 0; stage < state.stageCount; stage++) {
            bool unsampled = !state.sampled && state.round == 1;
            if (!unsampled && !verification.stageRecordOf(id, stage).disputed) continue;
            _tallyStage(id, stage, verification.membersOf(id, state.round, stage).length);
        }
    }

    function _tallyStage(RequestId id, uint16 stage, uint256 members) internal {
        for (uint256 medoid = 0; medoid <= members; medoid++) {
            try verification.tally(id, stage, medoid) {
                return;
            } catch (bytes memory reason) {
                bytes4 selector = bytes4(reason);
                bool tryNext = selector == IOutputVerification.MedoidWithoutQuorum.selector
                    || selector == IOutputVerification.MedoidNotRevealed.selector
                    || selector == IOutputVerification.MedoidOutOfRange.selector;
                if (!tryNext) {
                    assembly ("memory-safe") {
                        revert(add(reason, 32), mload(reason))
                    }
                }
            }
        }
        verification.tallyWithoutQuorum(id, stage);
    }

    /// @dev Committed truthfully by all executors, drawn.
    function _drawnRequest(PlanId plan) internal returns (RequestId id) {
        id = _newRequest(plan);
        _commitAll(id);
        _draw(id);
    }

    /// @dev Found in order by a first committee of the nodes [0, count); the challenge window runs.
    function _challengeableRequest(PlanId plan, uint256 count) internal returns (RequestId id) {
        id = _drawnRequest(plan);
        _attestHonestly(id, count);
        _endAttesting(id);
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
    }

    function _endAttesting(RequestId id) internal {
        vm.warp(uint256(verification.verificationOf(id).attestDeadline) + 1);
    }

    function _endRevealing(RequestId id) internal {
        vm.warp(uint256(verification.verificationOf(id).revealDeadline) + 1);
    }

    function _endChallenge(RequestId id) internal {
        vm.warp(uint256(verification.verificationOf(id).challengeDeadline) + 1);
    }

    // ------------------------------------------------------------------------------------------------------- assertions

    function _assertPhase(RequestId id, Phase expected) internal view {
        assertEq(uint8(verification.verificationOf(id).phase), uint8(expected), "phase");
    }

    function _assertRequest(RequestId id, RequestStatus expected) internal view {
        assertEq(uint8(escrow.requestOf(id).status), uint8(expected), "status of the request");
    }

    function _assertVerdict(RequestId id, uint16 stage, StageVerdict expected) internal view {
        assertEq(uint8(verification.stageRecordOf(id, stage).verdict), uint8(expected), "verdict of the stage");
    }
}
