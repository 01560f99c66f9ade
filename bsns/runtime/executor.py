"""Execution of a contiguous range of shard units: one stage of the pipeline.

Owns `open_stage`, which gives the executor that fits the model, the executor of decoders (transformers' own layers over
mapped weights), the sessions' KV caches and the teacher-forced re-execution that a committee does. Promises: equal
inputs at equal positions give outputs equal up to float noise however they are cut into steps; positions are
contiguous; nothing outside the context limit runs; a step that failed leaves its session as before. Does not sample,
sketch or speak to the network, and does not lock: one thread at a time may use a session.

What differs between decoders is in `bsns.runtime.decoder_families`; captured programs run in
`bsns.runtime.program_executor`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from bsns.protocol.bounded_json import parse_json
from bsns.protocol.manifest import EXPORTED, VALUE_BYTES, ModelManifest
from bsns.runtime.decoder_families import (
    EMBEDDING_WEIGHT,
    HEAD_WEIGHT,
    NORM_PREFIX,
    POSITION_TABLE,
    DecoderFamily,
    DecoderShape,
    UnsupportedDecoderError,
    decoder_family,
)
from bsns.runtime.weight_store import CONFIG_FILE, WeightStore

# Rows of one forward in a re-execution: enough to fill the matrix kernels, small enough that logits and activations
# stay in the cache.
REEXECUTION_ROWS: Final = 256
_ATTENTIONS: Final = ("sdpa", "eager")


class ExecutionError(ValueError):
    """A stage cannot be built or a step cannot run as asked. The message says what was expected."""


class ContextLimitError(ExecutionError):
    """A step would exceed the tokens reserved for its session. End the session, or open one with a larger limit."""


class StageSession(Protocol):
    """The state that one stage keeps for one request."""

    @property
    def position(self) -> int:
        """Tokens seen so far; the position of the next row."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes that the KV cache holds now."""
        ...

    @property
    def cache_bytes_limit(self) -> int:
        """Bytes of KV cache at the session's token limit: what a node sets aside."""
        ...

    def truncate(self, position: int) -> None:
        """Forgets every row from `position` on, so that a step can be repeated."""
        ...


class ShardExecutor(Protocol):
    """Runs the units [first_unit, end_unit) of one model."""

    @property
    def manifest(self) -> ModelManifest: ...
    @property
    def first_unit(self) -> int: ...
    @property
    def end_unit(self) -> int: ...
    @property
    def execution_class(self) -> str:
        """Device, arithmetic and attention kernel, such as `torch-cpu/float32/sdpa`; tolerances are measured per
        class.
        """
        ...

    def new_session(self, max_tokens: int) -> StageSession: ...

    def forward(
        self, session: StageSession, inputs: Tensor, *, position: int, logit_rows: Sequence[int] | None = None
    ) -> Tensor: ...

    def rehearsal(self, *, batch: int, rows: int, past: int) -> Callable[[], None]:
        """One step on random input, for profiling: `batch` sessions at once, `rows` new rows each, with `past` rows
        already in each cache. Each call does the same work and leaves no state behind.
        """
        ...


