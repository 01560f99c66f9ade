"""The executor of Hugging Face decoders: a stage of blocks over the rows of many sessions at once.

Owns building a stage from its units' tensors and running a batch of steps through it. Promises what
`bsns.runtime.executor.ShardExecutor` promises. What differs between decoders is in `bsns.runtime.decoder_families`, how
a block runs in `bsns.runtime.decoder_blocks`, what sessions keep in `bsns.runtime.ragged_attention`.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from bsns.protocol.bounded_json import parse_json
from bsns.protocol.manifest import VALUE_BYTES, ModelManifest
from bsns.runtime.cuda import DeviceMemoryError, on_device, open_device, to_host
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
from bsns.runtime.executor import BatchStep, ContextLimitError, ExecutionError, InsideRows, StageSession
from bsns.runtime.ragged_attention import ATTENTIONS, LONGEST_SHORT_STEP, DecoderSession, RaggedBatch
from bsns.runtime.weight_formats import ARITHMETICS, PackedLinear, pack
from bsns.runtime.weight_store import CONFIG_FILE, WeightStore

if TYPE_CHECKING:
    from bsns.runtime.decode_graph import DecodeGraphs

# Rows that run together in one recorded batch, on a GPU. Of more the kernels take longer than their start.
_LARGEST_GRAPH: Final = 128


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
        self._threads, self._device = threads, open_device(device)
        if arithmetic == "int8" and self._device.type != "cpu":
            raise ExecutionError(f"int8 is computed on a CPU only, the device is {device!r}; choose another arithmetic")
        self._attention, self._arithmetic = attention, arithmetic
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
        with on_device(self._device):
            self._load(family, config, store, progress)
            self._graphs = self._decode_graphs()
        _return_freed_memory()

    def _load(
        self, family: DecoderFamily, config: Any, store: WeightStore, progress: Callable[[int, int], None] | None
    ) -> None:
        manifest, first_unit, end_unit, arithmetic = self._manifest, self._first_unit, self._end_unit, self._arithmetic
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

    def _decode_graphs(self) -> "DecodeGraphs | None":
        """Graphs of short steps, where there are kernels for them and no block does what cannot be recorded."""
        self._kernels = False
        if self._device.type != "cuda" or self._attention != "sdpa" or not self._blocks:
            return None
        shape = self._shape
        try:
            from bsns.runtime import decode_kernels
        except ImportError:  # torch was installed without triton
            return None
        sizes = shape.query_heads, shape.key_heads, shape.head_width
        self._kernels = decode_kernels.are_usable(*sizes, self._device)
        if not self._kernels or not all(isinstance(block, RotaryBlock) for block in self._blocks):
            return None
        from bsns.runtime.decode_graph import DecodeGraphs

        spare = DecoderSession(len(self._blocks), shape.key_heads, shape.head_width, 1, self._device)
        width = None if self.has_embedding else shape.hidden
        return DecodeGraphs(width, self._attention, spare, self._device)

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
        context, `ExecutionError` where a GPU has no room for it.
        """
        if not 1 <= max_tokens <= self._manifest.context_limit:
            raise ContextLimitError(
                f"a session of {max_tokens} tokens was asked for; the model's "
                f"context holds 1 to {self._manifest.context_limit}"
            )
        shape = self._shape
        with on_device(self._device):
            return DecoderSession(len(self._blocks), shape.key_heads, shape.head_width, max_tokens, self._device)

    def forward(
        self,
        session: StageSession,
        inputs: Tensor,
        *,
        position: int,
        logit_rows: Sequence[int] | None = None,
        inside: InsideRows | None = None,
    ) -> Tensor:
        """Runs one step and advances the session by its rows.

        `inputs`: int64 [n] token ids where the stage has the embedding, else float32 [n, hidden]. `position`: of the
        first row; must be the session's. Returns float32 [n, hidden], or with the head logits float32 [rows,
        vocabulary] for `logit_rows` (indices into the n rows; default the last). `inside` gets float32 [n, hidden].
        Raises `ExecutionError` and `ContextLimitError`; the session is then as before.
        """
        step = BatchStep(session, inputs, position, logit_rows)
        if inside is None:
            output = self.forward_batch([step])[0]
        else:
            checked = self._checked(step)
            output = self._outputs([(step, checked)], inside)[0]
            checked.advance(len(inputs))
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
            try:
                outputs: list[Tensor | Exception] = [*self._outputs([(step, session) for _, step, session in running])]
            except DeviceMemoryError as error:
                # Nothing was counted; one after the other they take less.
                outputs = [error] if len(running) == 1 else [self.forward_batch([step])[0] for _, step, _ in running]
            else:
                for _, step, session in running:
                    session.advance(len(step.inputs))
            for (number, _, _), output in zip(running, outputs, strict=True):
                results[number] = output
        return [item for item in results if item is not None]

    def _outputs(
        self, running: Sequence[tuple[BatchStep, DecoderSession]], inside: InsideRows | None = None
    ) -> list[Tensor]:
        """Outputs of each step, complete and on the CPU. Counts nothing."""
        self._use_threads()
        rows = [len(step.inputs) for step, _ in running]
        inputs, sessions = [step.inputs for step, _ in running], [session for _, session in running]
        with on_device(self._device), torch.inference_mode():
            is_short = max(rows) <= LONGEST_SHORT_STEP and sum(rows) <= _LARGEST_GRAPH
            if self._graphs is not None and is_short and inside is None:
                outputs = self._graphs.step(self._rows, sessions, inputs).split(rows)
                if not self.has_head:
                    return list(outputs)
                return [
                    output[-1:] if step.logit_rows is None else output[list(step.logit_rows)]
                    for (step, _), output in zip(running, outputs, strict=True)
                ]
            batch = RaggedBatch.of(
                list(zip(sessions, rows, strict=True)), self._device, self._attention, kernels=self._kernels
            )
            joined = (inputs[0] if len(inputs) == 1 else torch.cat(inputs)).to(self._device)
            if not self.has_head:
                return list(to_host(self._rows(batch, joined, inside=inside)).split(rows))
            chosen, first = [], 0
            for (step, _), count in zip(running, rows, strict=True):
                chosen.append([first + row for row in ([count - 1] if step.logit_rows is None else step.logit_rows)])
                first += count
            wanted = torch.tensor([row for each in chosen for row in each], dtype=torch.int64, device=self._device)
            return list(to_host(self._rows(batch, joined, wanted, inside)).split([len(each) for each in chosen]))

    def _checked(self, step: BatchStep) -> DecoderSession:
        session, inputs = step.session, step.inputs
        if not isinstance(session, DecoderSession):
            raise ExecutionError("the session belongs to another kind of executor; open one with new_session()")
        hidden, vocabulary = self._manifest.row_width(self._first_unit), self._manifest.vocabulary_size
        if self.has_embedding:
            if inputs.dtype != torch.int64 or inputs.ndim != 1:
                raise ExecutionError(f"the stage takes token ids int64 [n], got {inputs.dtype} {list(inputs.shape)}")
            ids = inputs.tolist()
            if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
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
                # Ends when the outputs are on the CPU: nothing is left running on a GPU.
                self.forward_batch(steps)
            finally:
                for step in steps:
                    step.session.truncate(past)

        return run

    def _use_threads(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _rows(
        self,
        batch: RaggedBatch,
        inputs: Tensor,
        wanted: Tensor | None = None,
        inside: InsideRows | None = None,
    ) -> Tensor:
        """Outputs of a batch, where the stage has the head of its rows `wanted` (None: of all). `inputs`: all rows,
        [rows] token ids or [rows, hidden].
        """
        # A unit is the embedding, a block or the head; of a stage of the embedding alone the rows are its outputs.
        last_block = len(self._blocks) - 1 if self._head is None and self._end_unit - self._first_unit > 1 else None
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
                if inside is not None and number == last_block:
                    inside(to_host(hidden.clone()))
                hidden = block.forward(hidden, rotation, batch, number)
        if inside is not None and last_block is None:
            # Before the head; of a stage of one unit that is not the head its outputs.
            inside(to_host(hidden.clone()))
        if self._norm is None or self._head is None:
            return hidden
        logits: Tensor = self._head(self._norm(hidden if wanted is None else hidden[wanted]))
        return logits

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
