import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from bsns.protocol.manifest import ModelManifest
from bsns.protocol.model_graph import ModelGraph
from bsns.runtime.capture import CapturedModel, capture
from bsns.runtime.executor import ContextLimitError, ExecutionError, ShardExecutor, StepInput, iterate_reexecution
from bsns.runtime.exported_models import (
    EFFICIENTNET_PREPROCESSING,
    ExportError,
    Preprocessing,
    choose_cuts,
    image_row,
    load_efficientnet_lite0,
    narrow_order,
    write_efficientnet_lite0,
    write_exported,
)
from bsns.runtime.program import Program
from bsns.runtime.program_executor import ProgramExecutor
from bsns.runtime.weight_store import MANIFEST_FILE, WeightMismatchError, WeightStore
from tests.unit.captured_models import residual_cnn
from tests.unit.runtime_models import flip_byte, silent

TOLERANCE = 1e-5
PICTURE = Preprocessing(16, 1.0, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
LABELS = [f"class {index}" for index in range(10)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> WeightStore:
    folder = tmp_path_factory.mktemp("efficientnet")
    write_efficientnet_lite0("efficientnet-lite0", folder, silent)
    return WeightStore(folder)


def captured_cnn() -> tuple[nn.Module, CapturedModel]:
    module, inputs = residual_cnn()
    return module, capture(module, inputs, dynamic_shapes=({0: Dim("batch", min=1, max=8)},))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, CapturedModel, WeightStore]:
    module, captured = captured_cnn()
    folder = tmp_path_factory.mktemp("cnn")
    write_exported("cnn", captured, folder, silent, task="image-classification", labels=LABELS, preprocessing=PICTURE)
    return module, captured, WeightStore(folder)


@pytest.fixture
def store(cnn: tuple[nn.Module, CapturedModel, WeightStore]) -> WeightStore:
    return cnn[2]


def through(executors: list[ProgramExecutor], row: Tensor) -> Tensor:
    for executor in executors:
        row = executor.forward(executor.new_session(1), row, position=0)
    return row


def test_every_cut_between_units_of_efficientnet_gives_the_whole_models_logits(efficientnet: WeightStore) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = load_efficientnet_lite0()(image)
    units = len(efficientnet.manifest.units)
    assert 8 <= units <= 64
    row = image.reshape(1, -1)
    for cut in range(1, units):
        stages = [ProgramExecutor(efficientnet, 0, cut), ProgramExecutor(efficientnet, cut, units)]
        assert (through(stages, row) - expected).abs().max() <= TOLERANCE, f"cut before unit {cut}"


def test_one_stage_for_each_unit_of_efficientnet_gives_the_whole_models_logits(efficientnet: WeightStore) -> None:
    torch.manual_seed(1)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = load_efficientnet_lite0()(image)
    stages = [ProgramExecutor(efficientnet, index, index + 1) for index in range(len(efficientnet.manifest.units))]
    assert (through(stages, image.reshape(1, -1)) - expected).abs().max() <= TOLERANCE


def test_manifest_of_efficientnet_is_a_valid_chain_with_imagenets_labels(efficientnet: WeightStore) -> None:
    manifest = efficientnet.manifest
    efficientnet.verify_all()
    assert (manifest.input_width, manifest.vocabulary_size) == (3 * 224 * 224, 1000)
    assert sum(unit.parameter_count for unit in manifest.units) >= 4_600_000
    graph = ModelGraph.of_manifest(manifest)
    assert len({operator.timing_key for operator in graph.operators}) == len(manifest.units)
    labels = json.loads(efficientnet.read_file("labels.json"))
    assert labels[0].startswith("tench")
    assert len(labels) == 1000
    document = json.loads(efficientnet.read_file("config.json"))
    assert document == {"preprocessing": EFFICIENTNET_PREPROCESSING.to_json()}


def test_every_cut_between_units_gives_the_whole_models_output(
    cnn: tuple[nn.Module, CapturedModel, WeightStore],
) -> None:
    module, _, store = cnn
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = module(image)
    units = len(store.manifest.units)
    for cut in range(1, units):
        stages = [ProgramExecutor(store, 0, cut), ProgramExecutor(store, cut, units)]
        assert (through(stages, image.reshape(1, -1)) - expected).abs().max() <= TOLERANCE


def test_equal_captures_give_equal_bytes(cnn: tuple[nn.Module, CapturedModel, WeightStore], tmp_path: Path) -> None:
    again = write_exported(
        "cnn", captured_cnn()[1], tmp_path, silent, task="image-classification", labels=LABELS, preprocessing=PICTURE
    )
    assert again.to_bytes() == cnn[2].manifest.to_bytes()


def test_executor_is_reexecuted_like_any_other(store: WeightStore) -> None:
    units = len(store.manifest.units)
    middle = units // 2
    executors: list[ShardExecutor] = [ProgramExecutor(store, 0, middle), ProgramExecutor(store, middle, units)]
    row = torch.randn(1, store.manifest.input_width)
    for executor in executors:
        direct = executor.forward(executor.new_session(1), row, position=0)
        (again,) = iterate_reexecution(executor, [StepInput(0, row)])
        assert torch.equal(direct, again)
        assert executor.execution_class == "torch-cpu/float32/aten"
        row = direct


def test_row_inside_is_what_the_last_unit_takes(store: WeightStore) -> None:
    units = len(store.manifest.units)
    stage, shorter = ProgramExecutor(store, 0, units), ProgramExecutor(store, 0, units - 1)
    row = torch.randn(1, store.manifest.row_width(0), generator=torch.Generator().manual_seed(2))
    found: list[Tensor] = []
    for _ in range(2):
        output = stage.forward(stage.new_session(1), row, position=0, inside=found.append)
        torch.testing.assert_close(output, through([stage], row), rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], through([shorter], row))
    assert torch.equal(found[0], found[1])
    alone: list[Tensor] = []
    last = ProgramExecutor(store, units - 1, units)
    assert torch.equal(last.forward(last.new_session(1), found[0], position=0, inside=alone.append), alone[0])


