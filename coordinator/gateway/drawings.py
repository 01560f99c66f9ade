"""Pictures of the explorer as SVG: the swarm, charts over time, the states of a request.

Owns geometry. Promises that every text in a picture is escaped, that each picture has a title and a description for who
cannot see it, and that colours come from the stylesheet alone (a page may have no inline style). Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup, escape

WIDTH: Final = 640
CHART_HEIGHT: Final = 180
BUCKETS: Final = 48
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 12, 24
_STEPS: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 43_200, 86_400, 604_800)


@dataclass(frozen=True, slots=True)
class SwarmNode:
    """One node. `stages` of the plan that it serves; none: it waits. `stake` in wei."""

    address: str
    status: str
    stake: int
    stages: tuple[int, ...]
    units: str
    cluster: int = 0


@dataclass(frozen=True, slots=True)
class SwarmLink:
    """Activations go from one node to the other; seconds of a hop, None where nobody measured it."""

    source: str
    target: str
    seconds: float | None


def _picture(width: int, height: int, title: str, description: str, parts: Iterable[str], kind: str) -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}. '
        f'{escape(description)}"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def swarm(nodes: Sequence[SwarmNode], links: Sequence[SwarmLink], stage_count: int) -> Markup:
    """Columns are the stages of the plan, circles its replicas, as large as their stake; below, who waits."""
    columns: dict[int, list[SwarmNode]] = {stage: [] for stage in range(stage_count)}
    waiting = []
    for node in nodes:
        if node.stages:
            columns[node.stages[0]].append(node)
        else:
            waiting.append(node)
    rows = max([1, *(len(items) for items in columns.values())])
    per_row = 10
    below = math.ceil(len(waiting) / per_row)
    row_height = 84
    height = 44 + rows * row_height + (below * row_height + 26 if waiting else 0)
    largest = max([1, *(node.stake for node in nodes)])
    places: dict[str, tuple[float, float, float]] = {}
    parts: list[str] = []
    for stage, items in columns.items():
        x = WIDTH * (stage + 0.5) / max(1, stage_count)
        parts.append(f'<text class="label" x="{x:.0f}" y="18" text-anchor="middle">stage {stage}</text>')
        for row, node in enumerate(items):
            y = 44 + row_height * (row + (rows - len(items)) / 2) + 26
            places[node.address] = (x, y, 10 + 12 * math.sqrt(node.stake / largest))
    first_below = 44 + rows * row_height
    if waiting:
        parts.append(f'<text class="label" x="8" y="{first_below + 8}">not in the plan</text>')
    for number, node in enumerate(waiting):
        x = WIDTH * (number % per_row + 0.5) / per_row
        y = first_below + 44 + row_height * (number // per_row)
        places[node.address] = (x, y, 10 + 12 * math.sqrt(node.stake / largest))
    for link in links:
        if link.source in places and link.target in places and link.source != link.target:
            (x1, y1, _), (x2, y2, _) = places[link.source], places[link.target]
            shown = "not measured" if link.seconds is None else f"{link.seconds * 1e3:.2f} ms a hop"
            kind = "link unmeasured" if link.seconds is None else "link"
            back = x2 < x1
            # The way back to the first stage goes round below, so that it is told from the way there.
            bend = f"Q {(x1 + x2) / 2:.1f} {max(y1, y2) + 46:.1f} {x2:.1f} {y2:.1f}" if back else f"L {x2:.1f} {y2:.1f}"
            parts.append(
                f'<path class="{kind}{" back" if back else ""}" d="M {x1:.1f} {y1:.1f} {bend}"><title>'
                f"{escape(_short(link.source))} to {escape(_short(link.target))}: {shown}</title></path>"
            )
    for node in nodes:
        x, y, radius = places[node.address]
        parts.append(
            f'<a href="/nodes/{escape(node.address)}">'
            f'<circle class="node {escape(node.status)} cluster-{node.cluster % 6}"'
            f' cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(node.address)}, {escape(node.status)}, '
            f"{node.stake / 1e18:.4g} ETH staked{', units ' + escape(node.units) if node.units else ''}"
            "</title></circle>"
            f'<text class="name" x="{x:.1f}" y="{y + radius + 13:.1f}" text-anchor="middle">'
            f"{escape(_short(node.address))}</text></a>"
        )
    served = sum(bool(node.stages) for node in nodes)
    description = f"{len(nodes)} nodes, {served} of them serve {stage_count} stages"
    return _picture(WIDTH, height, "The swarm and its current plan", description, parts, "swarm")


def bars(title: str, unit: str, series: Mapping[str, Sequence[tuple[int, float]]], *, now: int) -> Markup:
    """Stacked bars over time: amounts (Unix second, value) by name, added up in equal spans up to `now`."""
    moments = [at for points in series.values() for at, _ in points]
    if not moments:
        return _empty(title)
    span = _span(max(1, now - min(moments)))
    first = now - span * BUCKETS
    sums = {name: [0.0] * BUCKETS for name in series}
    for name, points in series.items():
        for at, value in points:
            place = (at - first - 1) // span
            if 0 <= place < BUCKETS:
                sums[name][place] += value
    # Room for the legend.
    top = 1.2 * max([1.0, *(sum(sums[name][place] for name in sums) for place in range(BUCKETS))])
    width = (WIDTH - _LEFT - _RIGHT) / BUCKETS
    parts = [*_axes(top, unit, first, now)]
    for place in range(BUCKETS):
        base = float(CHART_HEIGHT - _BOTTOM)
        for number, name in enumerate(sums):
            value = sums[name][place]
            height = value / top * (CHART_HEIGHT - _TOP - _BOTTOM)
            if height > 0:
                base -= height
                parts.append(
                    f'<rect class="series-{number}" x="{_LEFT + place * width + 0.5:.2f}" y="{base:.2f}" '
                    f'width="{width - 1:.2f}" height="{height:.2f}"><title>{escape(name)}: {value:g} {escape(unit)}'
                    f"</title></rect>"
                )
    if len(sums) > 1:
        parts += _legend(list(sums))
    total = ", ".join(f"{name} {sum(values):g}" for name, values in sums.items())
    return _picture(WIDTH, CHART_HEIGHT, title, f"{total} {unit} since {_clock(first)}", parts, "chart")


def steps(title: str, unit: str, points: Sequence[tuple[int, float]], *, now: int) -> Markup:
    """A value that stays until it changes: (Unix second, value), the oldest first."""
    if not points:
        return _empty(title)
    first = points[0][0]
    span = max(1, now - first)
    top = max(1e-12, *(value for _, value in points), points[0][1]) * 1.1

    def x_of(at: int) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (at - first) / span

    def y_of(value: float) -> float:
        return CHART_HEIGHT - _BOTTOM - value / top * (CHART_HEIGHT - _TOP - _BOTTOM)

    path = [f"M {x_of(first):.1f} {y_of(points[0][1]):.1f}"]
    for at, value in points[1:]:
        path.append(f"H {x_of(at):.1f} V {y_of(value):.1f}")
    path.append(f"H {x_of(now):.1f}")
    parts = [*_axes(top, unit, first, now), f'<path class="line" d="{" ".join(path)}"/>']
    return _picture(WIDTH, CHART_HEIGHT, title, f"now {points[-1][1]:g} {unit}", parts, "chart")


def states(reached: Mapping[str, str], current: str) -> Markup:
    """The states of a request as boxes: `reached` with what is written under them, `current` among them."""
    way = ("Open", "Routed", "Committed", "Verified", "Settled")
    exits = ("Expired", "Refunded")
    width, gap, height = 104, 24, 150
    parts = [
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" '
        'orient="auto"><path class="tip" d="M0 0 L6 3 L0 6 z"/></marker></defs>'
    ]

    def box(name: str, x: float, y: float) -> None:
        kind = "current" if name == current else "reached" if name in reached else "ahead"
        parts.append(
            f'<g class="state {kind}"><rect x="{x}" y="{y}" width="{width}" height="44" rx="6"/>'
            f'<text x="{x + width / 2}" y="{y + 19}" text-anchor="middle">{name}</text>'
            f'<text class="when" x="{x + width / 2}" y="{y + 35}" text-anchor="middle">{escape(reached.get(name, ""))}'
            "</text></g>"
        )

    for number in range(len(way) - 1):
        x = number * (width + gap) + width
        parts.append(f'<path class="arrow" marker-end="url(#tip)" d="M {x} 30 H {x + gap - 2}"/>')
    for number in range(4):
        middle = number * (width + gap) + width / 2
        parts.append(f'<path class="arrow faint" d="M {middle} 52 V 84 H {2 * (width + gap) + width / 2}"/>')
    parts.append(f'<path class="arrow faint" marker-end="url(#tip)" d="M {2 * (width + gap) + width / 2} 84 V 96"/>')
    x = 2 * (width + gap) + width
    parts.append(f'<path class="arrow" marker-end="url(#tip)" d="M {x} 120 H {x + gap - 2}"/>')
    for number, name in enumerate(way):
        box(name, number * (width + gap), 8)
    for number, name in enumerate(exits):
        box(name, (2 + number) * (width + gap), 98)
    described = ", ".join(f"{name} {when}" for name, when in reached.items())
    return _picture(5 * width + 4 * gap, height, f"The request is {current}", described, parts, "states")


def _axes(top: float, unit: str, first: int, last: int) -> list[str]:
    bottom = CHART_HEIGHT - _BOTTOM
    parts = [f'<path class="axis" d="M {_LEFT} {_TOP} V {bottom} H {WIDTH - _RIGHT}"/>']
    for part in (0, 0.5, 1):
        y = bottom - part * (bottom - _TOP)
        parts.append(
            f'<text class="tick" x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_amount(top * part)}</text>'
        )
        if part:
            parts.append(f'<path class="grid" d="M {_LEFT} {y:.1f} H {WIDTH - _RIGHT}"/>')
    parts.append(f'<text class="tick" x="{_LEFT}" y="{CHART_HEIGHT - 6}">{_clock(first)}</text>')
    parts.append(
        f'<text class="tick" x="{WIDTH - _RIGHT}" y="{CHART_HEIGHT - 6}" text-anchor="end">{_clock(last)} UTC, '
        f"{escape(unit)}</text>"
    )
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], _LEFT + 8
    for number, name in enumerate(names):
        parts.append(f'<rect class="series-{number}" x="{x}" y="2" width="9" height="9"/>')
        parts.append(f'<text class="tick" x="{x + 13}" y="10">{escape(name)}</text>')
        x += 13 + 7 * len(name) + 14
    return parts


def _empty(title: str) -> Markup:
    text = f'<text class="label" x="{WIDTH / 2}" y="{CHART_HEIGHT / 2}" text-anchor="middle">nothing yet</text>'
    return _picture(WIDTH, CHART_HEIGHT, title, "nothing yet", [text], "chart")


def _span(seconds: int) -> int:
    """The least round span of which `BUCKETS` hold so many seconds."""
    return next((step for step in _STEPS if step * BUCKETS >= seconds), math.ceil(seconds / BUCKETS))


def _amount(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _clock(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%d %b %H:%M:%S" if at % 60 else "%d %b %H:%M")


def _short(address: str) -> str:
    return f"{address[:6]}…{address[-4:]}"
