"""A tiny random Llama with a real tokenizer format, for tests that must not wait for the embedded model."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from bsns.protocol.manifest import ModelManifest
from bsns.runtime.executor import ShardExecutor
from bsns.runtime.prepare import ImportedDecoder, ModelSource, Report, decoder_source, prepare
from bsns.runtime.weight_store import WeightStore

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def tiny_llama(*, tied: bool = False, layers: int = 4, seed: int = 0) -> Any:
    """LlamaForCausalLM with random weights, grouped-query attention, context of 64."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def imported(model: Any) -> ImportedDecoder:
    """`model` (any of transformers' decoders) with a tokenizer of three words."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return ImportedDecoder(model.config.to_dict(), model.state_dict(), tokenizer.to_str(), TEMPLATE)


def tiny_source(model: Any, name: str = "tiny") -> ModelSource:
    """A model source that imports `model`; counts its imports in `source.write.calls`."""
    source = decoder_source(name, lambda: imported(model))

    def write(name: str, folder: Path, report: Report) -> ModelManifest:
        write.calls += 1  # type: ignore[attr-defined]
        return source.write(name, folder, report)

    write.calls = 0  # type: ignore[attr-defined]
    return dataclasses.replace(source, write=write)


def silent(_: str) -> None:
    """A report that says nothing."""


def flip_byte(path: Path, offset: int = -1) -> None:
    """Damages one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def greedy(pipeline: Sequence[ShardExecutor], prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy decoding through a pipeline of stages."""
    sessions = [stage.new_session(len(prompt) + tokens) for stage in pipeline]
    values, position, answer = torch.tensor(prompt), 0, []
    for _ in range(tokens):
        rows = values.shape[0]
        for stage, session in zip(pipeline, sessions, strict=True):
            values = stage.forward(session, values, position=position)
        position += rows
        answer.append(int(values[-1].argmax()))
        values = torch.tensor(answer[-1:])
    return answer


def prepared_tiny_model(cache: Path, *, layers: int = 4) -> Path:
    """Folder of a prepared tiny model under `cache`, as a network serves it."""
    return prepare(tiny_source(tiny_llama(layers=layers)), cache, report=silent)


def embedded_reference(folder: Path) -> Any:
    """transformers' own model over the tensors of a prepared folder: what one process would answer."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    store = WeightStore(folder)
    config = LlamaConfig(**json.loads(store.read_file("config.json")), attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": store.load_unit(0)["weight"]}
    for unit in store.manifest.units[1:-1]:
        state |= {
            f"model.layers.{unit.index - 1}.{name}": tensor for name, tensor in store.load_unit(unit.index).items()
        }
    head = store.load_unit(len(store.manifest.units) - 1)
    state |= {"model.norm.weight": head["norm.weight"], "lm_head.weight": head["lm_head.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()
