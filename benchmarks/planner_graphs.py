"""Sections 3 and 4 of the planner benchmark: graphs at size, and correctness against brute force.

Section 3 plans captured networks and random layered DAGs, and reports found over bound. Machines are alike: a
network's operator takes as long as its floating-point operations or the bytes it touches need, whichever is longer, on
a machine of `FLOPS` and `MEMORY_BANDWIDTH`, so that figures do not depend on the load of the machine that captures;
links are of 1 and 10 Gbit/s. A random operator's work and output are log-normal; all outputs together take 1 % or 10 %
of the time of all work to send once. Latency is none, as in the cost model of the figure that is the goal. Section 4
compares exact search with an enumeration of all partitions that shares no code with it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bsns.planning import bounds, genetic, milp, slice_graph
from bsns.planning.problem import (
    SECOND_NS,
    Link,
    Links,
    Partition,
    PlanningNode,
    Problem,
    Terms,
    Transfers,
    evaluate,
)
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import ModelGraph, Operator, Tensor

if TYPE_CHECKING:
    from torch import nn

FIGURE: Final = Path("docs/figures/planner-graphs.png")
GOAL: Final = 0.945
GOAL_STAGES: Final = 16
FLOPS: Final = 50_000_000_000
MEMORY_BANDWIDTH: Final = 10_000_000_000
LINKS: Final = {"1 Gbit/s": 125_000_000, "10 Gbit/s": 1_250_000_000}
RATIOS: Final = {"1 %": 0.01, "10 %": 0.1}
SIZES: Final = (50, 100, 200, 500, 1_000, 2_000)
OTHER_STAGES: Final = (2, 4, 8, 32)
WORKERS: Final = 2
TOKENS: Final = 64

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One instance: a graph with its operators' times, and how it is planned."""

    family: str
    regime: str
    graph: ModelGraph
    bytes_per_second: int
    stages: int
    transfers: Transfers
    plan_seconds: float
    bound_seconds: float

    def problem(self) -> Problem:
        times = {item.timing_key: item.nanoseconds for item in self.graph.operators}
        nodes = (
            PlanningNode(address((number + 1).to_bytes(20, "big")), 2**60, bytes(32), times)
            for number in range(self.stages)
        )
        terms = Terms(spread_leftover=False, free_order=True, transfers=self.transfers)
        return Problem(self.graph, tuple(nodes), Links(Link(0, self.bytes_per_second)), terms=terms)


# -------------------------------------------------------------------------------------------------------- the graphs


def layered(count: int, width: int, ratio: float, seed: int) -> ModelGraph:
    """A random layered DAG: layers of 1 to 2·width - 1 operators; each reads one to three outputs, four in five of the
    layer before and the others of up to four layers before. Sends at SECOND_NS bytes a second, one byte a nanosecond.
    """
    draw = np.random.default_rng([seed, count, width])
    layers: list[list[int]] = []
    placed = 0
    while placed < count:
        size = min(count - placed, int(draw.integers(1, 2 * width)))
        layers.append(list(range(placed, placed + size)))
        placed += size
    readers: list[set[int]] = [set() for _ in range(count)]
    for depth in range(1, len(layers)):
        for operator in layers[depth]:
            readers[int(draw.choice(layers[depth - 1]))].add(operator)
            for _ in range(int(draw.integers(0, 3))):
                back = 1 if draw.random() < 0.8 else int(draw.integers(1, min(depth, 4) + 1))
                readers[int(draw.choice(layers[depth - back]))].add(operator)
    work = np.maximum(1, 1e6 * draw.lognormal(0, 0.5, count)).astype(np.int64)
    share = draw.lognormal(0, 0.5, count)
    sizes = np.maximum(1, share / share.sum() * ratio * work.sum()).astype(np.int64)
    return ModelGraph(
        f"layered-{count}-{width}-{seed}",
        tuple(Operator(f"v{v}", f"v{v}", int(work[v]), nanoseconds=int(work[v])) for v in range(count)),
        tuple(Tensor(f"t{v}", v, tuple(sorted(readers[v])), int(sizes[v]), not readers[v]) for v in range(count)),
    )


