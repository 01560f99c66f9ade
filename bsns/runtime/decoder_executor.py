"""The executor of Hugging Face decoders: a stage of blocks over the rows of many sessions at once.

Owns building a stage from its units' tensors and running a batch of steps through it. Promises what
`bsns.runtime.executor.ShardExecutor` promises. What differs between decoders is in `bsns.runtime.decoder_families`, how
a block runs in `bsns.runtime.decoder_blocks`, what sessions keep in `bsns.runtime.ragged_attention`.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsns.protocol.bounded_json import parse_json
from bsns.protocol.manifest import VALUE_BYTES, ModelManifest
from bsns.runtime.decoder_blocks import ATTENTION_NAME, Block, LayerBlock, RotaryBlock
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
from bsns.runtime.executor import BatchStep, ContextLimitError, ExecutionError, StageSession
from bsns.runtime.ragged_attention import ATTENTIONS, DecoderSession, RaggedBatch
from bsns.runtime.weight_formats import ARITHMETICS, PackedLinear, pack
from bsns.runtime.weight_store import CONFIG_FILE, WeightStore


class StageExecutor:
    """`ShardExecutor` for Hugging Face decoders.

    Families built like Llama run in blocks of our own, which keep a private copy of their matrices (joined, or in
    another format); the others run transformers' layers over mapped weights. `threads` bounds torch's threads in a
    forward; it is set for the calling thread in each call, since OpenMP keeps it per thread. `attention` other than
    "sdpa" and `arithmetic` other than "float32" are other execution classes. Raises `WeightMismatchError` for a wrong
    file, `ExecutionError` for a range, architecture or arithmetic it cannot run.
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
        arithmetic: str = "float32",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        manifest = store.manifest
        if not 0 <= first_unit < end_unit <= len(manifest.units):
            raise ExecutionError(f"units [{first_unit}, {end_unit}) are not a range within 0 to {len(manifest.units)}")
        if threads < 1:
            raise ExecutionError(f"threads is {threads}, expected at least 1")
        if attention not in ATTENTIONS:
            raise ExecutionError(f"attention is {attention!r}, expected one of {ATTENTIONS}")
        if arithmetic not in ARITHMETICS:
            raise ExecutionError(f"arithmetic is {arithmetic!r}, expected one of {ARITHMETICS}")
        if manifest.dtype != "float32":
            raise ExecutionError(f"the model declares {manifest.dtype}; this executor takes float32 weights only")
        try:
            family = decoder_family(manifest.architecture)
        except UnsupportedDecoderError as error:
            raise ExecutionError(str(error)) from error
        if arithmetic != "float32" and family.experts is not None:
            raise ExecutionError(f"{family.model_type} models run in float32 only; {arithmetic} was asked for")
        config, self._shape = _configuration(family, manifest, store.read_file(CONFIG_FILE))
        self._manifest, self._first_unit, self._end_unit = manifest, first_unit, end_unit
        self._threads, self._device = threads, torch.device(device)
        self._attention, self._arithmetic = attention, arithmetic
        if self._device.type == "cuda":
            # TF32 keeps ten bits of the mantissa: it is not the declared arithmetic.
            torch.backends.cuda.matmul.allow_tf32 = False
        self._embedding_scale = None if family.embedding_scale is None else family.embedding_scale(config)
        self._embedding: Tensor | None = None
        self._positions: Tensor | None = None
        self._blocks: list[Block] = []
        self._norm: nn.Module | None = None
        self._head: PackedLinear | None = None
        self._rotary = _rotary(family, config, self._device) if _has_blocks(manifest, first_unit, end_unit) else None
        rotated = self._rotary is not None and 2 * _frequencies(self._rotary) == self._shape.head_width
        self._turns_pairs = family.rotary_block is not None and rotated
        self.memory_bytes = 0
        done, total = 0, sum(unit.size_bytes for unit in manifest.units[first_unit:end_unit])
        for unit in manifest.units[first_unit:end_unit]:
            tensors = {name: tensor.to(self._device) for name, tensor in store.load_unit(unit.index).items()}
            match unit.kind:
                case "embedding":
                    self._embedding = _taken(tensors, EMBEDDING_WEIGHT, unit.name)
                    self._positions = _taken(tensors, POSITION_TABLE, unit.name) if family.positions else None
                    self.memory_bytes += unit.size_bytes
                case "block":
                    block = self._block(family, config, tensors, unit.name)
                    self._blocks.append(block)
                    self.memory_bytes += block.memory_bytes
                case "head":
                    self._head = pack(_taken(tensors, HEAD_WEIGHT, unit.name), None, arithmetic)
                    norm = _built(lambda: family.final_norm(config), unit.name)
                    # Copied: it would keep the file of the head in memory, which may be packed.
                    weights = {name.removeprefix(NORM_PREFIX): tensor.clone() for name, tensor in tensors.items()}
                    self._norm = _with_weights(norm, weights, unit.name)
                    self.memory_bytes += self._head.memory_bytes + sum(item.nbytes for item in weights.values())
            done += unit.size_bytes
            if progress is not None:
                progress(done, total)
        _return_freed_memory()

    def _block(self, family: DecoderFamily, config: Any, tensors: dict[str, Tensor], name: str) -> Block:
        # transformers' layer is built in any case: it is what says whether the tensors fit the configuration.
        layer = _built(lambda: family.layer(config, len(self._blocks)), name)
        _with_weights(layer, tensors, name)
        if not self._turns_pairs or family.rotary_block is None:
            return LayerBlock(layer, family.cache_argument, self._arithmetic)
        shape = self._shape
        return RotaryBlock(
            dict(tensors),
            heads=shape.query_heads,
            key_heads=shape.key_heads,
            head_width=shape.head_width,
            epsilon=config.rms_norm_eps,
            activation=layer.mlp.act_fn,
            norm_offset=family.rotary_block.norm_offset,
            arithmetic=self._arithmetic,
        )

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
        """`torch-<device>/<arithmetic>/<attention kernel>`."""
        return f"torch-{self._device.type}/{self._arithmetic}/{self._attention}"

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
        shape = self._shape
        return DecoderSession(len(self._blocks), shape.key_heads, shape.head_width, max_tokens, self._device)

    def forward(
        self, session: StageSession, inputs: Tensor, *, position: int, logit_rows: Sequence[int] | None = None
    ) -> Tensor:
        """Runs one step and advances the session by its rows.

        `inputs`: int64 [n] token ids where the stage has the embedding, else float32 [n, hidden]. `position`: of the
        first row; must be the session's. Returns float32 [n, hidden], or with the head logits float32 [rows,
        vocabulary] for `logit_rows` (indices into the n rows; default the last). Raises `ExecutionError` and
        `ContextLimitError`; the session is then as before.
        """
        output = self.forward_batch([BatchStep(session, inputs, position, logit_rows)])[0]
        if isinstance(output, Exception):
            raise output
        return output

    def forward_batch(self, steps: Sequence[BatchStep]) -> list[Tensor | Exception]:
        """One step each of several sessions, their rows laid end to end; see `ShardExecutor`. Each result is as
        `forward` gives it.
        """
        results: list[Tensor | Exception | None] = [None] * len(steps)
        running: list[tuple[int, BatchStep, DecoderSession]] = []
        for number, step in enumerate(steps):
            try:
                running.append((number, step, self._checked(step)))
            except ExecutionError as error:
                results[number] = error
        if running:
            self._use_threads()
            with torch.inference_mode():
                batch = RaggedBatch.of(
                    [(session, len(step.inputs)) for _, step, session in running], self._device, self._attention
                )
                inputs = [step.inputs for _, step, _ in running]
                joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
                outputs = self._run(batch, joined.to(self._device), [step.logit_rows for _, step, _ in running])
            batch.advance()
            for (number, _, _), output in zip(running, outputs, strict=True):
                results[number] = output
        return [item for item in results if item is not None]

    def _checked(self, step: BatchStep) -> DecoderSession:
        session, inputs = step.session, step.inputs
        if not isinstance(session, DecoderSession):
            raise ExecutionError("the session belongs to another kind of executor; open one with new_session()")
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
        if step.position != session.position:
            raise ExecutionError(
                f"the step starts at position {step.position}, the session is at {session.position}; "
                "send the missing steps first, or truncate() to repeat one"
            )
        if step.position + rows > session.max_tokens:
            raise ContextLimitError(
                f"{rows} rows from position {step.position} exceed the {session.max_tokens} tokens reserved for the "
                "session"
            )
        if self.has_head and step.logit_rows is not None and not all(0 <= row < rows for row in step.logit_rows):
            raise ExecutionError(f"logit_rows {list(step.logit_rows)} are not all within the step's {rows} rows")
        return session

    def rehearsal(self, *, batch: int, rows: int, past: int) -> Callable[[], None]:
        """One step on random input, for profiling: `batch` sessions at once, `rows` new rows each, with `past` rows
        already in each cache. Each call does the same work and leaves no state behind.

        The head computes logits of each session's last row. Raises `ExecutionError` for counts below 1 (`past`: 0) and
        `ContextLimitError` where `past + rows` exceeds the model's context.
        """
        manifest, shape = self._manifest, self._shape
        if batch < 1 or rows < 1 or past < 0:
            raise ExecutionError(f"a rehearsal of {batch} sessions with {rows} rows after {past} is empty")
        if past + rows > manifest.context_limit:
            raise ContextLimitError(
                f"{rows} rows after {past} exceed the model's context of {manifest.context_limit} tokens"
            )
        generator = torch.Generator().manual_seed(0)
        steps = []
        for _ in range(batch):
            session = self.new_session(past + rows)
            assert isinstance(session, DecoderSession)
            for held in (session.keys, session.values):
                held.copy_(torch.randn(held.shape, generator=generator))
            session.advance(past)
            if self.has_embedding:
                inputs = torch.randint(0, manifest.vocabulary_size, (rows,), generator=generator)
            else:
                inputs = torch.randn(rows, shape.hidden, generator=generator)
            steps.append(BatchStep(session, inputs, past))

        def run() -> None:
            try:
                self.forward_batch(steps)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
            finally:
                for step in steps:
                    step.session.truncate(past)

        return run

    def _use_threads(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _run(self, batch: RaggedBatch, inputs: Tensor, logit_rows: list[Sequence[int] | None]) -> list[Tensor]:
        """Outputs of each segment. `inputs`: all rows, [rows] token ids or [rows, hidden]."""
        hidden = inputs
        if self._embedding is not None:
            hidden = nn.functional.embedding(inputs, self._embedding)
            if self._embedding_scale is not None:
                hidden = hidden * self._embedding_scale
            if self._positions is not None:
                hidden = hidden + nn.functional.embedding(batch.positions, self._positions)
        if self._blocks:
            rotation = self._rotation(hidden, batch)
            for number, block in enumerate(self._blocks):
                hidden = block.forward(hidden, rotation, batch, number)
        if self._norm is None or self._head is None:
            return [hidden[item.first : item.first + item.rows] for item in batch.segments]
        chosen = [
            [item.first + row for row in ([item.rows - 1] if rows is None else rows)]
            for item, rows in zip(batch.segments, logit_rows, strict=True)
        ]
        logits = self._head(self._norm(hidden[[row for rows in chosen for row in rows]]))
        return list(logits.split([len(rows) for rows in chosen]))

    def _rotation(self, hidden: Tensor, batch: RaggedBatch) -> Any:
        if self._rotary is None:
            return None
        cosine, sine = self._rotary(hidden[None], position_ids=batch.positions[None])
        if not self._turns_pairs:
            return cosine, sine
        half = cosine.shape[-1] // 2
        return torch.complex(cosine[0, :, None, :half], sine[0, :, None, :half])


def _configuration(family: DecoderFamily, manifest: ModelManifest, data: bytes) -> tuple[Any, DecoderShape]:
    """The configuration and its sizes. ExecutionError unless they are those by which the manifest counts memory."""
    try:
        fields = parse_json(data)
        # Before anything is built that is as long.
        blocks = {int(fields[name]) for name in ("num_hidden_layers", "n_layer") if name in fields}
        if blocks - {manifest.block_count}:
            raise UnsupportedDecoderError(f"it has {blocks} blocks, the manifest {manifest.block_count}")
        config = family.configuration(fields, ATTENTION_NAME)
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


def _return_freed_memory() -> None:
    """What packing freed goes back to the system, where the C library would keep it (glibc; elsewhere nothing)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _has_blocks(manifest: ModelManifest, first_unit: int, end_unit: int) -> bool:
    return any(unit.kind == "block" for unit in manifest.units[first_unit:end_unit])


def _rotary(family: DecoderFamily, config: Any, device: torch.device) -> nn.Module | None:
    rotary = _built(lambda: family.rotary(config), "rotary embedding", "cpu")
    return None if rotary is None else rotary.to(device)


def _frequencies(rotary: Any) -> int:
    return int(rotary.inv_freq.numel())


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
