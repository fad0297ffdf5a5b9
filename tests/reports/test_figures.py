from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from reports.figures import (
    Axis,
    Curve,
    Mark,
    Row,
    bars,
    columns,
    curves,
    describe,
    dumbbells,
    found_at,
    heat_map,
    histogram,
    key,
    resolution,
    roc,
    ticks,
)
from reports.figures.curves import MOST_POINTS
from tests.reports.synthetic_attacks import roc_points

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
        "h",
        "t",
        {("attention q", 0): 0.02, ("attention q", 1): 0.01, ("attention q", 2): 0.0},
        ["attention q"],
        3,
        cold="not changed",
        high=HOSTILE,
    )
    parse(svg)
    opacity = [float(found) for found in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    assert opacity[0] == 1.0
    assert opacity[0] > opacity[1] > 0
    assert svg.count('class="cold"') == 2  # the third block, and the legend


def test_a_logarithmic_heat_map_spreads_the_orders_of_magnitude() -> None:
    cells: dict[tuple[str, int], float | None] = {("q", 0): 1e-6, ("q", 1): 1e-3, ("q", 2): 1.0, ("q", 3): None}
    svg = heat_map("h", "t", cells, ["q"], 5, cold="none", low="from 1e-6", high="to 1", log=True, missing="deficient")
    parse(svg)
    opacity = [float(found) for found in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    assert opacity[:3] == [0.12, 0.56, 1.0]
    assert svg.count('fill="url(#h-O)"') == 2  # the cell without a number, and its legend
    assert "deficient" in svg
    assert svg.count('class="cold"') == 2  # the absent cell, and its legend
    linear = heat_map("h", "t", cells, ["q"], 5, cold="none", high="to 1", missing="deficient")
    assert re.findall(r'fill-opacity="([\d.]+)"', linear)[:3] == ["0.12", "0.12", "1.00"]


@pytest.mark.parametrize("cells", [{}, {("q", 0): 0.0}, {("q", 0): None}, {("q", 0): 2.0}])
def test_a_heat_map_of_nothing_still_draws(cells: dict[tuple[str, int], float | None]) -> None:
    for log in (False, True):
        parse(heat_map("h", "t", cells, ["q"], 1, cold="none", high="to 2", log=log, missing="x"))


def test_many_blocks_fit_the_width() -> None:
    cells = {("feed-forward up", block): block / 200 for block in range(200)}
    svg = heat_map("h", "t", cells, ["feed-forward up"], 200, cold="not changed", high="up to 100 %")
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


def paths(svg: str) -> list[list[tuple[float, float]]]:
    """Points of every drawn line."""
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", steps)]
        for steps in re.findall(r'<path d="M([^"]*)"', svg)
    ]


def test_a_power_law_is_straight_on_logarithmic_axes() -> None:
    points = [(10.0**i, 10.0 ** (-2 * i)) for i in range(7)]
    svg = curves("c", "t", [Curve("a", points)], Axis("x", log=True), Axis("y", log=True))
    (line,) = paths(svg)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(line)]
    assert all(step == pytest.approx(steps[0], abs=0.2) for step in steps)
    assert steps[0][0] > 0 < steps[0][1]


def test_a_curve_is_dotted_beyond_its_cut_and_meets_there() -> None:
    points = [(1.0, 1.0), (10.0, 0.1), (100.0, 0.01)]
    svg = curves(
        "c",
        "t",
        [Curve(HOSTILE, points, 31.62)],
        Axis("x", log=True),
        Axis("y", log=True),
        kept="kept",
        dropped=HOSTILE,
    )
    parse(svg)
    assert "<script" not in svg
    kept, dropped = paths(svg)
    assert kept[-1] == dropped[0]
    for axis in (0, 1):  # half a decade further, on the line
        assert kept[-1][axis] == pytest.approx((kept[1][axis] + dropped[-1][axis]) / 2, abs=0.2)
    assert 'class="curve c0 dropped"' in svg
    assert svg.count('class="limit"') == 1
    cut = re.search(r'<line x1="([\d.]+)" y1="([\d.]+)"[^>]*class="limit"', svg)
    assert cut
    assert (float(cut[1]), float(cut[2])) == (kept[-1][0], 22.0)  # over the full height where the line is alone
    two = curves("c", "t", [Curve("a", points, 10.0)] * 2, Axis("x", log=True), Axis("y", log=True))
    assert two.count('class="edge"') == 2
    assert ">kept<" not in two


