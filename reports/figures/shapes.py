"""What every figure is drawn with: text, rules, boxes and markers as strings, and round axis ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 840


@dataclass(frozen=True)
class Mark:
    """One arm's value with its interval, and the words printed beside it."""

    arm: str  # O, U, N or R
    label: str
    value: float
    low: float | None
    high: float | None
    text: str


def svg(name: str, height: float, title: str, body: Sequence[str], width: float = WIDTH) -> Markup:
    """Wrap shapes in an SVG with the patterns they use; ids carry `name`, since a page holds several figures."""
    patterns = (
        f'<defs><pattern id="{name}-O" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)">'
        '<rect width="5" height="5" class="f-o0"/><rect width="2.2" height="5" class="f-o"/></pattern>'
        f'<pattern id="{name}-R" width="4" height="4" patternUnits="userSpaceOnUse">'
        '<rect width="4" height="4" class="f-r0"/><circle cx="2" cy="2" r="1" class="f-r"/></pattern></defs>'
    )
    return Markup(
        f'<svg viewBox="0 0 {px(width)} {px(height)}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{patterns}{"".join(body)}</svg>'
    )


def px(value: float) -> str:
    """Coordinates with one decimal at most."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Text, escaped."""
    css = f' class="{kind}"' if kind else ""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{px(x)}" y="{px(y)}"{css}{side}>{escape(text)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of a style."""
    return f'<line x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}" class="{kind}"/>'


def rect(x: float, y: float, width: float, height: float, attributes: str) -> str:
    """A box."""
    return f'<rect x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}" {attributes}/>'


def marker(arm: str, x: float, y: float) -> str:
    """Original: open circle; edited: filled circle; control: square; reference: diamond."""
    if arm == "N":
        return rect(x - 4, y - 4, 8, 8, 'class="m-n"')
    if arm == "R":
        points = f"{px(x)},{px(y - 5.5)} {px(x + 5.5)},{px(y)} {px(x)},{px(y + 5.5)} {px(x - 5.5)},{px(y)}"
        return f'<polygon points="{points}" class="m-r"/>'
    return f'<circle cx="{px(x)}" cy="{px(y)}" r="4.5" class="m-{arm.lower()}"/>'


def tick(value: float, *, sign: bool = False) -> str:
    """An axis label."""
    text = f"{value:g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"+{text}" if sign and value > 0 else text


def decade(value: float) -> str:
    """The label of a power of ten."""
    power = round(math.log10(value))
    return f"{value:g}" if -2 <= power <= 3 else f"1e{power}".replace("-", "−")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    raw = (high - low) / count
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{index * step:.6g}") + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]
