"""Decoder families: cut anywhere, in any steps, each computes what transformers' own model computes."""

import dataclasses
import hashlib
import importlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bsns.protocol.manifest import ModelManifest
from bsns.protocol.model_graph import ModelGraph
from bsns.runtime.decoder_blocks import LayerBlock
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import BatchStep, ContextLimitError, ExecutionError, open_stage
from bsns.runtime.prepare import PreparationError, prepare, write_decoder
from bsns.runtime.ragged_attention import DecoderSession, RaggedBatch
from bsns.runtime.weight_store import WeightStore
from tests.unit.runtime_models import greedy, imported, silent, tiny_llama, tiny_source

VOCABULARY, LAYERS, CONTEXT = 97, 3, 48
UNITS = LAYERS + 2
CUTS = [*((0, cut, UNITS) for cut in range(1, UNITS)), tuple(range(UNITS + 1))]
PROMPT = [5, 9, 40, 1, 77, 12, 3, 96, 0, 31, 8]

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
# Each with the fields in which the family differs from the others set to something other than their defaults.
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "gpt2": (
        "gpt2",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": CONTEXT,
            "n_inner": 80, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", SIZES),
    "gpt_neox, sequential": ("gpt_neox", "GPTNeoXForCausalLM", {**SIZES, "use_parallel_residual": False}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "gemma": ("gemma", "GemmaForCausalLM", {**GROUPED, "head_dim": 12, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def whole_model(name: str, **changed: Any) -> Any:
    """transformers' model with random parameters, biases and norms included."""
    module, class_name, fields = CONFIGURATIONS[name]
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    model_class = getattr(modeling, class_name)
    torch.manual_seed(7)
    model = model_class(model_class.config_class(**{**fields, **changed})).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model


@dataclasses.dataclass(frozen=True)
class Prepared:
    model: Any
    store: WeightStore

    def stages(self, cuts: Sequence[int], **options: Any) -> list[StageExecutor]:
        return [StageExecutor(self.store, first, end, **options) for first, end in pairwise(cuts)]

    def logits(self, prompt: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([prompt])).logits[0]
        return logits


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    torch.set_num_threads(1)
    model = whole_model(request.param)
    return Prepared(model, WeightStore(prepare(tiny_source(model), tmp_path_factory.mktemp("cache"), report=silent)))


def through(stages: Sequence[StageExecutor], steps: Sequence[Sequence[int]]) -> Tensor:
    """Logits of every row of `steps` (token ids each), one session through all stages."""
    sessions = [stage.new_session(CONTEXT) for stage in stages]
    position, logits = 0, []
    for step in steps:
        values = torch.tensor(step)
        for stage, session in zip(stages, sessions, strict=True):
            values = stage.forward(session, values, position=position, logit_rows=range(len(step)))
        logits.append(values)
        position += len(step)
    return torch.cat(logits)


def in_chunks(tokens: Sequence[int], lengths: Sequence[int]) -> list[Sequence[int]]:
    taken = iter(tokens)
    return [[next(taken) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_prompt_logits_at_every_cut_equal_the_whole_model(prepared: Prepared, cuts: Sequence[int]) -> None:
    logits = through(prepared.stages(cuts), [PROMPT])
    torch.testing.assert_close(logits, prepared.logits(PROMPT), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_greedy_tokens_at_every_cut_equal_generate(prepared: Prepared, cuts: Sequence[int]) -> None:
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = prepared.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False,
            eos_token_id=None, pad_token_id=2,
        )  # fmt: skip
    answer = greedy(prepared.stages(cuts), PROMPT, 12)
    assert answer == expected[0, len(PROMPT) :].tolist()
    assert len(set(answer)) > 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[1] * 11, [4, 1, 6], [10, 1]], ids=str)
def test_prompt_in_any_steps_gives_equal_logits(prepared: Prepared, lengths: list[int], attention: str) -> None:
    stages = prepared.stages((0, 2, UNITS), attention=attention)
    logits = through(stages, in_chunks(PROMPT, lengths))
    torch.testing.assert_close(logits, prepared.logits(PROMPT), rtol=0, atol=1e-5)


def test_truncated_session_replays_and_takes_another_turn(prepared: Prepared) -> None:
    (stage,) = prepared.stages((0, UNITS))
    session = stage.new_session(CONTEXT)
    stage.forward(session, torch.tensor(PROMPT), position=0)
    session.truncate(4)
    again = stage.forward(session, torch.tensor(PROMPT[4:]), position=4)
    torch.testing.assert_close(again, prepared.logits(PROMPT)[-1:], rtol=0, atol=1e-5)
    session.truncate(4)
    other = [*PROMPT[:4], 60, 61]
    turned = stage.forward(session, torch.tensor(other[4:]), position=4)
    torch.testing.assert_close(turned, prepared.logits(other)[-1:], rtol=0, atol=1e-5)
    assert not torch.allclose(turned, again)


def test_cache_bytes_are_those_of_the_tensors(prepared: Prepared) -> None:
    (stage,) = prepared.stages((1, UNITS - 1))
    session = stage.new_session(20)
    stage.forward(session, torch.zeros(5, 32), position=0)
    assert isinstance(session, DecoderSession)
    assert session.cache_bytes_limit == session.keys.nbytes + session.values.nbytes
    assert session.cache_bytes == session.cache_bytes_limit // 4


# ------------------------------------------------------------------------------------------------------------ the costs


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages that operations make while they are alive, and the most at once."""

    def __init__(self, *ignored: Tensor) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                storage = leaf.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return output

    def _release(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


def test_peak_bytes_bound_what_one_row_really_takes(prepared: Prepared) -> None:
    manifest, rows = prepared.store.manifest, 16
    for unit in manifest.units:
        (stage,) = prepared.stages((unit.index, unit.index + 1))
        session = stage.new_session(rows)
        inputs = torch.arange(rows) if unit.index == 0 else torch.randn(rows, 32)
        assert isinstance(session, DecoderSession)
        layers = [block._module for block in stage._blocks if isinstance(block, LayerBlock)]
        weights = [parameter for layer in layers for parameter in layer.parameters()]
        with LiveBytes(inputs, session.keys, session.values, *weights) as live:
            stage.forward(session, inputs, position=0, logit_rows=range(rows))
        measured = (live.most + inputs.nbytes) / rows
        assert measured <= unit.peak_bytes <= 3 * measured, unit.name


def test_unit_costs_count_every_weight_and_only_the_experts_used(prepared: Prepared) -> None:
    manifest, config = prepared.store.manifest, prepared.model.config
    parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    tied = VOCABULARY * 32 if config.tie_word_embeddings else 0
    assert sum(unit.parameter_count for unit in manifest.units) == parameters + tied
    block = next(module for name, module in prepared.model.named_modules() if name.endswith((".layers.0", ".h.0")))
    matrices = sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 2)
    experts = sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 3)
    assert {unit.flops_per_token for unit in manifest.units if unit.kind == "block"} == {2 * (matrices + experts // 2)}
    assert manifest.units[-1].flops_per_token == 2 * VOCABULARY * 32
    assert [manifest.row_width(unit) for unit in range(UNITS + 1)] == [1, *[32] * (UNITS - 1), VOCABULARY]


def test_model_graph_of_a_decoder_is_the_chain_of_its_units(prepared: Prepared) -> None:
    manifest = prepared.store.manifest
    graph = ModelGraph.of_manifest(manifest)
    assert [operator.timing_key for operator in graph.operators] == ["embedding", *["block"] * LAYERS, "head"]
    assert [tensor.size_bytes for tensor in graph.tensors] == [4, *[4 * 32] * (UNITS - 1), 4 * VOCABULARY]
    assert [tensor.producer for tensor in graph.tensors] == list(range(-1, UNITS))
    assert {operator.cache_bytes for operator in graph.operators} == {0, manifest.kv_bytes_per_token_per_block}
    assert [operator.peak_bytes for operator in graph.operators] == [unit.peak_bytes for unit in manifest.units]


# ------------------------------------------------------------------------------------------------------------- batches


ARITHMETIC_ERROR = {"float32": 1e-5, "bfloat16": 3e-2, "int8": 1e-4}


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8"])
def test_steps_of_many_sessions_in_one_batch_equal_each_alone(prepared: Prepared, arithmetic: str) -> None:
    if arithmetic != "float32" and prepared.model.config.model_type == "mixtral":
        with pytest.raises(ExecutionError, match="mixtral models run in float32 only"):
            prepared.stages((0, UNITS), arithmetic=arithmetic)
        return
    generator = torch.Generator().manual_seed(5)
    for stage in prepared.stages((0, 2, UNITS), arithmetic=arithmetic):
        together = [stage.new_session(CONTEXT) for _ in range(5)]
        alone = [stage.new_session(CONTEXT) for _ in range(5)]
        for rows in ((7, 1, 3, 12, 1), (1, 1, 1, 1, 1), (2, 9, 1, 1, 4)):
            steps = []
            for count, session in zip(rows, together, strict=True):
                if stage.has_embedding:
                    inputs = torch.randint(0, VOCABULARY, (count,), generator=generator)
                else:
                    inputs = torch.randn(count, 32, generator=generator)
                steps.append(BatchStep(session, inputs, session.position, range(count) if count == 9 else None))
            outputs = stage.forward_batch(steps)
            for step, session, output in zip(steps, alone, outputs, strict=True):
                expected = stage.forward(session, step.inputs, position=step.position, logit_rows=step.logit_rows)
                assert isinstance(output, Tensor)
                error = (output - expected).norm() / expected.norm()
                assert error <= ARITHMETIC_ERROR[arithmetic], error
        assert [item.position for item in together] == [item.position for item in alone]


def test_members_of_a_batch_fail_alone(prepared: Prepared) -> None:
    (stage,) = prepared.stages((0, UNITS))
    sessions, other = [stage.new_session(4) for _ in range(6)], stage.new_session(4)
    good = torch.tensor([5, 6])
    outputs = stage.forward_batch([
        BatchStep(sessions[0], good, 0),
        BatchStep(sessions[1], torch.tensor([VOCABULARY]), 0),
        BatchStep(sessions[2], good, 3),
        BatchStep(sessions[3], torch.arange(5), 0),
        BatchStep(sessions[4], good, 0, [2]),
        BatchStep(sessions[5], good, 0),
    ])  # fmt: skip
    failures = [type(item) for item in outputs[1:5]]
    assert failures == [ExecutionError, ExecutionError, ContextLimitError, ExecutionError]
    assert [item.position for item in sessions] == [2, 0, 0, 0, 0, 2]
    expected = stage.forward(other, good, position=0)
    for output in (outputs[0], outputs[5]):
        assert isinstance(output, Tensor)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("arithmetic", "share"), [("bfloat16", 0.51), ("int8", 0.45)])
def test_packed_weights_take_their_share_of_memory_and_another_class(
    prepared: Prepared, arithmetic: str, share: float
) -> None:
    if prepared.model.config.model_type == "mixtral":
        return  # refused, see above
    ((plain,), (packed,)) = (prepared.stages((1, UNITS - 1), arithmetic=item) for item in ("float32", arithmetic))
    matrices = sum(unit.flops_per_token for unit in prepared.store.manifest.units[1 : UNITS - 1]) // 2
    others = plain.memory_bytes - 4 * matrices
    # For int8 a quarter, and what matrices this narrow add to that: scales, and the channels that keep 16 bits.
    assert packed.memory_bytes - others <= share * 4 * matrices
    assert packed.execution_class == f"torch-cpu/{arithmetic}/sdpa"


# -------------------------------------------------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize(("batch", "rows", "past"), [(1, 1, 20), (8, 1, 20), (8, 16, 0), (2, 4, 3)])
def test_rehearsal_runs_whole_batch_and_leaves_no_state(prepared: Prepared, batch: int, rows: int, past: int) -> None:
    for stage in prepared.stages((0, 2, UNITS)):
        block, seen = stage._blocks[0], []
        forward = block.forward

        def noted(hidden: Tensor, rotation: Any, ragged: RaggedBatch, number: int) -> Tensor:
            output: Tensor = forward(hidden, rotation, ragged, number)  # noqa: B023
            seen.append((len(hidden), [item.position for item in ragged.segments], output.sum().item()))  # noqa: B023
            return output

        block.forward = noted  # type: ignore[method-assign]
        step = stage.rehearsal(batch=batch, rows=rows, past=past)
        for _ in range(3):
            step()
        assert seen == seen[:1] * 3
        assert seen[0][:2] == (batch * rows, [past] * batch)


def test_rehearsal_outside_the_context_or_empty_is_refused(prepared: Prepared) -> None:
    (stage,) = prepared.stages((0, UNITS))
    with pytest.raises(ContextLimitError, match="48 tokens"):
        stage.rehearsal(batch=1, rows=2, past=CONTEXT - 1)
    for batch, rows, past in ((0, 1, 1), (1, 0, 1), (1, 1, -1)):
        with pytest.raises(ExecutionError, match="rehearsal"):
            stage.rehearsal(batch=batch, rows=rows, past=past)


# --------------------------------------------------------------------------------------------------------- the refusals


def refused(model: Any, folder: Path, **changed: Any) -> str:
    decoder = imported(model)
    with pytest.raises(PreparationError) as caught:
        write_decoder("tiny", dataclasses.replace(decoder, config={**decoder.config, **changed}), folder, silent)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("gemma", "use_bidirectional_attention", True),
        ("mixtral", "sliding_window", 16),
        ("llama", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("gpt_neox", "rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
    ],
)
def test_configuration_the_family_does_not_compute_is_refused_by_field(
    tmp_path: Path, name: str, field: str, value: object
) -> None:
    message = refused(whole_model(name), tmp_path, **{field: value})
    assert field in message
    assert CONFIGURATIONS[name][0] in message
    assert list(tmp_path.iterdir()) == []


def test_unknown_architecture_is_refused_with_those_there_are(tmp_path: Path) -> None:
    message = refused(tiny_llama(), tmp_path, model_type="mamba")
    assert "'mamba'" in message
    assert "['gemma', 'gpt2', 'gpt_neox', 'llama', 'mixtral', 'qwen2']" in message


@pytest.mark.parametrize(
    ("architecture", "match"), [("mamba", "'mamba' is unknown"), ("gpt2", "does not fit its manifest")]
)
def test_stage_of_manifest_with_other_architecture_is_refused(tmp_path: Path, architecture: str, match: str) -> None:
    folder = prepare(tiny_source(tiny_llama()), tmp_path, report=silent)
    store = WeightStore(folder)
    store.manifest = dataclasses.replace(store.manifest, architecture=architecture)
    with pytest.raises(ExecutionError, match=match):
        open_stage(store, 0, 2, threads=1)


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"{",
        b'{"num_hidden_layers":1099511627776}',
        b'{"num_attention_heads":0}',
        b'{"head_dim":1099511627776}',
        b'{"hidden_act":"no such activation"}',
    ],
    ids=str,
)
def test_stage_of_a_strangers_configuration_is_refused_before_anything_large_is_built(
    tmp_path: Path, data: bytes
) -> None:
    folder = prepare(tiny_source(tiny_llama()), tmp_path, report=silent)
    store = WeightStore(folder)
    if data.startswith(b'{"'):
        fields = json.loads((folder / "config.json").read_bytes()) | json.loads(data)
        data = json.dumps(fields).encode()
    (folder / "config.json").write_bytes(data)
    files = tuple(
        dataclasses.replace(file, sha256=hashlib.sha256((folder / file.name).read_bytes()).digest())
        for file in store.manifest.files
    )
    store.manifest = dataclasses.replace(store.manifest, files=files)
    with pytest.raises(ExecutionError, match=r"config\.json|configuration"):
        open_stage(store, 0, len(store.manifest.units), threads=1)


def test_tensors_that_do_not_fit_the_family_are_refused_by_name(tmp_path: Path) -> None:
    decoder = imported(tiny_llama())
    surplus = {**decoder.tensors, "lm_head.bias": torch.zeros(97)}
    missing = {name: tensor for name, tensor in decoder.tensors.items() if name != "model.embed_tokens.weight"}
    half = {name: tensor.half() for name, tensor in decoder.tensors.items()}
    for tensors, match in ((surplus, "lm_head.bias"), (missing, "model.embed_tokens.weight"), (half, "float16")):
        with pytest.raises(PreparationError, match=match):
            write_decoder("tiny", dataclasses.replace(decoder, tensors=tensors), tmp_path, silent)


def test_field_of_a_later_release_does_not_change_the_manifest(tmp_path: Path) -> None:
    decoder = imported(tiny_llama())
    later = dataclasses.replace(decoder, config={**decoder.config, "transformers_version": "9.9", "new_field": 1})

    def written(number: int) -> ModelManifest:
        folder = tmp_path / str(number)
        folder.mkdir()
        return write_decoder("tiny", (decoder, later)[number], folder, silent)

    assert written(0) == written(1)


def test_open_stage_gives_the_executor_of_the_decoder(tmp_path: Path) -> None:
    store = WeightStore(prepare(tiny_source(tiny_llama()), tmp_path, report=silent))
    progress: list[tuple[int, int]] = []
    stage = open_stage(store, 1, 3, threads=1, progress=lambda done, total: progress.append((done, total)))
    assert isinstance(stage, StageExecutor)
    assert (stage.first_unit, stage.end_unit) == (1, 3)
    assert progress[-1][0] == progress[-1][1] == sum(unit.size_bytes for unit in store.manifest.units[1:3])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