def captured(name: str) -> ModelGraph:
    """A network of `NETWORKS`, captured for one row, with times of the machine that the module describes."""
    import torch

    from bsns.runtime.capture import capture

    torch.manual_seed(0)
    module, inputs = NETWORKS[name]()
    graph = capture(module, inputs, name=name).graph
    moved = [0] * len(graph.operators)
    for tensor in graph.tensors:
        for place in (*tensor.consumers, tensor.producer):
            if place >= 0:
                moved[place] += tensor.size_bytes
    for place, operator in enumerate(graph.operators):
        moved[place] += sum(graph.parameters[item].size_bytes for item in set(operator.parameters))
    operators = tuple(
        Operator(
            item.name,
            f"operator-{place}",
            item.work,
            nanoseconds=max(1, item.work * SECOND_NS // FLOPS, moved[place] * SECOND_NS // MEMORY_BANDWIDTH),
        )
        for place, item in enumerate(graph.operators)
    )
    return ModelGraph(name, operators, graph.tensors)


def _residual() -> tuple[nn.Module, tuple[Any, ...]]:
    """ResNet-18's shape, images of 112 by 112."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after))
            self.shortcut = nn.Conv2d(before, after, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.second(self.first(images)) + self.shortcut(images))

    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in pairwise((64, *widths))]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1_000))
    return nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.MaxPool2d(3, 2, 1), *blocks, *head), (
        torch.randn(2, 3, 112, 112),
    )


def _unet() -> tuple[nn.Module, tuple[Any, ...]]:
    """Four levels with a skip each, images of 64 by 64."""
    import torch
    from torch import nn

    def double(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, 1, 1), nn.ReLU(), nn.Conv2d(after, after, 3, 1, 1), nn.ReLU())

    class Level(nn.Module):
        def __init__(self, before: int, width: int, below: nn.Module) -> None:
            super().__init__()
            self.down, self.below = double(before, width), nn.Sequential(nn.MaxPool2d(2), below)
            self.raised = nn.ConvTranspose2d(2 * width, width, 2, 2)
            self.up = double(2 * width, width)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            skip = self.down(images)
            return self.up(torch.cat([skip, self.raised(self.below(skip))], 1))

    network: nn.Module = double(128, 256)
    for before, width in ((64, 128), (32, 64), (16, 32), (1, 16)):
        network = Level(before, width, network)
    return nn.Sequential(network, nn.Conv2d(16, 2, 1)), (torch.randn(2, 1, 64, 64),)


def _efficientnet() -> tuple[nn.Module, tuple[Any, ...]]:
    import torch

    from bsns.runtime.exported_models import load_efficientnet_lite0

    return load_efficientnet_lite0(), (torch.randn(2, 3, 224, 224),)


def _transformer(kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The shapes of MiniLM-L6, ViT-Tiny, half of GPT-2, and a third of SmolLM2-135M."""
    import torch
    import transformers
    from torch import nn

    if kind == "minilm-l6":
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1_536
        )
        model, field = transformers.BertModel(config, add_pooling_layer=False), "last_hidden_state"
    elif kind == "vit-tiny":
        config = transformers.ViTConfig(
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768
        )
        model, field = transformers.ViTForImageClassification(config), "logits"
    elif kind == "gpt2-half":
        model, field = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=6)), "logits"
    else:
        config = transformers.LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=10, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        model, field = transformers.LlamaForCausalLM(config), "logits"
    cached = {"use_cache": False} if kind in ("gpt2-half", "smollm2-third") else {}

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = getattr(self.model(inputs, **cached), field)
            return output

    inputs = torch.randn(2, 3, 224, 224) if kind == "vit-tiny" else torch.randint(0, 1_000, (2, TOKENS))
    return Output(), (inputs,)


NETWORKS: Final[dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]] = {
    "resnet-18": _residual,
    "unet": _unet,
    "efficientnet-lite0": _efficientnet,
    "minilm-l6": lambda: _transformer("minilm-l6"),
    "vit-tiny": lambda: _transformer("vit-tiny"),
    "gpt2-half": lambda: _transformer("gpt2-half"),
    "smollm2-third": lambda: _transformer("smollm2-third"),
}