def test_session_takes_one_row_and_can_be_repeated(store: WeightStore) -> None:
    executor = ProgramExecutor(store, 0, len(store.manifest.units))
    row = torch.randn(1, store.manifest.input_width)
    session = executor.new_session(1)
    assert (session.position, session.cache_bytes, session.cache_bytes_limit) == (0, 0, 0)
    first = executor.forward(session, row, position=0, logit_rows=[0])
    assert session.position == 1
    with pytest.raises(ExecutionError, match="position 0, the session is at 1"):
        executor.forward(session, row, position=0)
    with pytest.raises(ContextLimitError, match="one row"):
        executor.forward(session, row, position=1)
    session.truncate(0)
    assert torch.equal(executor.forward(session, row, position=0), first)


def test_wrong_steps_are_refused_and_leave_the_session_as_it_was(store: WeightStore) -> None:
    executor = ProgramExecutor(store, 0, len(store.manifest.units))
    width = store.manifest.input_width
    session = executor.new_session(1)
    for inputs, message in (
        (torch.randn(1, width + 1), f"takes float32 \\[1, {width}\\]"),
        (torch.randn(1, width).double(), "float64"),
        (torch.randn(0, width), "at least one row"),
    ):
        with pytest.raises(ExecutionError, match=message):
            executor.forward(session, inputs, position=0)
    with pytest.raises(ContextLimitError):
        executor.forward(session, torch.randn(2, width), position=0)
    with pytest.raises(ExecutionError, match="logit_rows"):
        executor.forward(session, torch.randn(1, width), position=0, logit_rows=[1])
    with pytest.raises(ExecutionError, match="cannot go back"):
        session.truncate(1)
    assert session.position == 0


def test_session_of_two_rows_is_refused(store: WeightStore) -> None:
    with pytest.raises(ContextLimitError, match="2 rows"):
        ProgramExecutor(store, 0, 1).new_session(2)


@pytest.mark.parametrize(("first", "end"), [(0, 0), (1, 1), (-1, 1), (0, 100)])
def test_units_outside_the_model_are_refused(store: WeightStore, first: int, end: int) -> None:
    with pytest.raises(ExecutionError, match="not a range"):
        ProgramExecutor(store, first, end)


@pytest.mark.parametrize("batch", [1, 8])
def test_rehearsal_runs_every_stage_on_a_batch(store: WeightStore, batch: int) -> None:
    units = len(store.manifest.units)
    for first in range(0, units, 5):
        ProgramExecutor(store, first, min(units, first + 5)).rehearsal(batch=batch, rows=64, past=100)()


def test_rehearsal_of_a_batch_beyond_the_captured_one_runs_row_by_row(store: WeightStore) -> None:
    executor = ProgramExecutor(store, 0, 1)
    with FlopCounterMode(display=False) as whole:
        executor.rehearsal(batch=8, rows=1, past=0)()
    with FlopCounterMode(display=False) as single:
        executor.rehearsal(batch=9, rows=1, past=0)()
    assert 0 < 9 * whole.get_total_flops() == 8 * single.get_total_flops()
    with pytest.raises(ExecutionError, match="empty"):
        executor.rehearsal(batch=0, rows=1, past=0)


