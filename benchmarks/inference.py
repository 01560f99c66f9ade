"""How fast a swarm of real node processes answers, against transformers and llama.cpp in one process: writes
benchmarks/results/inference.json and docs/figures/inference-*.png. About twenty minutes on two quiet cores.

Both sides take turns in one run; a ratio is the median over neighbouring samples. docs/performance.md says what each
section measures.

    python -m benchmarks.inference [--only stages,streams,batch,int8,hog,delay,memory] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.inference_memory import resident_bytes
from benchmarks.inference_network import Swarm, node_takes
from benchmarks.inference_reference import LLAMA_CPP, TRANSFORMERS, Decoded, Reference, llama_is_here
from benchmarks.inference_statistics import (
    compute_seconds,
    decode_rate,
    hop_seconds,
    middle,
    middle_rate,
    quantile,
    ratio,
    whole_rate,
)
from benchmarks.result import FIGURES, Figure, print_table, write_result
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.prepare import prepare

# Asked for so that the answer is long: it must not end before ANSWER_TOKENS.
QUESTION = (
    "Write a long and detailed essay about {topic}. Begin with its history, go on with how it works and why it matters "
    "to people today, and give several examples."
)
TOPICS = (
    "lighthouses", "the printing press", "coral reefs", "railways", "the violin", "bees", "volcanoes", "bread",
    "the Roman Empire", "bicycles", "tea", "glaciers", "cathedrals", "the telephone", "chess", "rice farming",
    "submarines", "the moon", "paper", "vaccines", "windmills", "the Silk Road", "whales", "concrete",
    "photography", "deserts", "the piano", "rivers", "satellites", "clocks", "cotton", "maps",
)  # fmt: skip
# Asked for word for word: what drafting by look-up can gain at the most.
QUOTATIONS = (
    "The harbour town of Saltmere lies on a narrow spit of land between the river and the sea. Its lighthouse, built "
    "in 1824, is 31 metres high and was the first on this coast to burn gas instead of oil.",
    "To change a bicycle tyre, first release the brake and take the wheel out of the frame. Push one side of the tyre "
    "over the rim with two levers, pull the tube out, and look for what made the hole before you put a new one in.",
    "The committee met on Tuesday to discuss the new library. Three plans were shown: one in the old market hall, one "
    "beside the school, and one above the railway station. It will vote on them in the second week of May.",
)
ANSWER_TOKENS = 64
DELAY_TOKENS = 32
WARM_TOKENS = 16
STAGE_GOALS = {2: ">= 0.95", 3: ">= 0.93"}
HOP_GOALS = {0.5: "<= 0.8", 0.99: "<= 2"}
STREAMS = (1, 8, 32)
BATCHES = (1, 2, 4, 8, 16, 32)
SWARM_NODES = 6
DELAYS_S = (0.01, 0.05, 0.1)
SPECULATION_TOKENS = 8
HOG_SETTLES_S = 0.5

Result = TypeVar("Result")


@dataclass
class Bench:
    """What all sections share. `curves` and `delays` are for the pictures: by the name of a line its points, (streams
    or milliseconds a hop, tokens per second).
    """

    model_folder: Path
    prompts: list[list[int]]
    quotations: list[list[int]]
    quick: bool
    stack: AsyncExitStack
    references: dict[str, Reference] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    delays: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    async def reference(self, engine: str) -> Reference:
        """The engine, started at its first use and kept until the end; it takes no time while it is not asked."""
        if engine not in self.references:
            progress(f"starting {engine}")
            self.references[engine] = await self.stack.enter_async_context(Reference.running(engine))
        return self.references[engine]

    def rounds(self, full: int) -> int:
        return max(1, full // 3) if self.quick else full

    @property
    def answer_tokens(self) -> int:
        return ANSWER_TOKENS // 2 if self.quick else ANSWER_TOKENS


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def in_turn(number: int, *sides: Callable[[], Awaitable[Result]]) -> list[Result]:
    """Run the sides one after the other, in reverse in every second round, so that drift favours none; results in the
    order given.
    """
    order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
    found = {index: await sides[index]() for index in order}
    return [found[index] for index in range(len(sides))]


async def one_stream(swarm: Swarm, prompt: Sequence[int], tokens: int) -> Decoded:
    (answer,) = await swarm.stream([prompt], tokens)
    return answer


async def stages(bench: Bench) -> list[Figure]:
    """One stream through 2 and 3 nodes of one thread, against transformers in one process."""
    figures: list[Figure] = []
    reference = await bench.reference(TRANSFORMERS)
    for count, goal in STAGE_GOALS.items():
        async with Swarm.running(f"stages-{count}", bench.model_folder, stages=count, timed=True) as swarm:
            await one_stream(swarm, bench.prompts[0], WARM_TOKENS)
            ours: list[Decoded] = []
            theirs: list[Decoded] = []
            hops: list[float] = []
            compute: list[float] = []
            for number in range(bench.rounds(6)):
                prompt = bench.prompts[number]
                answer, other = await in_turn(
                    number,
                    partial(one_stream, swarm, prompt, bench.answer_tokens),
                    partial(reference.decode, prompt, bench.answer_tokens),
                )
                passes = swarm.passes(answer)
                hops += hop_seconds(passes)
                compute.append(compute_seconds(passes))
                ours.append(answer)
                theirs.append(other)
                progress(
                    f"{count} stages ({swarm.cuts}): {decode_rate(answer.arrivals):.2f} tokens/s, transformers "
                    f"{decode_rate(other.arrivals):.2f}"
                )
            name, cuts = f"{count} stages", f"units {swarm.cuts}"
        rates, other_rates = ([decode_rate(item.arrivals) for item in side] for side in (ours, theirs))
        equal = [float(mine.tokens == other.tokens) for mine, other in zip(ours, theirs)]
        milliseconds = [1e3 * value for value in hops]
        mean = f"mean {statistics.mean(milliseconds):.3f} ms"
        figures += [
            middle(f"{name}: one stream", rates, "tokens/s", None, cuts),
            ratio(f"{name} / transformers", rates, other_rates, goal),
            middle(f"{name}: compute of a token in the nodes", [1e3 * item for item in compute], "ms"),
        ]
        figures += [
            Figure(
                f"{name}: added time per hop, p{100 * share:.0f}",
                quantile(milliseconds, share),
                "ms",
                min(milliseconds),
                max(milliseconds),
                len(milliseconds),
                limit,
                mean,
            )
            for share, limit in HOP_GOALS.items()
        ]
        figures.append(
            Figure(
                f"{name}: answers equal to transformers'",
                statistics.mean(equal),
                "share",
                min(equal),
                max(equal),
                len(equal),
                "== 1",
            )
        )
    return figures


async def streams(bench: Bench) -> list[Figure]:
    """1, 8 and 32 streams at once over two nodes of one thread, against the same streams over one such node."""
    rates: dict[tuple[int, int], list[float]] = {}
    whole: dict[tuple[int, int], list[float]] = {}
    async with AsyncExitStack() as stack:
        swarms = {
            count: await stack.enter_async_context(Swarm.running(f"streams-{count}", bench.model_folder, stages=count))
            for count in (2, 1)
        }
        for swarm in swarms.values():
            await one_stream(swarm, bench.prompts[0], WARM_TOKENS)
        for number in range(bench.rounds(3)):
            for size in STREAMS:
                found = await in_turn(
                    number,
                    *(partial(swarm.stream, bench.prompts[:size], bench.answer_tokens) for swarm in swarms.values()),
                )
                for count, answers in zip(swarms, found):
                    note_rates(rates, whole, (count, size), answers)
                    progress(f"{size} streams, {count} nodes: {rates[count, size][-1]:.2f} tokens/s")
        cuts = swarms[2].cuts
    figures = [
        middle(f"{size} streams, {count} nodes", values, "tokens/s", None, f"units {cuts}" if count > 1 else "")
        for (count, size), values in rates.items()
    ]
    for size in STREAMS:
        # A single stream is in one node at a time: a second node cannot make it faster.
        goal = ">= 1.8" if size > 1 else None
        figures += [
            ratio(f"{size} streams: 2 nodes / 1 node", rates[2, size], rates[1, size], goal),
            ratio(f"{size} streams with their prompts: 2 nodes / 1 node", whole[2, size], whole[1, size]),
        ]
    most = STREAMS[-1]
    figures.append(ratio(f"2 nodes: {most} streams / 1 stream", rates[2, most], rates[2, 1], ">= 4"))
    for count in (1, 2):
        title = f"{count} node{'s' * (count > 1)} of one thread"
        bench.curves[title] = [(size, statistics.median(rates[count, size])) for size in STREAMS]
    return figures


async def batch(bench: Bench) -> list[Figure]:
    """Tokens per second over the number of streams in a swarm of six nodes: the experiment of the paper."""
    rates: dict[int, list[float]] = {}
    whole: dict[int, list[float]] = {}
    async with Swarm.running("batch", bench.model_folder, stages=SWARM_NODES) as swarm:
        await one_stream(swarm, bench.prompts[0], WARM_TOKENS)
        for _ in range(bench.rounds(2)):
            for size in BATCHES:
                note_rates(rates, whole, size, await swarm.stream(bench.prompts[:size], bench.answer_tokens))
                progress(f"{size} streams, {SWARM_NODES} nodes: {rates[size][-1]:.2f} tokens/s")
        cuts = swarm.cuts
    title = f"{SWARM_NODES} nodes on {os.cpu_count()} cores"
    figures = [middle(f"{title}, {size} streams", rates[size], "tokens/s", None, f"units {cuts}") for size in BATCHES]
    figures += [middle(f"{title}, {size} streams with their prompts", whole[size], "tokens/s") for size in BATCHES]
    medians = [statistics.median(rates[size]) for size in BATCHES]
    steps = [more / fewer for fewer, more in pairwise(medians)]
    figures.append(
        Figure(
            f"{title}: gain of each doubling of the streams, least",
            min(steps),
            "ratio",
            min(steps),
            max(steps),
            len(steps),
            "> 1",
        )
    )
    bench.curves[title] = list(zip(BATCHES, medians))
    return figures


Key = TypeVar("Key")


def note_rates(
    rates: dict[Key, list[float]], whole: dict[Key, list[float]], key: Key, answers: Sequence[Decoded]
) -> None:
    """Add both rates of one sample of concurrent streams."""
    arrivals = [answer.arrivals for answer in answers]
    rates.setdefault(key, []).append(middle_rate(arrivals))
    whole.setdefault(key, []).append(whole_rate(min(answer.began for answer in answers), arrivals))


async def int8(bench: Bench) -> list[Figure]:
    """8-bit weights in two nodes, against transformers in float32 and llama.cpp in Q4_1, each in one process."""
    if not node_takes("arithmetic"):
        progress("int8: this node client has no setting `arithmetic`; the rows are left out")
        return []
    has_llama = llama_is_here()
    if not has_llama:
        progress("int8: llama-cpp-python could not be built on this machine; its rows are left out")
    rates: dict[str, list[float]] = {}
    equal: list[float] = []
    engines = (TRANSFORMERS, LLAMA_CPP) if has_llama else (TRANSFORMERS,)
    references = [await bench.reference(engine) for engine in engines]
    options = ("--arithmetic", "int8")
    async with Swarm.running("int8", bench.model_folder, stages=2, node_options=options) as swarm:
        await one_stream(swarm, bench.prompts[0], WARM_TOKENS)
        for number in range(bench.rounds(6)):
            prompt = bench.prompts[number]
            found = await in_turn(
                number,
                partial(one_stream, swarm, prompt, bench.answer_tokens),
                *(partial(reference.decode, prompt, bench.answer_tokens) for reference in references),
            )
            for name, answer in zip(("swarm", *engines), found):
                rates.setdefault(name, []).append(decode_rate(answer.arrivals))
                progress(f"int8, {name}: {rates[name][-1]:.2f} tokens/s")
            equal.append(statistics.mean(mine == other for mine, other in zip(found[0].tokens, found[1].tokens)))
    ours = rates["swarm"]
    figures = [
        middle("int8, 2 stages: one stream", ours, "tokens/s"),
        ratio("int8, 2 stages / transformers float32", ours, rates[TRANSFORMERS], ">= 2"),
        middle("int8, 2 stages: tokens in the place of transformers'", equal, "share"),
    ]
    if has_llama:
        figures += [
            middle("llama.cpp Q4_1", rates[LLAMA_CPP], "tokens/s"),
            ratio("int8, 2 stages / llama.cpp Q4_1", ours, rates[LLAMA_CPP], ">= 0.5", "0.8 is aimed at"),
        ]
    return figures


async def hog(bench: Bench) -> list[Figure]:
    """One stream while another program takes every core, against the same swarm on idle cores."""
    rates: dict[tuple[str, bool], list[float]] = {}
    reference = await bench.reference(TRANSFORMERS)
    async with Swarm.running("hog", bench.model_folder, stages=2) as swarm:
        await one_stream(swarm, bench.prompts[0], WARM_TOKENS)
        for number in range(bench.rounds(4)):
            both = partial(swarm_and_reference, swarm, reference, bench.prompts[number], bench.answer_tokens)
            for hogged, answers in zip((False, True), await in_turn(number, both, partial(beside_hogs, both))):
                for name, answer in zip(("swarm", TRANSFORMERS), answers):
                    rates.setdefault((name, hogged), []).append(decode_rate(answer.arrivals))
                    progress(f"{name}{', with hogs' * hogged}: {rates[name, hogged][-1]:.2f} tokens/s")
    return [
        ratio("2 stages: beside a hog on each core / idle", rates["swarm", True], rates["swarm", False], ">= 0.45"),
        ratio("transformers: beside a hog on each core / idle", rates[TRANSFORMERS, True], rates[TRANSFORMERS, False]),
    ]


async def swarm_and_reference(swarm: Swarm, reference: Reference, prompt: Sequence[int], tokens: int) -> list[Decoded]:
    return [await one_stream(swarm, prompt, tokens), await reference.decode(prompt, tokens)]


async def beside_hogs(work: Callable[[], Awaitable[Result]]) -> Result:
    async with hogs():
        return await work()


@asynccontextmanager
async def hogs() -> AsyncIterator[None]:
    """A process on each core that does nothing but run, until the block ends or this process does."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}:\n for _ in range(1_000_000): pass"
    processes = []
    try:
        for core in sorted(os.sched_getaffinity(0)):
            # A session of its own: Linux shares a core between sessions first, and the nodes have theirs.
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", spin, start_new_session=True)
            processes.append(process)
            os.sched_setaffinity(process.pid, {core})
        await asyncio.sleep(HOG_SETTLES_S)
        yield
    finally:
        for process in processes:
            process.kill()
            await process.wait()