# --------------------------------------------------------------------------------------------------------- section 3


def cases(networks: Sequence[ModelGraph], seed: int, effort: float) -> Iterator[Case]:
    """All of section 3. Narrow random graphs are as wide as networks are, wide ones as wide as the square root of n."""

    def case(family: str, regime: str, graph: ModelGraph, rate: int, stages: int, transfers: Transfers) -> Case:
        plan, bound = (5.0, 9.0) if stages == GOAL_STAGES and family != "captured" else (2.0, 2.0)
        return Case(family, regime, graph, rate, stages, transfers, plan * effort, bound * effort)

    for transfers in Transfers:
        for graph in networks:
            for name, rate in LINKS.items():
                yield case("captured", name, graph, rate, GOAL_STAGES, transfers)
        for count in SIZES:
            for family, width in (("narrow", 3), ("wide", math.isqrt(count))):
                for name, ratio in RATIOS.items():
                    yield case(family, name, layered(count, width, ratio, seed), SECOND_NS, GOAL_STAGES, transfers)
    for stages in OTHER_STAGES:
        for graph in networks:
            yield case("captured", "10 Gbit/s", graph, LINKS["10 Gbit/s"], stages, Transfers.RELAYED)
        for count in (100, 500):
            for family, width in (("narrow", 3), ("wide", math.isqrt(count))):
                for name, ratio in RATIOS.items():
                    graph = layered(count, width, ratio, seed)
                    yield case(family, name, graph, SECOND_NS, stages, Transfers.RELAYED)


def measure(case: Case) -> dict[str, Any]:
    """Plan one case: baselines, plain slicing, what genetic search and then the bound's search find, and the bound."""
    problem = case.problem()
    started = time.perf_counter()
    plain = slice_graph.solve(problem)
    sliced = time.perf_counter()
    found = genetic.solve(problem, seed=0, deadline_s=case.plan_seconds)
    planned = time.perf_counter()
    final = bounds.certify(problem, found, effort_s=case.bound_seconds)
    slowest = max(final.stages, key=lambda stage: stage.effective_ns)
    return {
        "family": case.family,
        "regime": case.regime,
        "graph": case.graph.name,
        "operators": len(case.graph.operators),
        "stages": case.stages,
        "transfers": case.transfers.value,
        "value_ns": final.value_ns,
        "bound_ns": final.lower_bound_ns,
        "bound": final.bound,
        "ratio": final.ratio,
        "simple_ratio": bounds.lower_bound(problem)[0] / final.value_ns,
        "communication": 1 - slowest.compute_ns / final.value_ns,
        "genetic_over_final": found.value_ns / final.value_ns,
        "slicing_over_final": plain.value_ns / final.value_ns,
        "equal_work_over_final": _equal_shares(problem, by_work=True).value_ns / final.value_ns,
        "equal_count_over_final": _equal_shares(problem, by_work=False).value_ns / final.value_ns,
        "slicing_s": sliced - started,
        "planning_s": planned - sliced,
        "bounding_s": time.perf_counter() - planned,
    }


def _equal_shares(problem: Problem, *, by_work: bool) -> Partition:
    """The baselines: the graph's own order in stages of equal work, or of equally many operators."""
    weights = problem.times[0] if by_work else np.ones(len(problem.graph.operators))
    share = (np.cumsum(weights) - weights / 2) / weights.sum()
    stage = np.minimum((share * problem.maximum_stages).astype(int), problem.maximum_stages - 1)
    ends = [int(np.searchsorted(stage, number, side="right")) for number in range(problem.maximum_stages)]
    cuts = [(first, end) for first, end in pairwise([0, *ends]) if first < end]
    stages = [(first, end, (node,)) for (first, end), node in zip(cuts, problem.nodes)]
    order = range(len(problem.graph.operators))
    return evaluate(problem, order, stages, lower_bound_ns=0, bound="", solver="equal shares")


