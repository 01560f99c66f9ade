"""The blocks of a decoder as the executor runs them: over the rows of many sessions at once.

Owns the two ways to run a block. `RotaryBlock` is written for speed and covers the families that are built like Llama:
one product for queries, keys and values, one for the two halves of the feed-forward part, rotation as one complex
product. `LayerBlock` runs transformers' own layer of any other family, with its matrices exchanged for packed ones
where the declared arithmetic is not float32. Promises outputs equal up to float noise whichever runs. Does not keep
sessions, read files or choose the arithmetic.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from bsns.runtime.ragged_attention import RaggedBatch
from bsns.runtime.weight_formats import PackedLinear, checked_row_kernels, pack

ATTENTION_NAME: Final = "bsns-ragged"
Rotation = tuple[Tensor, Tensor]


class Block(Protocol):
    """One block of a stage; `number` is its place in the stage's caches."""

    memory_bytes: int

    def forward(self, hidden: Tensor, rotation: Any, batch: RaggedBatch, number: int) -> Tensor:
        """`hidden` float32 [rows, width] of all steps of `batch`; the same shape back."""
        ...


class RotaryBlock:
    """A pre-norm block with rotary positions, grouped queries and a gated feed-forward part.

    `tensors` are those of transformers' layer by name. `offset` is added to the norms' weights (Gemma: 1).
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        *,
        heads: int,
        key_heads: int,
        head_width: int,
        epsilon: float,
        activation: Callable[[Tensor], Tensor],
        norm_offset: float,
        arithmetic: str,
    ) -> None:
        self._heads, self._key_heads, self._width = heads, key_heads, head_width
        self._epsilon, self._activation = epsilon, activation
        self._norms = [
            tensors.pop(f"{name}.weight") + norm_offset for name in ("input_layernorm", "post_attention_layernorm")
        ]

        # torch composes the norm of five operators: at a few rows most of their time is in starting them.
        self._kernels = checked_row_kernels() if self._norms[0].device.type == "cpu" else None

        def taken(*names: str, rotated: int = 0) -> PackedLinear:
            """The matrices of `names` as one; the first `rotated` of them with their pairs side by side."""
            pieces: dict[str, list[Tensor | None]] = {"weight": [], "bias": []}
            for place, name in enumerate(names):
                for kind, found in pieces.items():
                    tensor = tensors.pop(f"{name}.{kind}", None)
                    if tensor is not None and place < rotated:
                        tensor = _paired(tensor, head_width)
                    found.append(tensor)
            biases = pieces["bias"]
            # Copied, be it one: a tensor of the file that stays in use keeps all its pages in memory beside the copies.
            return pack(
                torch.cat([item for item in pieces["weight"] if item is not None]),
                None if biases[0] is None else torch.cat([item for item in biases if item is not None]),
                arithmetic,
            )

        attention, feed = "self_attn", "mlp"
        self._queries_keys_values = taken(*(f"{attention}.{name}_proj" for name in "qkv"), rotated=2)
        self._output = taken(f"{attention}.o_proj")
        self._gate_up = taken(f"{feed}.gate_proj", f"{feed}.up_proj")
        self._down = taken(f"{feed}.down_proj")
        self.memory_bytes = sum(norm.nbytes for norm in self._norms) + sum(
            item.memory_bytes for item in (self._queries_keys_values, self._output, self._gate_up, self._down)
        )

    def forward(self, hidden: Tensor, rotation: Tensor, batch: RaggedBatch, number: int) -> Tensor:
        """`rotation`: complex64 [rows, 1, head width / 2]."""
        hidden = hidden + self._attention(self._normed(hidden, 0), rotation, batch, number)
        return hidden + self._feed_forward(self._normed(hidden, 1))

    def _attention(self, normed: Tensor, rotation: Tensor, batch: RaggedBatch, number: int) -> Tensor:
        rows, heads, turning, width = normed.shape[0], self._heads, self._heads + self._key_heads, self._width
        together = self._queries_keys_values(normed).view(rows, turning + self._key_heads, width)
        pairs = together.view(rows, -1, width // 2, 2)[:, :turning]
        torch.view_as_complex(pairs).mul_(rotation)
        seen = batch.attend(number, together[:, :heads], together[:, heads:turning], together[:, turning:], width**-0.5)
        return self._output(seen.reshape(rows, heads * width))

    def _feed_forward(self, normed: Tensor) -> Tensor:
        gate, up = self._gate_up(normed).chunk(2, dim=1)
        return self._down(self._activation(gate).mul_(up))

    def _normed(self, hidden: Tensor, which: int) -> Tensor:
        if self._kernels is not None:
            return self._kernels.rms_norm(hidden, self._norms[which], self._epsilon)
        return nn.functional.rms_norm(hidden, hidden.shape[1:], self._norms[which], self._epsilon)


class LayerBlock:
    """transformers' own layer. `module` must have been built with `ATTENTION_NAME` as its attention."""

    def __init__(self, module: nn.Module, cache_argument: str, arithmetic: str) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, RaggedBatch.transformers_attention)
        self._module, self._cache_argument = module, cache_argument
        if arithmetic != "float32":
            _pack_matrices(module, arithmetic)
        packed = [item.packed.memory_bytes for item in module.modules() if isinstance(item, _PackedModule)]
        self.memory_bytes = sum(packed) + sum(parameter.nbytes for parameter in module.parameters())

    def forward(self, hidden: Tensor, rotation: Rotation | None, batch: RaggedBatch, number: int) -> Tensor:
        """`rotation`: cosine and sine [1, rows, width], or None where positions are learned."""
        del number  # the layer was built with it
        arguments: dict[str, Any] = {"attention_mask": None, self._cache_argument: batch}
        if rotation is not None:
            arguments["position_embeddings"] = rotation
        output: Tensor = self._module(hidden[None], use_cache=True, **arguments)[0]
        return output


class _PackedModule(nn.Module):
    """Takes the place of a matrix in a layer of transformers."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, values: Tensor) -> Tensor:
        return self.packed(values.reshape(-1, values.shape[-1])).view(*values.shape[:-1], -1)


def _pack_matrices(module: nn.Module, arithmetic: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _PackedModule(pack(child.weight, child.bias, arithmetic)))
        elif type(child).__name__ == "Conv1D":  # GPT-2's linear map, its weight transposed
            weight: Tensor = child.weight.t().contiguous()  # type: ignore[operator]
            setattr(module, name, _PackedModule(pack(weight, child.bias, arithmetic)))  # type: ignore[arg-type]
        else:
            _pack_matrices(child, arithmetic)


def _paired(tensor: Tensor, head_width: int) -> Tensor:
    """Rows of each head reordered from halves (x_i, x_{i+w/2} rotate together) to neighbours, so that a rotation is a
    product of complex numbers. Queries and keys are reordered alike: their products stay what they are.
    """
    halves = tensor.view(-1, 2, head_width // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