@pytest.mark.parametrize("cut", [0.0, 0.5, 1.0, 1e9])
def test_a_cut_at_an_end_leaves_one_line(cut: float) -> None:
    svg = curves("c", "t", [Curve("a", [(1.0, 2.0), (5.0, 1.0)], cut)], Axis("x", log=True), Axis("y"))
    parse(svg)
    assert len(paths(svg)) == 1


def test_curves_leave_out_what_an_axis_cannot_show() -> None:
    points = [(0.0, 3.0), (1.0, 0.0), (2.0, -1.0), (3.0, 4.0), (4.0, 5.0)]
    (line,) = paths(curves("c", "t", [Curve("a", points)], Axis("x", log=True), Axis("y", log=True)))
    assert len(line) == 2
    floor = curves("c", "t", [Curve("a", points)], Axis("x"), Axis("y", log=True, low=1.0))
    assert max(y for _, y in paths(floor)[0]) == 250.0  # what lies below the end of an axis is drawn at its end
    for nothing in ([], [Curve("a", [])], [Curve("a", [(-1.0, 2.0)])]):
        assert "nothing to draw" in curves("c", "t", nothing, Axis("x", log=True), Axis("y"))


def test_one_point_and_a_flat_line_have_axes() -> None:
    for points in ([(1.0, 1.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 5.0), (2.0, 5.0)]):
        for log in (False, True):
            svg = curves("c", "t", [Curve("a", points)], Axis("x"), Axis("y", log=log))
            parse(svg)
            assert "nan" not in svg


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = [(float(i), float(i)) for i in range(1, 50_001)]
    (line,) = paths(curves("c", "t", [Curve("a", points)], Axis("x"), Axis("y")))
    assert len(line) == MOST_POINTS
    assert line[0][0] == 64.0
    assert line[-1][0] == 596.0


def test_names_of_curves_do_not_overlap_and_lines_that_end_early_carry_a_letter() -> None:
    lines = [Curve(f"line {i}", [(0.0, 1.0), (1.0, 1.0 + i / 1e6)]) for i in range(6)]
    svg = curves("c", "t", lines, Axis("x"), Axis("y"))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="soft">line', svg))
    assert min(b - a for a, b in pairwise(heights)) >= 16 - 0.1
    early = curves("c", "t", [*lines[:1], Curve("b", [(0.0, 1.0), (0.5, 2.0)])], Axis("x"), Axis("y"))
    assert ">b: b<" in early
    assert ">a: line 0<" not in early


def test_columns_grow_from_zero_either_way() -> None:
    marks = [
        Mark("U", "0", 2.0, 1.5, 2.5, ""),
        Mark("U", "1", -1.0, None, None, ""),
        Mark("U", "2", 0.0, None, None, ""),
    ]
    svg = columns("c", HOSTILE, marks, "trace")
    parse(svg)
    boxes = [
        (float(y), float(h)) for y, h in re.findall(r'y="([-\d.]+)" width="[\d.]+" height="([\d.]+)" class="f-u"', svg)
    ]
    assert boxes[0][1] == pytest.approx(2 * boxes[1][1], abs=0.2)
    assert boxes[0][0] + boxes[0][1] == pytest.approx(boxes[1][0], abs=0.2)
    parse(columns("c", "t", [Mark("U", "0", 0.0, None, None, "")], "trace"))


