"""The curvature probe: spectra of the modules with the cut of an edit, where curvature lies, a score per record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reports import figures
from reports.blocks import Block, Cell, Chart, Facts, Prose, Table, number_cell, percent_cell, table
from reports.figures import Axis, Curve
from reports.sections.grid import grid, place_words, role_words
from reports.sections.probe_parts import OVERLAPS, about, overlap_cell, part_cell, strongest, warnings
from reports.text import CURVATURE, Json, figure_text, number, plural, short

TITLE = "Curvature of the modules (K-FAC)"
SHOWS = (
    "K-FAC describes how the loss bends when a module's weights move, by two second moments: of the module's inputs "
    "(A) and of the gradients at its outputs (G). Every pair of their eigenvectors is a direction in the weights, and "
    "its curvature is the product of the two eigenvalues. Directions of high curvature serve much of the data; what a "
    "few records alone need tends to lie in those of low curvature (arXiv 2510.24256)."
)
SHOWS_NOT = (
    "It does not show that a record is stored in a given direction. The approximation ignores how modules act "
    "together, and rarely used knowledge, such as arithmetic and facts, lies in directions of low curvature as well."
)
BINS = 16
SHARES = (0.001, 0.01, 0.1, 0.5)  # of a module's pairs, where the table reads its curves
SOURCE = "run.probes.kfac.modules[]"


def kfac(result: Json, rows: Sequence[Json], audience: str) -> list[Block]:
    """Blocks of the curvature probe.

    Args:
        result: `run.probes.kfac`.
        rows: `records[]`; their curvature figures stand beside those of the audit.
        audience: the table per module is for the engineer.
    """
    modules = sorted(result["modules"], key=lambda row: (row["cut"] is None, -(row["mass"] or 0.0), row["module"]))
    blocks: list[Block] = [about(result), Prose(f"{SHOWS} {SHOWS_NOT}"), *warnings(result)]
    if not modules:
        return [*blocks, Prose("Spectra not run: no module was listed."), *_records(result["records"], rows)]
    blocks += [*_spectra(modules), *_masses(modules)]
    blocks += [_modules(modules)] if audience == "engineer" else []
    return [*blocks, *_heat(modules), *_records(result["records"], rows)]


def _name(row: Json) -> str:
    return place_words(row, row["module"])


def _chosen(modules: Sequence[Json], part: str) -> list[Json]:
    """Modules to draw: those with a cut before the others, then those with the most curvature."""
    able = [row for row in modules if row[part]]
    cut = [row for row in able if row["cut"]]
    return strongest(cut or able, lambda row: row["mass"])


def _which(drawn: Sequence[Json], modules: Sequence[Json]) -> str:
    if len(drawn) == len(modules):
        return "every module" if len(modules) > 1 else "the module"
    cut = sum(row["cut"] is not None for row in modules)
    if drawn[0]["cut"]:
        some = "those an edit cuts" if len(drawn) == cut else f"the largest of {cut:,} that an edit cuts"
    else:
        some = "those with the most curvature"
    return f"{len(drawn)} of {plural(len(modules), 'module')}, {some}"


def _spectra(modules: Sequence[Json]) -> list[Block]:
    """Eigenvalue products by rank on logarithmic axes, dotted beyond the cut."""
    drawn = _chosen(modules, "spectrum")
    if not drawn:
        return [Prose("Spectra not run: no eigenvalues were listed.")]
    lines = [Curve(_name(row), _by_rank(row), _kept(row)) for row in drawn]
    edge = _edge(drawn)
    edge += " An edit keeps the pairs left of it and drops those right of it, drawn dotted." if edge else ""
    caption = f"Curvature spectrum of {_which(drawn, modules)}: eigenvalue products in descending order.{edge}"
    svg = figures.curves(
        "kfac-spectrum",
        f"{caption} The table below holds the data",
        lines,
        Axis("rank of the pair of directions", log=True),
        Axis("eigenvalue product λμ", log=True),
        kept="kept",
        dropped="dropped",
    )
    texts = []
    for row in drawn:
        values = row["spectrum"]["eigenvalue"]
        cut = row["cut"]
        at_cut = f", {number(cut['threshold'])} at the cut after {number(cut['kept_pairs'])} pairs" if cut else ""
        texts.append(f"{_name(row)}: from {number(values[0])} to {number(values[-1])}{at_cut}")
    return [Chart(svg, caption, f"{caption} {'. '.join(texts)}."), _spectra_table(drawn)]


def _by_rank(row: Json) -> list[tuple[float, float]]:
    """(rank from 1, eigenvalue product)."""
    spectrum = row["spectrum"]
    first = 1 - min(spectrum["index"][0], 1)
    return [(index + first, value) for index, value in zip(spectrum["index"], spectrum["eigenvalue"], strict=True)]


def _kept(row: Json) -> float | None:
    cut = row["cut"]
    return cut["kept_pairs"] if cut and cut["kept_pairs"] is not None else None


def _edge(drawn: Sequence[Json]) -> str:
    """What the dashed lines are: ` Dashed: the cut at 60 % of the curvature mass.`; nothing without a cut."""
    cuts = [row["cut"] for row in drawn if _kept(row) is not None]
    if not cuts:
        return ""
    shares = {cut["rho"] for cut in cuts}
    share = next(iter(shares)) if len(shares) == 1 else None
    return f" Dashed: the cut{f' at {100 * share:g} % of the curvature mass' if share is not None else ''}."


def _pairs(row: Json) -> int | None:
    """How many pairs of directions a module has."""
    if row["cut"] and row["cut"]["pairs"]:
        return int(row["cut"]["pairs"])
    return row["shape"][0] * row["shape"][1] if len(row["shape"]) == 2 else None


def _spectra_table(drawn: Sequence[Json]) -> Table:
    lines = []
    for row in drawn:
        points, pairs = _by_rank(row), _pairs(row)
        at = [_last(points, share * pairs) if pairs else None for share in SHARES]
        cells = [
            number_cell(value) for value in (points[0][1], *at, (row["cut"] or {}).get("threshold"), points[-1][1])
        ]
        lines.append([Cell(_name(row)), *cells])
    columns = ("Module", "Largest", *(f"At {100 * share:g} %" for share in SHARES), "At the cut", "Smallest")
    title = "Eigenvalue products of the modules drawn, by the share of pairs before them"
    return table(title, columns, lines, SOURCE, range(1, len(columns)))


def _last(points: Iterable[tuple[float, float]], edge: float) -> float | None:
    """The value of the last point that is not beyond an edge."""
    found = None
    for x, y in points:
        if x > edge * (1 + 1e-9):
            break
        found = y
    return found


def _masses(modules: Sequence[Json]) -> list[Block]:
    """How much of a module's curvature its leading pairs hold."""
    drawn = _chosen(modules, "curve")
    if not drawn:
        return []
    lines = []
    for row in drawn:
        points = list(zip(row["curve"]["pairs"], row["curve"]["mass"], strict=True))
        pairs, kept = _pairs(row), _kept(row)
        lines.append(Curve(_name(row), points, kept / pairs if pairs and kept is not None else None))
    caption = f"Share of the curvature mass that the leading pairs hold, {_which(drawn, modules)}.{_edge(drawn)}"
    svg = figures.curves(
        "kfac-mass",
        f"{caption} The table below holds the data",
        lines,
        Axis("share of pairs, largest first", log=True),
        Axis("share of curvature mass", low=0.0, high=1.0),
        kept="kept",
        dropped="dropped",
    )
    rows, texts = [], []
    for line in lines:
        held = [_last(line.points, share) for share in SHARES]
        rows.append([Cell(line.label), *(percent_cell(value) for value in held)])
        known = [f"{100 * share:g} % hold {number(100 * at)} %" for share, at in zip(SHARES, held, strict=True) if at]
        texts.append(f"{line.label}: {', '.join(known) or 'n/a'}")
    columns = ("Module", *(f"{100 * share:g} % of pairs" for share in SHARES))
    data = table("Curvature mass held by the leading pairs", columns, rows, SOURCE, range(1, len(columns)))
    return [Chart(svg, caption, f"{caption} {'. '.join(texts)}."), data]


