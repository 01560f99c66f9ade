"""The Hugging Face decoders that can be cut into units, and what differs between them.

Owns `DecoderFamily`: of which tensors each unit consists, which fields of a configuration decide what is computed, and
which of transformers' modules compute it. Promises that a configuration which asks for something the executor does not
do is refused by the name of its field, and that what is kept of a configuration does not depend on the release of
transformers. Does not read or write files and does not run anything; `bsns.runtime.prepare` and
`bsns.runtime.executor` do, the same way for every family.

transformers is imported only when a method needs it, and of it only the modules of the one family.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from bsns.protocol.manifest import UnitKind

# Rotary frequencies of the other kinds ("dynamic", "longrope") depend on how many tokens one call sees.
_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
EMBEDDING_WEIGHT: Final = "weight"
POSITION_TABLE: Final = "positions.weight"
HEAD_WEIGHT: Final = "lm_head.weight"
NORM_PREFIX: Final = "norm."
"""Names of tensors in the files of the embedding unit and the head unit; a block's are those of transformers' layer."""


class UnsupportedDecoderError(ValueError):
    """A decoder cannot be cut or run. The message names the architecture, the configuration's field or the tensor."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of one decoder. `key_heads`: heads of the keys and as many of the values, each `head_width` wide.
    `feed_forward_values`: values for each row that are alive at once inside a block's feed-forward part.
    """

    blocks: int
    hidden: int
    vocabulary: int
    context_limit: int
    query_heads: int
    key_heads: int
    head_width: int
    feed_forward_values: int

    def peak_values(self, kind: UnitKind) -> int:
        """An upper bound of the values that one row needs while a unit runs: its input, its output and the most that is
        alive between them. The KV cache and the attention scores, which grow with the context, are not in it.
        """
        match kind:
            case "embedding":
                # A token id and a position have the size of two values; then the row, the position's and their sum.
                return 4 + 3 * self.hidden
            case "block":
                # Position, sine and cosine; residual streams and norms; then either queries, keys and values, rotated
                # and not, or the feed-forward part.
                rotation = 2 + 2 * self.head_width
                attention = 2 * (self.query_heads + self.key_heads) * self.head_width
                return rotation + 5 * self.hidden + max(attention, self.feed_forward_values)
            case "head":
                return 4 * self.hidden + self.vocabulary
            case _:
                raise UnsupportedDecoderError(f"a decoder has no unit of kind {kind!r}")


@dataclass(frozen=True, slots=True)
class RotaryBlockStyle:
    """A family's blocks are those of `bsns.runtime.decoder_blocks.RotaryBlock`, with the tensor names of Llama.
    `norm_offset` is added to the weights of their norms.
    """

    norm_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class DecoderFamily:
    """One architecture of transformers, by its `model_type`.

    `config_fields`: those that decide what is computed. `without`: fields that must be absent, null or false, because
    this release does not compute what they ask for. `embedding`, `positions` (a learned table, else None), `block`
    ({} stands for the number) and `norm`: where a model's tensors are; a block's and a norm's are prefixes.
    `feed_forward_values`: see `DecoderShape`. `embedding_scale`: what embedded rows are multiplied with. `experts`: the
    fields that say how many of a block's experts a row goes through, and of how many. `rotary_block`: None where
    transformers' own layer runs.
    """

    model_type: str
    class_prefix: str
    config_fields: tuple[str, ...]
    feed_forward_values: Callable[[Any], int]
    without: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens.weight"
    positions: str | None = None
    block: str = "model.layers.{}."
    norm: str = "model.norm."
    layer_class: str = "DecoderLayer"
    layer_norm_eps: str | None = None
    embedding_scale: Callable[[Any], float] | None = None
    experts: tuple[str, str] | None = None
    cache_argument: str = "past_key_values"
    rotary_block: RotaryBlockStyle | None = None

    def kept_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a configuration (as transformers' `to_dict()` gives it) that decide what is computed; all
        others are left out. Raises `UnsupportedDecoderError` where one asks for what this release does not do.
        """
        for field in self.without:
            if config.get(field):
                raise UnsupportedDecoderError(
                    f"the {self.model_type} configuration has {field} = {config[field]!r}; this release runs "
                    f"{self.model_type} models only without it"
                )
        unknown = set(config.get("layer_types") or ()) - {"full_attention"}
        if unknown:
            raise UnsupportedDecoderError(
                f"the {self.model_type} configuration has layer_types {sorted(unknown)}; only 'full_attention' runs"
            )
        rope_type = (config.get("rope_parameters") or {}).get("rope_type", _ROPE_TYPES[0])
        if rope_type not in _ROPE_TYPES:
            raise UnsupportedDecoderError(
                f"the {self.model_type} configuration has rope_parameters.rope_type = {rope_type!r}, whose rotation "
                f"depends on the length of a step; only {list(_ROPE_TYPES)} run"
            )
        return {field: config[field] for field in self.config_fields if config.get(field) is not None}

    def configuration(self, fields: Mapping[str, Any], attention: str = "sdpa") -> Any:
        """transformers' configuration object for `kept_fields`, with an attention kernel."""
        name = f"transformers.models.{self.model_type}.configuration_{self.model_type}"
        config = getattr(importlib.import_module(name), f"{self.class_prefix}Config")(**self.kept_fields(fields))
        config._attn_implementation = attention
        # The plain loop over experts; the grouped kernels differ between machines.
        config._experts_implementation = "eager"
        return config

    def shape(self, config: Any) -> DecoderShape:
        """Sizes of the decoder that `config` (from `configuration`) describes."""
        heads = config.num_attention_heads
        return DecoderShape(
            blocks=config.num_hidden_layers,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            context_limit=config.max_position_embeddings,
            query_heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            feed_forward_values=self.feed_forward_values(config),
        )

    def units(self, tensors: Mapping[str, Any], blocks: int) -> Iterator[tuple[str, UnitKind, dict[str, Any]]]:
        """Name, kind and tensors of each unit in order. A head tied to the embedding is in both units, so that the last
        stage does not need the first. Raises `UnsupportedDecoderError` for a tensor that is absent or has no place.
        """
        left = dict(tensors)

        def take(name: str) -> Any:
            try:
                return left.pop(name)
            except KeyError:
                raise UnsupportedDecoderError(f"the {self.model_type} model has no tensor {name!r}") from None

        def take_all(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): left.pop(name) for name in sorted(left) if name.startswith(prefix)}

        embedding = {EMBEDDING_WEIGHT: take(self.embedding)}
        if self.positions is not None:
            embedding[POSITION_TABLE] = take(self.positions)
        head = {HEAD_WEIGHT: left.pop(HEAD_WEIGHT, embedding[EMBEDDING_WEIGHT])}
        head |= {f"{NORM_PREFIX}{name}": tensor for name, tensor in take_all(self.norm).items()}
        numbered = [take_all(self.block.format(number)) for number in range(blocks)]
        if left:
            raise UnsupportedDecoderError(
                f"the {self.model_type} model has tensors that belong to no unit: {sorted(left)[:3]}"
            )
        yield "embedding", "embedding", embedding
        for number, block in enumerate(numbered):
            yield f"block-{number}", "block", block
        yield "head", "head", head

    def flops(self, kind: UnitKind, tensors: Mapping[str, Any], config: Any) -> int:
        """Two operations for each weight of the matrix products that one row goes through."""
        if kind == "embedding":
            return 0
        matrices: int = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 2)
        experts: int = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 3)
        if self.experts is not None:
            chosen, among = (int(getattr(config, field)) for field in self.experts)
            experts = experts * chosen // among
        return 2 * (matrices + experts)

    def layer(self, config: Any, number: int) -> Any:
        """transformers' decoder layer; `number` is its place in the KV cache."""
        return getattr(self._modeling(), f"{self.class_prefix}{self.layer_class}")(config, layer_idx=number)

    def final_norm(self, config: Any) -> Any:
        """The norm before the language-model head."""
        if self.layer_norm_eps is not None:
            from torch import nn

            return nn.LayerNorm(config.hidden_size, eps=getattr(config, self.layer_norm_eps))
        return getattr(self._modeling(), f"{self.class_prefix}RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)

    def rotary(self, config: Any) -> Any | None:
        """The rotary embedding, or None where positions are learned and added to the embedded rows."""
        if self.positions is not None:
            return None
        return getattr(self._modeling(), f"{self.class_prefix}RotaryEmbedding")(config)

    def _modeling(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")


def decoder_family(model_type: str) -> DecoderFamily:
    """The family by transformers' `model_type`; `UnsupportedDecoderError` lists those there are."""
    try:
        return _FAMILIES[model_type]
    except KeyError:
        raise UnsupportedDecoderError(
            f"decoder architecture {model_type!r} is unknown; this release runs {sorted(_FAMILIES)}"
        ) from None


def _gated(config: Any) -> int:
    # Gate, its activation times the other projection, and the product.
    return int(3 * config.intermediate_size)


_COMMON_FIELDS: Final = ("bos_token_id", "eos_token_id", "model_type", "tie_word_embeddings", "vocab_size")
_LLAMA_FIELDS: Final = (
    *_COMMON_FIELDS, "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
)  # fmt: skip

_FAMILIES: Final = {
    family.model_type: family
    for family in (
        DecoderFamily(
            model_type="llama",
            class_prefix="Llama",
            config_fields=(*_LLAMA_FIELDS, "attention_bias", "mlp_bias"),
            feed_forward_values=_gated,
            rotary_block=RotaryBlockStyle(),
        ),
        DecoderFamily(
            model_type="gpt2",
            class_prefix="GPT2",
            config_fields=(
                *_COMMON_FIELDS, "activation_function", "layer_norm_epsilon", "n_embd", "n_head", "n_inner", "n_layer",
                "n_positions", "scale_attn_weights",
            ),
            # A scale by the layer's number would need the number within the model, not within the stage.
            without=("add_cross_attention", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"),
            # gelu_new is written as a formula, with four intermediates.
            feed_forward_values=lambda config: 4 * (config.n_inner or 4 * config.n_embd),
            embedding="transformer.wte.weight",
            positions="transformer.wpe.weight",
            block="transformer.h.{}.",
            norm="transformer.ln_f.",
            layer_class="Block",
            layer_norm_eps="layer_norm_epsilon",
        ),
        DecoderFamily(
            model_type="gpt_neox",
            class_prefix="GPTNeoX",
            config_fields=(
                *_COMMON_FIELDS, "attention_bias", "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps",
                "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "rope_parameters",
                "use_parallel_residual",
            ),
            feed_forward_values=lambda config: 2 * config.intermediate_size,
            embedding="gpt_neox.embed_in.weight",
            block="gpt_neox.layers.{}.",
            norm="gpt_neox.final_layer_norm.",
            layer_class="Layer",
            layer_norm_eps="layer_norm_eps",
            cache_argument="layer_past",
        ),
        DecoderFamily(
            model_type="qwen2",
            class_prefix="Qwen2",
            config_fields=_LLAMA_FIELDS,
            without=("use_sliding_window",),
            feed_forward_values=_gated,
            rotary_block=RotaryBlockStyle(),
        ),
        DecoderFamily(
            model_type="gemma",
            class_prefix="Gemma",
            config_fields=(*_LLAMA_FIELDS, "attention_bias"),
            without=("use_bidirectional_attention",),
            feed_forward_values=_gated,
            embedding_scale=lambda config: config.hidden_size**0.5,
            rotary_block=RotaryBlockStyle(norm_offset=1.0),
        ),
        DecoderFamily(
            model_type="mixtral",
            class_prefix="Mixtral",
            config_fields=(*_LLAMA_FIELDS, "num_experts_per_tok", "num_local_experts"),
            without=("sliding_window",),
            # One expert at a time: gate and up in one, activation, product; the rows chosen for it and their sum.
            feed_forward_values=lambda config: 4 * config.intermediate_size + 3 * config.hidden_size,
            experts=("num_experts_per_tok", "num_local_experts"),
        ),
    )
}  # fmt: skip
