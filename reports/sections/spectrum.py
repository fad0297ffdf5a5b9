"""The spectrum probe: eigenvalues of the loss's second derivative, for the whole model or block by block."""

from __future__ import annotations

from collections.abc import Sequence

from reports import figures
from reports.blocks import Block, Cell, Chart, Prose, figure_cell, number_cell, percent_cell, table
from reports.figures import Axis, Curve, Mark
from reports.sections.probe_parts import about, strongest, warnings
from reports.text import Json, number, plural, short

TITLE = "Spectrum of the loss curvature"
MATRICES = {"hessian": "the Hessian of the mean loss", "ggn": "the generalised Gauss-Newton matrix of the mean loss"}
SHOWS = (
    "Its eigenvalues say how strongly the loss bends along each direction of the weights. Nearly all lie close to "
    "zero; the few large ones belong to directions that much of the data shares. Negative ones, which only the Hessian "
    "has, are directions in which the weights do not stand at a minimum."
)
SHOWS_NOT = (
    "The density is estimated from random vectors and smoothed: single eigenvalues inside the bulk are not resolved, "
    "and extreme ones are exact up to their residual. It describes this data and these weights, and no single record."
)
DENSITIES = 3  # they overlap near zero, so more of them cannot be told apart
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DEEPEST = 1e-9  # of the peak: below this the smoothed density is nothing but the tail of its kernel
SOURCE = "run.probes.spectrum.operators[]"


def spectrum(result: Json) -> list[Block]:
    """Blocks of the spectrum probe.

    Args:
        result: `run.probes.spectrum`.
    """
    operators = result["operators"]
    matrix = MATRICES.get(str(result["settings"].get("operator")), "the curvature matrix of the mean loss")
    text = f"This is {matrix}. {SHOWS} {SHOWS_NOT}"
    blocks: list[Block] = [about(result), Prose(text), *warnings(result)]
    if not operators:
        return [*blocks, Prose("Spectra not run: no operator was listed.")]
    return [*blocks, *_density(operators), *_traces(operators), *_table(operators), *_extremes(operators[0])]


def _density(operators: Sequence[Json]) -> list[Block]:
    """Smoothed density of eigenvalues, its height on a logarithmic axis."""
    able = [row for row in operators if row["density"]]
    if not able:
        return [Prose("Density not run: none was listed.")]
    whole = [row for row in able if row["block"] is None]
    drawn = strongest(whole or able, lambda row: (row["trace"] or {}).get("value"), DENSITIES)
    lines = [Curve(row["name"], list(zip(row["density"]["x"], row["density"]["y"], strict=True))) for row in drawn]
    peak = max((y for line in lines for _, y in line.points), default=0.0)
    which = ", ".join(short(row["name"], 40) for row in drawn)
    largest = "" if len(drawn) == len(whole or able) else f", the largest traces of {len(whole or able):,} parts"
    caption = f"Density of the eigenvalues, height on a logarithmic axis: {which}{largest}."
    svg = figures.curves(
        "spectrum-density",
        f"{caption} The tables below hold the data",
        lines,
        Axis("eigenvalue"),
        Axis("density", log=True, low=peak * DEEPEST if peak > 0 else None),
    )
    texts = [f"{row['name']}: eigenvalues from {_end(row, 'smallest')} to {_end(row, 'largest')}" for row in drawn]
    quantiles = [
        [Cell(short(row["name"], 60)), *(number_cell(q) for q in _quantiles(row))] for row in drawn if row["ritz"]
    ]
    columns = ("Part", *(f"{100 * share:g} %" for share in QUANTILES))
    title = "Eigenvalue below which a share of all eigenvalues lies, estimated"
    data = [table(title, columns, quantiles, SOURCE, range(1, len(columns)))] if quantiles else []
    return [Chart(svg, caption, f"{caption} {'. '.join(texts)}."), *data]


def _end(row: Json, key: str) -> str:
    """The outermost eigenvalue found at one end, or that of the density's axis."""
    found = row[key] or row["density"]["x"]
    return number(max(found) if key == "largest" else min(found))


def _quantiles(row: Json) -> list[float]:
    """Quantiles of the quadrature: nodes in order, by their weights."""
    pairs = sorted(zip(row["ritz"]["nodes"], row["ritz"]["weights"], strict=True))
    total = sum(weight for _, weight in pairs)
    found: list[float] = []
    reached = 0.0
    for node, weight in pairs:
        reached += weight
        while len(found) < len(QUANTILES) and reached >= QUANTILES[len(found)] * total * (1 - 1e-12):
            found.append(node)
    return found + [pairs[-1][0]] * (len(QUANTILES) - len(found))


def _table(operators: Sequence[Json]) -> list[Block]:
    lines = [
        [
            Cell(short(row["name"], 60)),
            number_cell(row["parameters"]),
            figure_cell(row["trace"]),
            number_cell(max(row["largest"], default=None)),
            number_cell(min(row["smallest"], default=None)),
            number_cell(max(row["residuals"], default=None)),
            percent_cell(row["negative_share"]),
        ]
        for row in operators
    ]
    columns = ("Part", "Parameters", "Trace", "Largest", "Smallest", "Worst residual", "Negative")
    title = "Eigenvalues; the residual is ‖Hv − λv‖, the last column the estimated share of negative eigenvalues"
    return [table(title, columns, lines, SOURCE, (1, 3, 4, 5, 6))]


def _extremes(row: Json) -> list[Block]:
    """Every extreme eigenvalue of the first operator with its residual."""
    ends = [("largest", value) for value in row["largest"]] + [("smallest", value) for value in row["smallest"]]
    if len(ends) < 3:
        return []
    matched = len(row["residuals"]) == len(ends)
    residuals = row["residuals"] if matched else [None] * len(ends)
    lines = [
        [Cell(f"{end}"), number_cell(value), number_cell(residual)]
        for (end, value), residual in zip(ends, residuals, strict=True)
    ]
    title = f"Extreme eigenvalues, {short(row['name'], 60)}"
    return [table(title, ("End", "Eigenvalue", "Residual"), lines, f"{SOURCE}.largest, smallest", (1, 2))]


def _traces(operators: Sequence[Json]) -> list[Block]:
    """Trace of every block, side by side."""
    rows = [row for row in operators if row["block"] is not None and (row["trace"] or {}).get("value") is not None]
    if len(rows) < 2:
        return []
    rows = sorted(rows, key=lambda row: (row["block"], row["name"]))
    marks = []
    for row in rows:
        trace = row["trace"]
        words = number(trace["value"])
        marks.append(Mark("U", str(row["block"]), trace["value"], trace["ci_low"], trace["ci_high"], words))
    caption = f"Trace of the curvature of {plural(len(rows), 'block')}, with its interval."
    svg = figures.columns("spectrum-trace", f"{caption} The table below holds the data", marks, "trace")
    values = ", ".join(f"block {mark.label} {mark.text}" for mark in marks)
    return [Chart(svg, caption, f"{caption} {values}.")]
