"""Accuracy by length and depth as a picture."""

from __future__ import annotations

from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _TOP = 96, 40, 72, 44


def _color(accuracy: float) -> str:
    """From dark red at 0 over yellow to green at 1."""
    stops = ((165, 0, 38), (253, 222, 116), (26, 152, 80))
    place = min(max(accuracy, 0.0), 1.0) * 2
    low, share = (0, place) if place < 1 else (1, place - 1)
    mixed = (round(a + (b - a) * share) for a, b in zip(stops[low], stops[low + 1]))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def heat_map_svg(cells: Sequence[tuple[int, float, float]]) -> str:
    """`cells` are (length in tokens, depth from 0 to 1, accuracy from 0 to 1)."""
    lengths, depths = sorted({cell[0] for cell in cells}), sorted({cell[1] for cell in cells})
    width, height = _LEFT + _WIDTH * len(lengths) + 16, _TOP + _HEIGHT * len(depths) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="8" y="18">depth of the fact, by tokens of the prompt</text>',
    ]
    for row, depth in enumerate(depths):
        y = _TOP + row * _HEIGHT
        parts.append(f'<text x="{_LEFT - 8}" y="{y + _HEIGHT / 2 + 5:.0f}" text-anchor="end">{depth:.0%}</text>')
    for column, length in enumerate(lengths):
        x = _LEFT + (column + 0.5) * _WIDTH
        parts.append(f'<text x="{x:.0f}" y="{_TOP - 8}" text-anchor="middle">{length:,}</text>')
    for length, depth, accuracy in cells:
        x, y = _LEFT + lengths.index(length) * _WIDTH, _TOP + depths.index(depth) * _HEIGHT
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="{_color(accuracy)}"/>'
            f'<text x="{x + _WIDTH / 2:.0f}" y="{y + _HEIGHT / 2 + 4:.0f}" text-anchor="middle">{accuracy:.1%}</text>'
        )
    return "\n".join((*parts, "</svg>")) + "\n"
