"""A scatter plot as SVG, with nothing but the standard library."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#882255")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 760, 460, 70, 50, 40
_RIGHT = 190


def scatter(
    path: Path, title: str, x_label: str, y_label: str, points: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Draw series of points; x from 0 to 1, y on a logarithmic scale with a line at 1.

    Args:
        path: Where to write the SVG.
        points: Points `(x, y)` by the name of their series; y must be above 0.
    """
    values = [y for series in points.values() for _, y in series if y > 0] or [1.0]
    low, high = math.floor(math.log2(min([*values, 1.0]))), math.ceil(math.log2(max([*values, 2.0])))

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log2(y) - low) / (high - low)
        return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'

    parts = [text(_WIDTH / 2, 20, title), text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label)]
    parts.append(text(10, _TOP - 12, y_label, "start"))
    for tick in range(low, high + 1):
        (x0, y), (x1, _) = at(0, 2.0**tick), at(1, 2.0**tick)
        parts.append(f'<path d="M{x0:.1f} {y:.1f}H{x1:.1f}" stroke="{"#000" if tick == 0 else "#ddd"}"/>')
        parts.append(text(x0 - 6, y + 4, f"{2.0**tick:g}", "end"))
    for tenth in range(0, 11, 2):
        x, y = at(tenth / 10, 2.0**low)
        parts.append(text(x, y + 18, f"{tenth / 10:g}"))
    for index, (name, series) in enumerate(points.items()):
        color = _COLORS[index % len(_COLORS)]
        x, y = _WIDTH - _RIGHT + 20, _TOP + 20 * index
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{color}"/>')
        parts.append(text(x + 10, y, name, "start"))
        for point in series:
            if point[1] > 0:
                cx, cy = at(*point)
                parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{color}"/>')
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