def _modules(modules: Sequence[Json]) -> Table:
    lines = []
    for row in modules:
        cut = row["cut"] or {}
        shape = " × ".join(number(size) for size in row["shape"])
        place = f"{_name(row)}, {shape}, {number(row['n_positions'])} positions"
        lines.append(
            [
                Cell(short(row["module"], 80), place, "code"),
                number_cell(row["mass"]),
                part_cell(cut.get("kept_pairs"), cut.get("pairs")),
                percent_cell(cut.get("kept_norm")),
                number_cell(cut.get("predicted_rise")),
                *(overlap_cell(row[key]) for key in OVERLAPS),
            ]
        )
    columns = ("Module", "Mass", "Pairs kept", "Norm kept", "Predicted loss rise", "Overlap A", "Overlap G")
    order = "those with a cut first, most curvature first" if modules[0]["cut"] else "most curvature first"
    title = f"Modules, {order}; the predicted rise of the loss is in nats per token"
    return table(title, columns, lines, SOURCE, range(1, len(columns)))


def _heat(modules: Sequence[Json]) -> list[Block]:
    """Curvature mass by block and module on a logarithmic scale."""
    cells: dict[tuple[str, int], float] = {}
    for row in modules:
        if row["block"] is not None and row["mass"] is not None:
            place = (row["role"] or "other", row["block"])
            cells[place] = cells.get(place, 0.0) + row["mass"]
    held = {place: value for place, value in cells.items() if value > 0}
    if not held:
        return []
    (role, block), largest = max(held.items(), key=lambda item: (item[1], item[0]))
    lowest = min(held.values())
    caption = (
        "Curvature mass tr A · tr G by block and module, on a logarithmic scale; a cell with several modules shows "
        "their sum."
    )
    alt = f"{caption} Largest: {number(largest)} in block {block}, {role_words(role)}; smallest: {number(lowest)}."
    return grid(
        "kfac-heat",
        cells,
        caption=caption,
        alt=alt,
        title="Curvature mass by block",
        source=SOURCE,
        cell=number_cell,
        cold="not probed",
        low=f"from {number(lowest)}",
        high=f"to {number(largest)}",
        log=True,
    )