def section_graphs(progress: Progress, *, seed: int = 0, effort: float = 1.0) -> dict[str, Any]:
    """Figures of section 3; `effort` scales the time for each instance. About ten minutes on two cores."""
    networks = []
    for name in NETWORKS:
        networks.append(captured(name))
        progress(f"captured {name}: {len(networks[-1].operators)} operators")
    planned = list(cases(networks, seed, effort))
    rows = []
    for number, row in enumerate(_in_parallel(measure, planned)):
        rows.append(row)
        progress(
            f"{number + 1}/{len(planned)} {row['graph']} {row['regime']} {row['transfers']} k={row['stages']}: "
            f"bound/found {row['ratio']:.3f} ({row['bound']})"
        )
    at_goal = [row for row in rows if row["stages"] == GOAL_STAGES]
    overall = _geomean([row["ratio"] for row in at_goal])
    return {
        "goal": GOAL,
        "geomean": overall,
        "reached": overall >= GOAL,
        "geomean_captured": _geomean([row["ratio"] for row in at_goal if row["family"] == "captured"]),
        "geomean_random": _geomean([row["ratio"] for row in at_goal if row["family"] != "captured"]),
        "geomean_simple_bound": _geomean([row["simple_ratio"] for row in at_goal]),
        "by_regime": {
            " ".join(key): {
                "instances": len(group),
                "geomean": _geomean([row["ratio"] for row in group]),
                "worst": min(row["ratio"] for row in group),
                "proven_optimal": sum(row["ratio"] > 0.9999 for row in group),
                "communication": float(np.mean([row["communication"] for row in group])),
            }
            for key, group in _grouped(at_goal, ("family", "regime", "transfers"))
        },
        "by_stages": {
            str(stages[0]): _geomean([row["ratio"] for row in group])
            for stages, group in _grouped([row for row in rows if row["transfers"] == "relayed"], ("stages",))
        },
        "over_found": {
            name: _geomean([row[f"{name}_over_final"] for row in at_goal])
            for name in ("genetic", "slicing", "equal_work", "equal_count")
        },
        "rows": rows,
    }


def _in_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    # One thread each, set before the workers load numpy.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, items)


def _grouped(
    rows: Sequence[dict[str, Any]], keys: tuple[str, ...]
) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return sorted(groups.items())


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# --------------------------------------------------------------------------------------------------------- section 4


def section_brute_force(progress: Progress, *, count: int = 1_000, seed: int = 0) -> dict[str, Any]:
    """Figures of section 4: mismatches of the exact search with brute force over `count` graphs of 3 to 10 operators,
    and of the integer programme and the genetic search (one generation) over every tenth.
    """
    rows = []
    for row in _in_parallel(_compare, [(seed, number) for number in range(count)]):
        rows.append(row)
        if len(rows) % 100 == 0:
            progress(f"{len(rows)}/{count} graphs against brute force")
    tenth = [row for row in rows if row["milp"] is not None]
    return {
        "graphs": count,
        "mismatches": sum(row["exact"] != row["optimum"] for row in rows),
        "bounds_above_optimum": sum(row["bound"] > row["optimum"] for row in rows),
        "not_certified": sum(row["bound"] < row["optimum"] for row in rows),
        "milp_graphs": len(tenth),
        "milp_mismatches": sum(row["milp"] != row["optimum"] for row in tenth),
        "genetic_below_optimum": sum(row["genetic"] < row["optimum"] for row in tenth),
        "genetic_optimal": sum(row["genetic"] == row["optimum"] for row in tenth) / len(tenth),
    }


def _compare(numbers: tuple[int, int]) -> dict[str, int | None]:
    seed, number = numbers
    draw = np.random.default_rng([seed, number])
    count = int(draw.integers(3, 11))
    stages = int(draw.integers(2, 5 if count < 9 else 4))
    ratio = float(draw.choice([0.05, 0.3, 1.0]))
    graph = layered(count, int(draw.integers(1, 4)), ratio, int(draw.integers(2**31)))
    transfers = list(Transfers)[number % 2]
    problem = Case("small", "", graph, SECOND_NS, stages, transfers, 0, 0).problem()
    plain = slice_graph.solve(problem)
    found = genetic.solve(problem, generations=1, seed=number).value_ns if number % 10 == 0 else None
    exact = bounds.certify(problem, plain, effort_s=60)
    programme = milp.solve(problem, time_limit_s=60).value_ns if number % 10 == 0 else None
    return {
        "optimum": enumerated_optimum(graph, stages, transfers),
        "exact": exact.value_ns,
        "bound": exact.lower_bound_ns,
        "genetic": found,
        "milp": programme,
    }