async def delay(bench: Bench) -> list[Figure]:
    """One stream through two nodes whose links take 10, 50 and 100 ms, against what the links alone would allow; with
    and without drafts, of a text that repeats little (an essay) and of one that repeats the prompt (a quotation).
    """
    figures: list[Figure] = []
    found: dict[tuple[str, str, float], list[Decoded]] = {}
    texts = {"": bench.prompts, ", quotation": bench.quotations}
    async with AsyncExitStack() as stack:
        swarms: dict[str, Swarm] = {}
        for label, drafts in (("", 0), (", drafts", SPECULATION_TOKENS)):
            options = ("--speculation-tokens", str(drafts))
            swarms[label] = await stack.enter_async_context(
                Swarm.running(f"delay-{drafts}", bench.model_folder, stages=2, node_options=options, delay_s=0.0)
            )
            await one_stream(swarms[label], bench.prompts[0], WARM_TOKENS)
        for number in range(bench.rounds(3)):
            for seconds in (0.0, *DELAYS_S):
                for proxy in (proxy for swarm in swarms.values() for proxy in swarm.proxies):
                    proxy.delay_s = seconds
                for text, prompts in texts.items():
                    prompt = prompts[number % len(prompts)]
                    sides = (partial(one_stream, swarm, prompt, DELAY_TOKENS) for swarm in swarms.values())
                    for label, answer in zip(swarms, await in_turn(number, *sides)):
                        found.setdefault((text, label, seconds), []).append(answer)
                        progress(
                            f"{1e3 * seconds:.0f} ms a hop{text}{label}: {decode_rate(answer.arrivals):.2f} tokens/s, "
                            f"{answer.accepted} of {answer.drafted} drafts accepted"
                        )
        hops = len(swarms[""].parts)
    rates = {key: [decode_rate(answer.arrivals) for answer in answers] for key, answers in found.items()}
    for text in texts:
        for label in ("", ", drafts"):
            name, without = f"no delay{text}{label}", 1 / statistics.median(rates[text, label, 0.0])
            figures.append(middle(name, rates[text, label, 0.0], "tokens/s"))
            for seconds in DELAYS_S:
                name = f"{1e3 * seconds:.0f} ms a hop{text}{label}"
                limit = 1 / (hops * seconds)
                possible = 1 / (hops * seconds + without)
                note = (
                    f"a token a round, the links alone allow {limit:.4g} tokens/s, with this swarm's own time without "
                    f"delay {possible:.4g}"
                )
                measured = rates[text, label, seconds]
                figures += [
                    middle(name, measured, "tokens/s", None, note),
                    middle(f"{name} / limit of the links", [rate / limit for rate in measured], "ratio"),
                ]
            bench.delays[f"swarm{text}{label}"] = [
                (1e3 * seconds, statistics.median(rates[text, label, seconds])) for seconds in DELAYS_S
            ]
        for seconds in (0.0, *DELAYS_S):
            name = f"{1e3 * seconds:.0f} ms a hop{text}: drafts / none"
            figures.append(ratio(name, rates[text, ", drafts", seconds], rates[text, "", seconds]))
        figures += draft_figures(text, found)
    bench.delays["limit: 1 / sum of the hops"] = [(1e3 * seconds, 1 / (hops * seconds)) for seconds in DELAYS_S]
    return figures