def test_both_sides_of_a_histogram_are_shares_of_their_set() -> None:
    svg = histogram("h", HOSTILE, (HOSTILE, [1, 3]), ("Control", [0, 200]), [0.0, 0.5, 1.0])
    parse(svg)
    assert "<script" not in svg
    upper = [float(h) for h in re.findall(r'height="([\d.]+)" fill="url\(#h-O\)"', svg)]
    lower = [float(h) for h in re.findall(r'height="([\d.]+)" class="f-n"', svg)]
    assert upper == [21.0, 63.0]
    assert lower == [84.0]
    assert "tallest: 100.0 %" in svg
    assert 'class="f-n"' not in histogram("h", "t", ("Records", [1, 3]), ("Control", [0, 0]), [0.0, 0.5, 1.0])


def scores(seed: int, n: int, m: int, centre: float, digits: int = 9) -> list[tuple[float, float]]:
    """A ROC curve of m members against n others; few digits make ties."""
    rng = random.Random(seed)
    members = [round(rng.gauss(centre, 1), digits) for _ in range(m)]
    return list(zip(*roc_points(members, [round(rng.gauss(0, 1), digits) for _ in range(n)]), strict=True))


def stairs(svg: str) -> list[list[tuple[float, float]]]:
    """Drawn lines without the line of chance, which comes first."""
    return paths(svg)[1:]


def test_a_roc_begins_at_the_smallest_rate_that_can_be_told_apart() -> None:
    points = scores(1, 100, 50, 1.5)
    svg = roc("r", HOSTILE, [(HOSTILE, points)], HOSTILE, "found")
    parse(svg)
    assert "<script" not in svg
    chance = paths(svg)[0]
    assert chance == [(64.0, 250.0), (596.0, 22.0)]  # 1/100 to 1 on both axes: straight, through both corners
    assert re.search(r'class="curve guide"', svg)
    (line,) = stairs(svg)
    assert line[0][0] == 64.0
    assert line[-1] == (596.0, 22.0)
    assert [float(x) for x in re.findall(r'<line x1="([\d.]+)" y1="22" x2="[\d.]+" y2="250" class="grid"', svg)] == [
        64.0,
        330.0,
        596.0,
    ]  # 0.01, 0.1 and 1


def test_the_staircase_stands_where_the_rates_are() -> None:
    points = [(0.0, 0.0), (0.0, 0.2), (0.01, 0.2), (0.01, 0.4), (0.1, 0.4), (0.1, 0.8), (1.0, 0.8), (1.0, 1.0)]
    (line,) = stairs(roc("r", "t", [("a", points)], "x", "y"))

    def place(x: float, y: float) -> tuple[float, float]:
        return 64 + 532 * (1 + math.log10(x) / 2), 250 - 228 * (1 + math.log10(y) / 2)

    # what is found without a false alarm stands at the left edge; no step is cut short by a slope
    corners = [(0.01, 0.2), (0.01, 0.2), (0.01, 0.4), (0.1, 0.4), (0.1, 0.8), (1, 0.8), (1, 1), (1, 1)]
    for got, (x, y) in zip(line, corners, strict=True):
        assert got == pytest.approx(place(x, y), abs=0.06)


@pytest.mark.parametrize(
    ("members", "others"),
    [([1.0] * 5, [0.0] * 5), ([0.0] * 5, [1.0] * 5), ([1.0] * 5, [1.0] * 5), ([2.0, 1.0], [1.5]), ([3.0], [1, 2])],
)
def test_extreme_scores_still_draw(members: list[float], others: list[float]) -> None:
    points = list(zip(*roc_points(members, others), strict=True))
    svg = roc("r", "t", [("a", points)], "x", "y")
    parse(svg)
    assert "nan" not in svg
    (line,) = stairs(svg)
    assert line[-1] == (596.0, 22.0)
    assert all(64 <= x <= 596 and 22 <= y <= 250 for x, y in line)


def test_a_roc_of_nothing_draws_nothing() -> None:
    assert "nothing to draw" in roc("r", "t", [("a", [])], "x", "y")
    assert "nothing to draw" in roc("r", "t", [], "x", "y")
    assert resolution([[]]) is None
    assert found_at([], 0.1) is None