def enumerated_optimum(graph: ModelGraph, stages: int, transfers: Transfers) -> int:
    """The least largest stage over all assignments of operators to `stages` that ascend along edges, at one nanosecond
    a byte. All assignments are rows of one table, extended by one operator at a time.
    """
    rows = np.zeros((1, 0), np.int64)
    for before in graph.predecessors():
        rows = np.concatenate([np.insert(rows, rows.shape[1], stage, axis=1) for stage in range(stages)])
        for predecessor in before:
            rows = rows[rows[:, predecessor] <= rows[:, -1]]
    work = np.array([item.nanoseconds for item in graph.operators])
    slowest = np.zeros(len(rows), np.int64)
    for stage in range(stages):
        cost = (rows == stage) @ work
        for tensor in graph.tensors:
            if not tensor.consumers:
                continue
            made, read = rows[:, tensor.producer], rows[:, list(tensor.consumers)]
            last = read.max(axis=1)
            if transfers is Transfers.RELAYED:
                passes = 1 * ((made < stage) & (stage <= last)) + ((made <= stage) & (stage < last))
            else:
                passes = 1 * ((made != stage) & (read == stage).any(1)) + ((made == stage) & (last != stage))
            cost = cost + passes * tensor.size_bytes
        # A stage without operators is left out of the chain.
        slowest = np.maximum(slowest, np.where((rows == stage).any(1), cost, 0))
    return int(slowest.min())


# -------------------------------------------------------------------------------------------------------------- plot


def plot(figures: dict[str, Any], path: Path = FIGURE) -> None:
    """Bound over found by number of stages, and by size at 16 stages, one colour for each family."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = figures["rows"]
    colours = {"captured": "#1b6ca8", "narrow": "#3a9d5d", "wide": "#d1622b"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for place, (family, colour) in enumerate(colours.items()):
        own = [row for row in rows if row["family"] == family]
        chosen = [row for row in own if row["transfers"] == "relayed"]
        shift = 1.06 ** (place - 1)
        left.scatter([row["stages"] * shift for row in chosen], [row["ratio"] for row in chosen], s=16, color=colour)
        left.plot([], [], "o", color=colour, label=f"{family} graphs")
        for heavy in (False, True):
            part = [
                row for row in own if row["stages"] == GOAL_STAGES and (row["regime"] in ("1 Gbit/s", "10 %")) == heavy
            ]
            right.scatter(
                [row["operators"] * shift for row in part],
                [row["ratio"] for row in part],
                s=28,
                marker="^" if heavy else "o",
                facecolor="none" if not heavy else colour,
                edgecolor=colour,
            )
    right.plot([], [], "k^", label="1 Gbit/s, or 10 % communication")
    right.plot([], [], "ko", markerfacecolor="none", label="10 Gbit/s, or 1 % communication")
    for axis, label in ((left, "stages k"), (right, f"operators (k = {GOAL_STAGES})")):
        axis.set_xscale("log", base=2 if axis is left else 10)
        axis.axhline(GOAL, color="grey", linewidth=1, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.legend(loc="lower left", fontsize=8)
    stages = sorted({row["stages"] for row in rows})
    left.set_xticks(stages, [str(item) for item in stages])
    left.set_ylabel("proven bound / found")
    left.set_title("Relayed transfers, by number of stages", fontsize=10)
    right.set_title(f"Both transfer models; geomean {figures['geomean']:.3f}, goal {GOAL} (dashed)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Both sections by themselves, figures to the standard output."""

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    graphs, small = section_graphs(progress), section_brute_force(progress)
    plot(graphs)
    print(json.dumps({"graphs": {**graphs, "rows": len(graphs["rows"])}, "brute_force": small}, indent=2))
    return 0 if graphs["reached"] and not small["mismatches"] else 1


if __name__ == "__main__":
    sys.exit(main())
