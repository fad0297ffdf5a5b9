from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from reports.figures import Mark, Row, bars, describe, dumbbells, heat_map, key, ticks

HOSTILE = "</svg><script>&\"'"


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def widths(svg: str, fill: str) -> list[float]:
    return [float(found) for found in re.findall(rf'width="([\d.]+)" height="11" {re.escape(fill)}', svg)]


def test_bars_are_proportional_and_well_formed() -> None:
    marks = [Mark("O", "Before", 0.8, 0.6, 0.9, "0.800"), Mark("U", "After", 0.2, 0.1, 0.3, "0.200")]
    svg = bars("x", HOSTILE, [Row(HOSTILE, "note", marks, (0.1, 0.2), 0.5)], unit=True)
    parse(svg)
    assert "<script" not in svg
    before, after = widths(svg, 'fill="url(#x-O)"')[0], widths(svg, 'class="f-u"')[0]
    assert before == pytest.approx(4 * after, abs=0.2)


def test_values_outside_the_axis_stay_inside_the_drawing() -> None:
    svg = bars("x", "t", [Row("a", "", [Mark("O", "Before", 1.7, -0.2, 1.9, "")])], unit=True)
    xs = [float(x) for x in re.findall(r' x[12]?="([-\d.]+)"', svg)]
    assert min(xs) >= 0
    assert max(xs) <= 840


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-9, 1e9])
def test_one_value_without_interval_still_has_an_axis(value: float) -> None:
    for differences in (False, True):
        parse(
            bars(
                "x",
                "t",
                [Row("a", "", [Mark("U", "Change", value, None, None, "")])],
                unit=False,
                differences=differences,
            )
        )


def test_heat_map_darkens_with_the_value_and_outlines_the_rest() -> None:
    svg = heat_map(
        "h", "t", {("attention q", 0): 0.02, ("attention q", 1): 0.01, ("attention q", 2): 0.0}, ["attention q"], 3
    )
    parse(svg)
    opacity = [float(found) for found in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    assert opacity[0] == 1.0
    assert opacity[0] > opacity[1] > 0
    assert svg.count('class="cold"') == 2  # the third block, and the legend


def test_many_blocks_fit_the_width() -> None:
    cells = {("feed-forward up", block): block / 200 for block in range(200)}
    svg = heat_map("h", "t", cells, ["feed-forward up"], 200)
    right = max(float(x) + float(w) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg))
    assert right <= 840


def test_dumbbells_escape_their_labels() -> None:
    svg = dumbbells(
        "d",
        "t",
        [(HOSTILE, [Mark("O", "Before", 0.9, None, None, ""), Mark("R", "Reference", 0.1, None, None, "")])],
        0.2,
    )
    parse(svg)
    assert "<script" not in svg
    parse(f"<p>{key([('O', HOSTILE), ('-', 'Control')])}</p>")


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-0.1, 0.1) == [-0.1, -0.05, 0.0, 0.05, 0.1]
    assert ticks(3, 3) == [3]
    for low, high in ((0.013, 0.0171), (-512, 3), (1e-12, 9e-12)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        assert all(low <= tick <= high for tick in found)


def test_the_text_alternative_holds_every_value() -> None:
    text = describe(
        [Row("Loss", "", [Mark("O", "Before", 0.5, None, None, ""), Mark("U", "After", 2.5, None, None, "2.500")])]
    )
    assert text == "Loss: before 0.500, after 2.500"