def test_stage_whose_input_does_not_show_the_batch_runs(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        """Rows lie one after the other at the cut, as inside torch's attention: no size there is the batch."""

        def forward(self, inputs: Tensor) -> Tensor:
            rows = (inputs.repeat(1, 8) * 3).reshape(-1, 6).sum(1)
            return (rows * 2).reshape(inputs.shape[0], 8).sigmoid()

    torch.manual_seed(3)
    example = torch.randn(2, 6)
    captured = capture(Mixed(), (example,), dynamic_shapes=({0: Dim("batch", min=1, max=8)},))
    write_exported(
        "mixed", captured, tmp_path, silent, task="image-classification", labels=LABELS[:8], preprocessing=PICTURE
    )
    store = WeightStore(tmp_path)
    program = Program.from_bytes(store.read_file("program.json"))
    hidden = [
        cut
        for cut in program.cuts
        if not any(
            "batch" in program.values[name].shape for name in program.carried(range(program.operator_count), cut)
        )
    ]
    assert hidden, "no cut of this model hides the batch"
    stages = [ProgramExecutor(store, index, index + 1) for index in range(len(store.manifest.units))]
    assert torch.equal(through(stages, example[:1]), Mixed()(example[:1]))


def test_program_that_does_not_run_on_one_row_is_refused(copied: Path) -> None:
    program = json.loads((copied / "program.json").read_bytes())
    program["dimensions"][0][1] = 2
    data = json.dumps(program, sort_keys=True, separators=(",", ":")).encode()
    (copied / "program.json").write_bytes(data)
    manifest = json.loads((copied / MANIFEST_FILE).read_bytes())
    [listed] = [file for file in manifest["files"] if file["name"] == "program.json"]
    listed["sha256"] = hashlib.sha256(data).hexdigest()
    (copied / MANIFEST_FILE).write_bytes(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(ExecutionError, match="does not run on one row"):
        ProgramExecutor(WeightStore(copied), 0, 1)


@pytest.fixture
def copied(store: WeightStore, tmp_path: Path) -> Path:
    for path in store.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(("file", "named"), [("program.json", "program"), ("unit-00000.safetensors", "unit 0")])
def test_damaged_file_is_refused(copied: Path, file: str, named: str) -> None:
    flip_byte(copied / file)
    with pytest.raises(WeightMismatchError, match=named):
        ProgramExecutor(WeightStore(copied), 0, 1)


def test_program_that_does_not_fit_its_manifest_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / MANIFEST_FILE).read_bytes())
    manifest["units"][0]["output_bytes_per_token"] += 4
    data = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    (copied / MANIFEST_FILE).write_bytes(ModelManifest.from_bytes(data).to_bytes())
    with pytest.raises(ExecutionError, match="by the manifest"):
        ProgramExecutor(WeightStore(copied), 0, 1)


def test_program_that_takes_more_memory_than_its_manifest_says_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / MANIFEST_FILE).read_bytes())
    manifest["units"][0]["peak_bytes"] = 1000
    (copied / MANIFEST_FILE).write_bytes(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(ExecutionError, match="activations"):
        ProgramExecutor(WeightStore(copied), 0, 1)


def test_of_neighbouring_cuts_only_the_narrow_one_is_kept() -> None:
    widths = [64, 256, 8, 256, 64]
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    captured = capture(nn.Sequential(*layers), (torch.randn(2, 64),))
    order = narrow_order(captured.graph)
    (cut,) = choose_cuts(captured.graph, captured.program, order)
    assert [captured.program.values[name].shape for name in captured.program.carried(order, cut)] == [(2, 8)]


def test_order_keeps_what_is_carried_small() -> None:
    class Branches(nn.Module):
        """Listed as all wide tensors first, then what makes them narrow."""

        def forward(self, inputs: Tensor) -> Tensor:
            wide = [inputs.repeat(1, 8) * factor for factor in (2, 3, 4)]
            narrow = [item.sum(1) for item in wide]
            return narrow[0] + narrow[1] + narrow[2]

    captured = capture(Branches(), (torch.randn(2, 6),))

    def widest(order: list[int]) -> int:
        program = captured.program
        carried = [program.carried(order, place) for place in range(len(order))]
        return max(sum(program.values[name].bytes_at({}) for name in names) for names in carried)

    assert widest(narrow_order(captured.graph)) < widest(list(range(len(captured.graph.operators))))


def test_no_cut_where_something_else_than_float32_crosses() -> None:
    class Masked(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            mask = inputs > 0
            return torch.where(mask, (inputs * 2).relu(), (inputs * 3).relu())

    captured = capture(Masked(), (torch.randn(2, 6),))
    order = list(range(len(captured.graph.operators)))
    for cut in choose_cuts(captured.graph, captured.program, order):
        assert all(captured.program.values[name].dtype == "float32" for name in captured.program.carried(order, cut))


def test_labels_of_another_number_than_outputs_are_refused(
    cnn: tuple[nn.Module, CapturedModel, WeightStore], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="gives 10 values for one row, there are 9 labels"):
        write_exported(
            "cnn", cnn[1], tmp_path, silent, task="image-classification", labels=LABELS[:9], preprocessing=PICTURE
        )


def test_picture_becomes_a_row_of_scaled_channels(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = (255, 127, 0)  # the centred square is of one colour
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    for image in (path, pixels):
        row = image_row(cast("Path", image), PICTURE)
        assert row.shape == (1, 3 * 16 * 16)
        assert row.dtype == np.float32
        channels = row.reshape(3, 16, 16)
        np.testing.assert_allclose(channels[:, 8, 8], [1.0, 0.0, -127 / 128])


def test_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png is no picture"):
        image_row(path, PICTURE)
    with pytest.raises(ValueError, match="uint8"):
        image_row(np.zeros((4, 4), np.uint8), PICTURE)