def test_a_long_roc_keeps_its_lowest_steps_and_stays_below_the_curve() -> None:
    points = scores(2, 1500, 800, 1.0)
    (line,) = stairs(roc("r", "t", [("a", points)], "x", "y"))
    assert len(line) <= MOST_POINTS
    low = 1 / 1500

    def rates(at: tuple[float, float]) -> tuple[float, float]:
        return low ** (1 - (at[0] - 64) / 532), low ** (1 - (250 - at[1]) / 228)

    drawn = [rates(at) for at in line]
    for step in (1, 2, 3, 4):
        assert any(x == pytest.approx(step / 1500, rel=0.01) for x, _ in drawn)
    for x, y in drawn:
        assert y <= max(found for at, found in points if at <= x * 1.002) * 1.005
    assert all(b[0] >= a[0] and b[1] <= a[1] for a, b in pairwise(line))  # upwards and to the right


@pytest.mark.parametrize("digits", [9, 0])
def test_the_rate_found_is_that_of_the_last_threshold_allowed(digits: int) -> None:
    rng = random.Random(3)
    members = [round(rng.gauss(1, 1), digits) for _ in range(80)]
    others = [round(rng.gauss(0, 1), digits) for _ in range(200)]
    points = list(zip(*roc_points(members, others), strict=True))
    smallest = resolution([points])
    assert smallest == min(sum(b >= t for b in others) / 200 for t in others if sum(b >= t for b in others))
    for rate in (0.001, 1 / 200, 0.01, 0.033, 0.05, 0.1, 0.5, 1.0):
        allowed = [t for t in (*members, *others, math.inf) if sum(b >= t for b in others) <= rate * 200 + 1e-9]
        reached = max(sum(a >= t for a in members) / 80 for t in allowed)
        expected = None if rate < smallest else reached
        assert found_at(points, rate) == expected


def test_a_band_surrounds_its_line_and_counts_for_the_axis() -> None:
    points = [(float(i), 1.0) for i in range(5)]
    band = [(x, y - 1.0, y + 3.0) for x, y in points]
    svg = curves("c", "t", [Curve("a", points), Curve("b", points[:2], band=band)], Axis("x"), Axis("y"))
    parse(svg)
    (corners,) = re.findall(r'<polygon points="([^"]+)" class="spread c1"', svg)
    placed = [tuple(map(float, corner.split(","))) for corner in corners.split()]
    assert len(placed) == 10
    assert {y for _, y in placed} == {22.0, 250.0}  # from the lowest to the highest end
    assert [x for x, _ in placed] == [64.0, 197.0, 330.0, 463.0, 596.0, 596.0, 463.0, 330.0, 197.0, 64.0]  # and round
    line = paths(svg)[0]
    assert line[0][1] == pytest.approx(250 - 228 / 4, abs=0.1)
    assert "<polygon" not in curves("c", "t", [Curve("a", points, band=band[:1])], Axis("x"), Axis("y"))


def test_a_band_on_a_logarithmic_axis_ends_at_it() -> None:
    points = [(1.0, 1.0), (10.0, 1.0)]
    band = [(0.0, 1.0, 2.0), (1.0, -1.0, 2.0), (10.0, 0.5, 2.0)]
    svg = curves("c", "t", [Curve("a", points, band=band)], Axis("x", log=True), Axis("y", log=True, low=0.1))
    (corners,) = re.findall(r'<polygon points="([^"]+)"', svg)
    assert len(corners.split()) == 4  # the place at zero is left out
    assert max(float(corner.split(",")[1]) for corner in corners.split()) == 250.0


def test_a_guide_is_dashed_named_and_no_line_of_its_own() -> None:
    lines = [Curve("a", [(0.0, 0.5), (1.0, 0.7)])]
    svg = curves("c", "t", lines, Axis("x"), Axis("y"), guide=Curve(HOSTILE, [(0.0, 0.0), (1.0, 1.0)]))
    parse(svg)
    assert svg.count('class="curve guide"') == 1
    assert 'class="curve c1"' not in svg
    assert paths(svg)[0] == [(64.0, 250.0), (596.0, 22.0)]  # its points count for the axes
    assert "nothing to draw" in curves("c", "t", [Curve("a", [])], Axis("x"), Axis("y"), guide=lines[0])