def _records(part: Json | None, rows: Sequence[Json]) -> list[Block]:
    """The label-free score: records against control, then the records with the highest scores."""
    if part is None:
        return [Prose("Scores of single records not run: the probe was not asked for them.")]
    facts = [
        ("Records", Cell(number(part["n"]))),
        ("Control", Cell(number(part["n_control"]) if part["n_control"] else "none")),
    ]
    if part["auc"]:
        facts.append(("AUC", Cell(figure_text(part["auc"]))))
    blocks: list[Block] = [Facts(facts, "Memorisation score of single records")]
    text = (
        f"{CURVATURE['memorisation_score'][1]} It orders records and is to be read against a control; it proves "
        "nothing about one record."
    )
    if part["auc"]:
        text += (
            " The AUC is the probability that a record scores higher than a control record; 0.5 is chance. Sets that "
            "differ in source, style or length are told apart by that alone."
        )
    return [*blocks, Prose(text), *_distribution(part["scores"]), *_table(rows)]


def _distribution(scores: Json) -> list[Block]:
    """Both sets' scores in the same bins."""
    every = [*scores["records"], *scores["control"]]
    if not every:
        return [Prose("Distribution not run: no record has a score.")]
    low, high = min(every), max(every)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = [low + (high - low) * index / BINS for index in range(BINS + 1)]

    def count(values: Sequence[float]) -> list[int]:
        counts = [0] * BINS
        for value in values:
            counts[min(int(BINS * (value - low) / (high - low)), BINS - 1)] += 1
        return counts

    records, control = count(scores["records"]), count(scores["control"])
    beside = " above the line, control below" if sum(control) else ""
    caption = f"Distribution of the memorisation score: records{beside}; heights are shares of each set."
    svg = figures.histogram(
        "kfac-scores", f"{caption} The table below holds the data", ("Records", records), ("Control", control), edges
    )
    middles = [f"{name}: {_quartiles(scores[part])}" for part, name in _SETS.items() if scores[part]]
    lines = [
        [Cell(f"{number(edges[i])} to {number(edges[i + 1])}"), number_cell(records[i]), number_cell(control[i])]
        for i in range(BINS)
        if records[i] or control[i]
    ]
    source = "run.probes.kfac.records.scores"
    data = table("Records by memorisation score", ("Score", "Records", "Control"), lines, source, (1, 2))
    return [Chart(svg, caption, f"{caption} {'. '.join(middles)}."), data]


_SETS = {"records": "Records", "control": "Control"}


def _quartiles(values: Sequence[float]) -> str:
    """`0.1 to 0.9, median 0.4` of ascending values."""
    return f"{number(values[0])} to {number(values[-1])}, median {number(values[(len(values) - 1) // 2])}"


def _table(rows: Sequence[Json]) -> list[Block]:
    """Records by score, beside what the model makes of them."""
    scored = [row for row in rows if (row["before"] or {}).get("memorisation_score") is not None]
    if not scored:
        return []
    scored.sort(key=lambda row: (-row["before"]["memorisation_score"], row["id"]))
    shown = [name for name in CURVATURE if any(row["before"].get(name) is not None for row in scored)]
    beside = [
        name
        for name in ("probability", "label_probability")
        if any(row["before"].get(name) is not None for row in scored)
    ]
    lines = [
        [
            Cell(short(row["id"], 40), style="code"),
            *(number_cell(row["before"].get(name)) for name in (*shown, *beside)),
        ]
        for row in scored
    ]
    heads = [CURVATURE[name][0] for name in shown] + [
        {"probability": "Probability per token"}.get(n, "Label probability") for n in beside
    ]
    return [
        table("Records, highest memorisation score first", ("Record", *heads), lines, "records[].before", range(1, 9))
    ]