def draft_figures(text: str, found: Mapping[tuple[str, str, float], Sequence[Decoded]]) -> list[Figure]:
    """How many drafts were right, what they saved, and that no answer is another one for them."""
    pairs = [
        (drafted, plain)
        for (kind, label, seconds), answers in found.items()
        if kind == text and label
        for drafted, plain in zip(answers, found[text, "", seconds], strict=True)
    ]
    accepted = [answer.accepted / max(1, answer.drafted) for answer, _ in pairs]
    steps = [len(answer.tokens) / (len(answer.tokens) - answer.accepted) for answer, _ in pairs]
    equal = [float(answer.tokens == plain.tokens) for answer, plain in pairs]
    return [
        middle(f"drafts accepted{text}", accepted, "share"),
        middle(f"tokens a step with drafts{text}", steps, "tokens"),
        Figure(
            f"answers with drafts equal to those without{text}",
            statistics.mean(equal),
            "share",
            min(equal),
            max(equal),
            len(equal),
            "== 1",
        ),
    ]


async def memory(bench: Bench) -> list[Figure]:
    """What a node's process holds over one without a shard, against the bytes of its shard."""
    async with Swarm.running("memory", bench.model_folder, stages=2, spare_nodes=1) as swarm:
        await one_stream(swarm, bench.prompts[0], bench.answer_tokens)
        planned = {part.process for part in swarm.parts}
        (spare,) = [child.process.pid for child in swarm.devnet.nodes if child.process.pid not in planned]
        total, mapped_weights = resident_bytes(spare, bench.model_folder)
        baseline = total - mapped_weights
        ratios, held = [], []
        for part in swarm.parts:
            shard = sum(unit.size_bytes for unit in swarm.manifest.units[part.first_unit : part.end_unit])
            total, mapped_weights = resident_bytes(part.process, bench.model_folder)
            own = total - baseline
            ratios.append(own / shard)
            held.append(
                f"units {part.first_unit}..{part.end_unit - 1}: {own / 1e6:.0f} MB for {shard / 1e6:.0f} MB, "
                f"{mapped_weights / 1e6:.0f} MB of it mapped from weight files"
            )
            progress(held[-1])
    note = (
        f"{'; '.join(held)}; baseline {baseline / 1e6:.0f} MB: a node of the same network that has measured the model"
    )
    return [
        Figure(
            "memory of a node / bytes of its shard, most",
            max(ratios),
            "ratio",
            min(ratios),
            max(ratios),
            len(ratios),
            "<= 1.25",
            f"{note} and serves no stage",
        )
    ]