def open_stage(
    store: WeightStore,
    first_unit: int,
    end_unit: int,
    *,
    threads: int,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ShardExecutor:
    """The executor of the units [first_unit, end_unit), of the kind that the model needs.

    `progress` is called with (bytes done, bytes in all) while weights are checked. Raises `WeightMismatchError` for a
    wrong file, `ExecutionError` for a range or a model that cannot run.
    """
    if store.manifest.architecture == EXPORTED:
        from bsns.runtime.program_executor import ProgramExecutor

        return ProgramExecutor(store, first_unit, end_unit, threads=threads, device=device, progress=progress)
    return StageExecutor(store, first_unit, end_unit, threads=threads, device=device, progress=progress)


class _DecoderSession:
    """KV cache of the stage's blocks, numbered from 0 within the stage, for a batch of one."""

    def __init__(self, block_count: int, kv_bytes_per_token: int, max_tokens: int) -> None:
        from transformers.cache_utils import DynamicCache

        self.cache = DynamicCache()
        self.max_tokens = max_tokens
        self._block_count = block_count
        self._kv_bytes_per_token = kv_bytes_per_token
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def cache_bytes(self) -> int:
        return self._position * self._kv_bytes_per_token

    @property
    def cache_bytes_limit(self) -> int:
        return self.max_tokens * self._kv_bytes_per_token

    def advance(self, rows: int) -> None:
        self._position += rows

    def truncate(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise ExecutionError(f"cannot go back to position {position}: the session holds {self._position} tokens")
        self._position = position
        self.discard_uncounted_rows()

    def discard_uncounted_rows(self) -> None:
        """Cuts every layer to the counted position: after `truncate`, and after a forward that failed half way."""
        _crop(self.cache, self._position)


def _crop(cache: Any, rows: int) -> None:
    # Set directly: what `DynamicCache.crop` takes has changed its meaning between releases of transformers 5.
    for layer in cache.layers:
        if layer.is_initialized and layer.keys.shape[-2] > rows:
            layer.keys = layer.keys[..., :rows, :]
            layer.values = layer.values[..., :rows, :]


class StageExecutor:
    """`ShardExecutor` for Hugging Face decoders.

    Weights are mapped, not copied, on a CPU (several executors on one machine share pages). `threads` bounds torch's
    threads in a forward; it is set for the calling thread in each call, since OpenMP keeps it per thread. `attention`
    other than "sdpa" is another execution class. Raises `WeightMismatchError` for a wrong file, `ExecutionError` for a
    range or architecture it cannot run.
    """

    def __init__(
        self,
        store: WeightStore,
        first_unit: int,
        end_unit: int,
        *,
        threads: int = 1,
        device: str = "cpu",
        attention: str = "sdpa",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        manifest = store.manifest
        if not 0 <= first_unit < end_unit <= len(manifest.units):
            raise ExecutionError(f"units [{first_unit}, {end_unit}) are not a range within 0 to {len(manifest.units)}")
        if threads < 1:
            raise ExecutionError(f"threads is {threads}, expected at least 1")
        if attention not in _ATTENTIONS:
            raise ExecutionError(f"attention is {attention!r}, expected one of {_ATTENTIONS}")
        if manifest.dtype != "float32":
            raise ExecutionError(f"the model declares {manifest.dtype}; this executor computes float32 only")
        try:
            family = decoder_family(manifest.architecture)
        except UnsupportedDecoderError as error:
            raise ExecutionError(str(error)) from error
        config, self._shape = _configuration(family, manifest, store.read_file(CONFIG_FILE), attention)
        self._manifest, self._first_unit, self._end_unit = manifest, first_unit, end_unit
        self._threads, self._device, self._attention = threads, torch.device(device), attention
        if self._device.type == "cuda":
            # TF32 keeps ten bits of the mantissa: it is not the declared arithmetic.
            torch.backends.cuda.matmul.allow_tf32 = False
        self._cache_argument = family.cache_argument
        self._embedding_scale = None if family.embedding_scale is None else family.embedding_scale(config)
        self._embedding: Tensor | None = None
        self._positions: Tensor | None = None
        self._blocks: list[nn.Module] = []
        self._norm: nn.Module | None = None
        self._head: Tensor | None = None
        self._rotary: nn.Module | None = None
        done, total = 0, sum(unit.size_bytes for unit in manifest.units[first_unit:end_unit])
        for unit in manifest.units[first_unit:end_unit]:
            tensors = {name: tensor.to(self._device) for name, tensor in store.load_unit(unit.index).items()}
            match unit.kind:
                case "embedding":
                    self._embedding = _taken(tensors, EMBEDDING_WEIGHT, unit.name)
                    self._positions = _taken(tensors, POSITION_TABLE, unit.name) if family.positions else None
                case "block":
                    block = _built(lambda: family.layer(config, len(self._blocks)), unit.name)
                    self._blocks.append(_with_weights(block, tensors, unit.name))
                case "head":
                    self._head = _taken(tensors, HEAD_WEIGHT, unit.name)
                    norm = _built(lambda: family.final_norm(config), unit.name)
                    weights = {name.removeprefix(NORM_PREFIX): tensor for name, tensor in tensors.items()}
                    self._norm = _with_weights(norm, weights, unit.name)
            done += unit.size_bytes
            if progress is not None:
                progress(done, total)
        if self._blocks:
            # After the weights have shown that the configured widths are real.
            rotary = _built(lambda: family.rotary(config), "rotary embedding", "cpu")
            self._rotary = None if rotary is None else rotary.to(self._device)

    @property
    def manifest(self) -> ModelManifest:
        """The manifest of the model whose units run here."""
        return self._manifest

    @property
    def first_unit(self) -> int:
        """Index of the first unit of the stage."""
        return self._first_unit

    @property
    def end_unit(self) -> int:
        """Index after the last unit of the stage."""
        return self._end_unit

    @property
    def execution_class(self) -> str:
        """`torch-<device>/<dtype>/<attention kernel>`."""
        return f"torch-{self._device.type}/{self._manifest.dtype}/{self._attention}"

    @property
    def has_embedding(self) -> bool:
        """Whether inputs are token ids."""
        return self._embedding is not None

    @property
    def has_head(self) -> bool:
        """Whether outputs are logits."""
        return self._head is not None

    @property
    def output_width(self) -> int:
        """Row length of the outputs: the vocabulary with the head, else the hidden size."""
        return self._manifest.row_width(self._end_unit)

    def new_session(self, max_tokens: int) -> StageSession:
        """A session for at most `max_tokens` tokens (prompt and answer). Raises `ContextLimitError` beyond the model's
        context.
        """
        if not 1 <= max_tokens <= self._manifest.context_limit:
            raise ContextLimitError(
                f"a session of {max_tokens} tokens was asked for; the model's "
                f"context holds 1 to {self._manifest.context_limit}"
            )
        per_token = len(self._blocks) * self._manifest.kv_bytes_per_token_per_block
        return _DecoderSession(len(self._blocks), per_token, max_tokens)

    def forward(
        self, session: StageSession, inputs: Tensor, *, position: int, logit_rows: Sequence[int] | None = None
    ) -> Tensor:
        """Runs one step and advances the session by its rows.

        `inputs`: int64 [n] token ids where the stage has the embedding, else float32 [n, hidden]. `position`: of the
        first row; must be the session's. Returns float32 [n, hidden], or with the head logits float32 [rows,
        vocabulary] for `logit_rows` (indices into the n rows; default the last). Raises `ExecutionError` and
        `ContextLimitError`; the session is then as before.
        """
        if not isinstance(session, _DecoderSession):
            raise ExecutionError("the session belongs to another kind of executor; open one with new_session()")
        rows = self._checked_rows(session, inputs, position)
        chosen = [rows - 1] if logit_rows is None else list(logit_rows)
        if self.has_head and not all(0 <= row < rows for row in chosen):
            raise ExecutionError(f"logit_rows {chosen} are not all within the step's {rows} rows")
        self._use_threads()
        try:
            with torch.inference_mode():
                output = self._run(session.cache, inputs.to(self._device)[None], position, chosen)[0]
        except BaseException:
            session.discard_uncounted_rows()
            raise
        session.advance(rows)
        return output

    def _checked_rows(self, session: _DecoderSession, inputs: Tensor, position: int) -> int:
        hidden, vocabulary = self._manifest.row_width(self._first_unit), self._manifest.vocabulary_size
        if self.has_embedding:
            if inputs.dtype != torch.int64 or inputs.ndim != 1:
                raise ExecutionError(f"the stage takes token ids int64 [n], got {inputs.dtype} {list(inputs.shape)}")
            if inputs.numel() and not (int(inputs.min()) >= 0 and int(inputs.max()) < vocabulary):
                raise ExecutionError(f"a token id lies outside the vocabulary of {vocabulary}")
        elif inputs.dtype != torch.float32 or inputs.ndim != 2 or inputs.shape[1] != hidden:
            raise ExecutionError(f"the stage takes float32 [n, {hidden}], got {inputs.dtype} {list(inputs.shape)}")
        rows = inputs.shape[0]
        if rows < 1:
            raise ExecutionError("a step has at least one row")
        if position != session.position:
            raise ExecutionError(
                f"the step starts at position {position}, the session is at {session.position}; "
                "send the missing steps first, or truncate() to repeat one"
            )
        if position + rows > session.max_tokens:
            raise ContextLimitError(
                f"{rows} rows from position {position} exceed the {session.max_tokens} tokens reserved for the session"
            )
        return rows

    def rehearsal(self, *, batch: int, rows: int, past: int) -> Callable[[], None]:
        """One step on random input, for profiling: `batch` sessions at once, `rows` new rows each, with `past` rows
        already in each cache. Each call does the same work and leaves no state behind.

        The head computes logits of each session's last row. Raises `ExecutionError` for counts below 1 (`past`: 0) and
        `ContextLimitError` where `past + rows` exceeds the model's context.
        """
        from transformers.cache_utils import DynamicCache

        manifest, shape = self._manifest, self._shape
        if batch < 1 or rows < 1 or past < 0:
            raise ExecutionError(f"a rehearsal of {batch} sessions with {rows} rows after {past} is empty")
        if past + rows > manifest.context_limit:
            raise ContextLimitError(
                f"{rows} rows after {past} exceed the model's context of {manifest.context_limit} tokens"
            )
        generator = torch.Generator().manual_seed(0)
        if self.has_embedding:
            inputs = torch.randint(0, manifest.vocabulary_size, (batch, rows), generator=generator)
        else:
            inputs = torch.randn(batch, rows, shape.hidden, generator=generator)
        inputs = inputs.to(self._device)
        cache = DynamicCache()
        held = torch.randn(batch, shape.key_heads, past, shape.head_width, generator=generator).to(self._device)
        for number in range(len(self._blocks)):
            cache.update(held, held, number)

        def step() -> None:
            self._use_threads()
            try:
                with torch.inference_mode():
                    self._run(cache, inputs, past, [rows - 1])
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
            finally:
                _crop(cache, past)

        return step

    def _use_threads(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _run(self, cache: Any, inputs: Tensor, position: int, chosen: list[int]) -> Tensor:
        # `inputs`: [batch, rows] token ids or [batch, rows, hidden]; all sessions of a batch are at one position.
        rows = inputs.shape[1]
        positions = torch.arange(position, position + rows, device=self._device)[None]
        hidden = inputs
        if self._embedding is not None:
            hidden = nn.functional.embedding(inputs, self._embedding)
            if self._embedding_scale is not None:
                hidden = hidden * self._embedding_scale
            if self._positions is not None:
                hidden = hidden + nn.functional.embedding(positions, self._positions)
        if self._blocks:
            arguments: dict[str, Any] = {"attention_mask": self._mask(position, rows), self._cache_argument: cache}
            if self._rotary is not None:
                arguments["position_embeddings"] = self._rotary(hidden, position_ids=positions)
            for block in self._blocks:
                hidden = block(hidden, use_cache=True, **arguments)
        if self._norm is None or self._head is None:
            return hidden
        logits: Tensor = nn.functional.linear(self._norm(hidden[:, chosen]), self._head)
        return logits

    def _mask(self, position: int, rows: int) -> Tensor | None:
        if rows == 1 or (position == 0 and self._attention == "sdpa"):
            # One row sees everything; the sdpa kernel masks a whole prompt itself, and faster.
            return None
        visible = torch.ones(rows, position + rows, dtype=torch.bool, device=self._device).tril(position)[None, None]
        if self._attention == "sdpa":
            return visible
        return torch.zeros(visible.shape, device=self._device).masked_fill(~visible, torch.finfo(torch.float32).min)


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's inputs as they were handed over: int64 [n] or float32 [n, hidden], first row at `position`."""

    position: int
    inputs: Tensor


def iterate_reexecution(
    executor: ShardExecutor, steps: Sequence[StepInput], *, chunk_rows: int = REEXECUTION_ROWS
) -> Iterator[Tensor]:
    """Re-executes a whole session in one teacher-forced pass and yields each step's outputs in order.

    What `forward` gave for the step: float32 [n, hidden], or for a stage with the head the logits [1, vocabulary] of
    the step's last row. Steps must start at position 0 and be contiguous. Rows run in chunks of `chunk_rows`, so memory
    is bounded for hidden stages.
    """
    if not steps:
        return
    expected = 0
    for number, step in enumerate(steps):
        if step.position != expected:
            raise ExecutionError(
                f"step {number} starts at position {step.position}, expected {expected}; steps are missing"
            )
        expected += step.inputs.shape[0]
    has_head = executor.end_unit == len(executor.manifest.units)
    session = executor.new_session(expected)
    everything = torch.cat([step.inputs for step in steps])
    ends = [step.position + step.inputs.shape[0] for step in steps]
    pending: list[Tensor] = []
    number = 0
    for first in range(0, expected, chunk_rows):
        chunk = everything[first : first + chunk_rows]
        last = first + chunk.shape[0]
        wanted = [end - 1 - first for end in ends[number:] if end <= last] if has_head else None
        output = executor.forward(session, chunk, position=first, logit_rows=wanted)
        if has_head:
            yield from (output[row : row + 1] for row in range(output.shape[0]))
            number += output.shape[0]
            continue
        taken = first
        while number < len(ends) and ends[number] <= last:
            pending.append(output[taken - first : ends[number] - first])
            yield torch.cat(pending) if len(pending) > 1 else pending[0]
            pending, taken, number = [], ends[number], number + 1
        if taken < last:
            pending.append(output[taken - first :])


def reexecute(
    executor: ShardExecutor, steps: Sequence[StepInput], *, chunk_rows: int = REEXECUTION_ROWS
) -> list[Tensor]:
    """All of `iterate_reexecution` at once: one tensor per step."""
    return list(iterate_reexecution(executor, steps, chunk_rows=chunk_rows))


def _configuration(
    family: DecoderFamily, manifest: ModelManifest, data: bytes, attention: str
) -> tuple[Any, DecoderShape]:
    """The configuration and its sizes. ExecutionError unless they are those by which the manifest counts memory."""
    try:
        fields = parse_json(data)
        # Before anything is built that is as long.
        blocks = {int(fields[name]) for name in ("num_hidden_layers", "n_layer") if name in fields}
        if blocks - {manifest.block_count}:
            raise UnsupportedDecoderError(f"it has {blocks} blocks, the manifest {manifest.block_count}")
        config = family.configuration(fields, attention)
        shape = family.shape(config)
        kv_bytes = 2 * VALUE_BYTES * shape.key_heads * shape.head_width
    except Exception as error:  # transformers raises many kinds for fields that make no sense
        raise ExecutionError(f"{CONFIG_FILE} of {manifest.name} cannot be used: {error}") from error
    found = (shape.blocks, shape.hidden, shape.vocabulary, shape.context_limit, kv_bytes)
    declared = (
        manifest.block_count,
        manifest.row_width(1),
        manifest.vocabulary_size,
        manifest.context_limit,
        manifest.kv_bytes_per_token_per_block,
    )
    if found != declared:
        raise ExecutionError(
            f"{CONFIG_FILE} of {manifest.name} does not fit its manifest: blocks, hidden size, vocabulary, context and "
            f"cache bytes are {found}, by the manifest {declared}; prepare the model again"
        )
    return config, shape


def _built(make: Callable[[], Any], what: str, device: str = "meta") -> Any:
    try:
        with torch.device(device):
            return make()
    except Exception as error:  # as in _configuration
        raise ExecutionError(f"{what} cannot be built from the configuration: {error}") from error


def _taken(tensors: dict[str, Tensor], name: str, unit: str) -> Tensor:
    try:
        return tensors.pop(name)
    except KeyError:
        raise ExecutionError(f"{unit} has no tensor {name!r}; prepare the model again") from None


def _with_weights(module: nn.Module, tensors: dict[str, Tensor], unit: str) -> nn.Module:
    # `assign` puts the mapped tensors in place of the meta ones: nothing is initialised and nothing copied.
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ExecutionError(
            f"the tensors of {unit} do not fit the architecture: {error}; prepare the model again"
        ) from error
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()