def draw(bench: Bench) -> None:
    """The pictures of the sections that ran."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    pictures = (
        ("inference-batch.png", bench.curves, "streams at once"),
        ("inference-delay.png", bench.delays, "ms a hop, one way, two hops a token"),
    )
    for file, lines, label in pictures:
        if not lines:
            continue
        picture, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        for name, points in lines.items():
            axis.plot(*zip(*points), marker="o", label=name, linestyle="--" if name.startswith("limit") else "-")
        axis.set_xscale("log", base=2 if file == "inference-batch.png" else 10)
        axis.set_xticks([x for x, _ in max(lines.values(), key=len)])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_ylabel("tokens per second, all streams")
        axis.grid(alpha=0.3)
        axis.legend()
        picture.savefig(FIGURES / file, dpi=130)
        plt.close(picture)


SECTIONS: dict[str, Callable[[Bench], Awaitable[list[Figure]]]] = {
    "stages": stages,
    "streams": streams,
    "batch": batch,
    "int8": int8,
    "hog": hog,
    "delay": delay,
    "memory": memory,
}


async def run(chosen: Sequence[str], quick: bool) -> list[Figure]:
    """The sections, one after the other; the pictures too if the run is complete. SIGTERM ends every process."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    model_folder = prepare(report=progress)
    tokenizer = ChatTokenizer(model_folder)
    prompts = [tokenizer.prompt_token_ids(QUESTION.format(topic=topic)) for topic in TOPICS]
    quotations = [tokenizer.prompt_token_ids(f"Repeat this text word for word:\n\n{text}") for text in QUOTATIONS]
    figures: list[Figure] = []
    async with AsyncExitStack() as stack:
        bench = Bench(model_folder, prompts, quotations, quick, stack)
        for name, section in SECTIONS.items():
            if name in chosen:
                print(f"\n== {name}", flush=True)
                figures += await section(bench)
    if is_complete(chosen, quick):
        draw(bench)
    return figures


def is_complete(chosen: Sequence[str], quick: bool) -> bool:
    """Whether the run is one to keep: what is in the repository must come from one whole run."""
    return list(chosen) == list(SECTIONS) and not quick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {','.join(SECTIONS)}; figures are then printed and not written")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; figures are then printed and not written")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        sys.exit(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    try:
        figures = asyncio.run(run(chosen, options.quick))
    except asyncio.CancelledError:
        sys.exit("ended by a signal; every process was stopped")
    if not figures:
        sys.exit("nothing could be measured; the reason is above")
    met = print_table(figures)
    if is_complete(chosen, options.quick):
        write_result("inference", "none: greedy answers to fixed prompts", figures)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
