"""Read and write record files: JSON Lines, JSON, CSV, TSV, Parquet, `datasets` folders and hub ids.

All mistakes of a set are reported at once with their lines. Nothing quotes a record; even an unknown column's name
stays unprinted, since the first row of a CSV without a header is a record. Reading needs no torch.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.errors import ResourceError, UsageError
from unlearn.mistakes import Mistakes, suggestion
from unlearn.records.raw import (
    CONTENT,
    FIELDS,
    FORMS,
    Mistake,
    RawRecord,
    RecordFormat,
    checked,
    form_of,
    kind_of,
)

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_LISTS = ("prompt_ids", "completion_ids", "messages")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.+%:\[\]-]+))?")


def read_records(
    path: str | Path, *, role: str = "records", fmt: RecordFormat | None = None, online: bool = False
) -> list[RawRecord]:
    """Read and check one set of records.

    Args:
        path: a JSON Lines, JSON, CSV, TSV or Parquet file; a folder of such files; a folder written by
            `datasets.save_to_disk`; or, with `online`, a hub id `owner/name[/config][:split]`.
        role: what the set is for (`records`, `control`, `retain`); used in messages only.
        fmt: column names and templates; by default columns carry the fields' own names.
        online: allow the hub. The `datasets` library then keeps its own cache.

    Returns:
        Records in file order.

    Raises:
        UsageError: if the path does not exist, is unreadable, or holds mistakes (all listed, with lines).
    """
    file = Path(path)
    reading = _Reading(role, fmt or RecordFormat())
    try:
        exists, folder = file.exists(), file.is_dir()
        if folder:
            _read_folder(reading, file)
        elif exists:
            _read_file(reading, file)
    except OSError as error:
        raise UsageError(f"{role}: expected a readable file, found {type(error).__name__} at {path}") from None
    if not exists:
        _read_hub(reading, str(path), online)
    return reading.finish()


def records_from(
    rows: Iterable[Mapping[str, object]], *, role: str = "records", fmt: RecordFormat | None = None
) -> list[RawRecord]:
    """The same checks for records held in memory, one mapping each.

    Raises:
        UsageError: with every mistake, by row number.
    """
    reading = _Reading(role, fmt or RecordFormat())
    reading.unit = " row "
    for number, row in enumerate(rows, start=1):
        reading.row(role, number, row)
    return reading.finish()


class _Reading:
    """One set of records while it is read: fields resolved, values checked, mistakes collected."""

    def __init__(self, role: str, fmt: RecordFormat) -> None:
        self.fmt = fmt
        self.by_column = fmt.by_column
        self.mistakes = Mistakes(role)
        self.records: list[RawRecord] = []
        self.rows = 0
        self.unit = ":"  # between source and number: a line of a text file, or " row " of a table
        self.from_text = False  # CSV cells: lists are spelled out, an empty cell is an absent value
        self.folder: Path | None = None
        self.ids: dict[str, str] = {}
        self.unknown: dict[tuple[str, str], _Unknown] = {}  # by source and name

    def mistake(self, source: str, line: int, what: str) -> None:
        self.mistakes.add(source, line, what, unit=self.unit)

    def known(self, source: str, line: int, names: Sequence[str]) -> list[str | None]:
        """The field each column holds; a column that holds none is noted once, by position."""
        found = [self.by_column.get(name) for name in names]
        for position, (name, known) in enumerate(zip(names, found, strict=True), start=1):
            if known is None and not self.fmt.ignore_unknown:
                first = _Unknown(self.unit, line, position, len(names))
                self.unknown.setdefault((source, name), first).count += 1
        return found

    def row(self, source: str, line: int, row: Mapping[str, object]) -> None:
        names = self.known(source, line, [str(key) for key in row])
        if None in names and not self.fmt.ignore_unknown and not set(names) & set(CONTENT):
            self.rows += 1  # its content lies under unknown names, which are reported; nothing else to say
            return
        self.values(source, line, {name: value for name, value in zip(names, row.values(), strict=True) if name})

    def values(self, source: str, line: int, values: Mapping[str, object]) -> None:
        """Check one row of known fields and keep the record."""
        self.rows += 1
        present = {name: v for name, v in values.items() if v is not None and not (self.from_text and v == "")}
        wrong: list[str] = []
        good: dict[str, Any] = {}
        try:
            form = form_of(present)
        except Mistake as mistake:
            wrong.append(str(mistake))
            form = None
        for name in ("id", "group", *(FORMS[form] if form else ())):
            if name in present:
                try:
                    value = present[name]
                    if self.from_text and name in _LISTS:
                        value = _spelled_out(name, value)
                    good[name] = checked(name, value, self.folder)
                except Mistake as mistake:
                    wrong.append(str(mistake))
        identifier = self.note_id(good.pop("id", None), source, line)
        for what in wrong:
            self.mistake(source, line, what)
        if wrong:
            return
        for name, template in (("prompt", self.fmt.prompt_template), ("completion", self.fmt.completion_template)):
            if template is not None and name in good:
                good[name] = template.replace(f"{{{name}}}", good[name])
        self.records.append(RawRecord(identifier, where=f"{source}{self.unit}{line}", **good))

    def note_id(self, given: str | None, source: str, line: int) -> str:
        """Claim an id, or give the row its number; a repeated id is a mistake."""
        identifier = given or f"row-{self.rows}"
        first = self.ids.setdefault(identifier, f"{source}{self.unit}{line}")
        if first != f"{source}{self.unit}{line}":
            self.mistake(source, line, f"the id repeats the one at {first}; ids must be unique")
        return identifier

    def finish(self) -> list[RawRecord]:
        for (source, name), seen in self.unknown.items():
            times = f" in {seen.count} records" if seen.count > 1 else ""
            what = f"field {seen.position} of {seen.of} is not a known field{times}{suggestion(name, FIELDS)}"
            self.mistakes.add(source, seen.line, f"{what}; rename it with `fields`, or remove it", unit=seen.unit)
        if not self.rows and not len(self.mistakes):
            self.mistakes.add(self.mistakes.subject, 0, "expected at least one record, found none")
        forms = {record.form == "image" for record in self.records}
        if len(forms) > 1:
            self.mistakes.add(self.mistakes.subject, 0, "expected text or image records, found both; split the file")
        self.mistakes.subject = f"{self.mistakes.subject} ({self.rows} read)"
        self.mistakes.raise_any()
        return self.records


@dataclass(slots=True)
class _Unknown:
    """Where a name that is no field was first seen, and how often; the name itself is never printed."""

    unit: str
    line: int
    position: int
    of: int
    count: int = 0


def _spelled_out(name: str, value: object) -> object:
    """A list inside a CSV cell: JSON, or numbers separated by spaces."""
    text = str(value)
    if name != "messages" and re.fullmatch(r"\s*\d{1,10}(\s+\d{1,10})*\s*", text):
        return [int(number) for number in text.split()]
    try:
        return _json(text)
    except (ValueError, RecursionError):
        raise Mistake(f"expected `{name}` to be a JSON list in its cell") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("duplicate key")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json(text: str) -> object:
    return _DECODER.decode(text)


def _read_folder(reading: _Reading, folder: Path) -> None:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        _read_saved(reading, folder)
        return
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        reading.mistakes.add(folder.name, 0, f"expected files ending in {', '.join(_SUFFIXES)}, found none")
    for file in files:
        _read_file(reading, file)


def _read_file(reading: _Reading, file: Path) -> None:
    """Dispatch on what the file is: Parquet by its magic bytes, CSV by its name, JSON by its first character."""
    data = file.read_bytes()
    reading.folder, reading.unit, reading.from_text = file.parent, ":", False
    if not data.strip():
        reading.mistake(file.name, 0, "the file is empty")
    elif data.startswith(b"PAR1"):
        _read_parquet(reading, file.name, data)
    elif (nul := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, nul) + 1
        reading.mistake(file.name, line, "expected UTF-8 text, found binary data (a NUL byte)")
    elif file.suffix.lower() in (".csv", ".tsv"):
        _read_csv(reading, file.name, data, "\t" if file.suffix.lower() == ".tsv" else ",")
    elif data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        _read_json_array(reading, file.name, data)
    else:
        _read_json_lines(reading, file.name, data)


def _read_json_lines(reading: _Reading, source: str, data: bytes) -> None:
    broken: list[tuple[int, str]] = []
    read = 0
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = _json(raw.decode())
        except UnicodeDecodeError:
            broken.append((line, "the line is not valid UTF-8"))
        except json.JSONDecodeError as error:
            broken.append((line, f"the line is not valid JSON (column {error.colno})"))
        except (ValueError, RecursionError):
            broken.append((line, "the line is not usable JSON: a key twice, a number too long, or nesting too deep"))
        else:
            if isinstance(row, dict):
                read += 1
                reading.row(source, line, row)
            else:
                broken.append((line, f"expected a JSON object, found {kind_of(row)}"))
    if len(broken) > 1 and not read:  # not a record file with slips in it, but some other file
        line, what = broken[0]
        broken = [(line, f"expected JSON Lines, found no such line in {len(broken)}; first: {what}")]
    for line, what in broken:
        reading.mistake(source, line, what)


def _decoded(reading: _Reading, source: str, data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reading.mistake(source, data.count(b"\n", 0, error.start) + 1, "the line is not valid UTF-8")
        return None


def _read_json_array(reading: _Reading, source: str, data: bytes) -> None:
    """Element by element, because a mistake must name the line its record begins on."""
    text = _decoded(reading, source, data)
    if text is None:
        return
    space = re.compile(r"[ \t\r\n]*")
    at, counted, line = text.index("[") + 1, 0, 1

    def skip(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    at = skip(at)
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            reading.mistake(source, line, "the record that begins here is not usable JSON; reading stopped")
            return
        if isinstance(row, dict):
            reading.row(source, line, row)
        else:
            reading.mistake(source, line, f"expected a JSON object, found {kind_of(row)}")
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            break
    closed = text[at : at + 1] == "]"
    if not closed or text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        reading.mistake(source, line, "expected the JSON list to end with ] and nothing after it")


def _read_csv(reading: _Reading, source: str, data: bytes, delimiter: str) -> None:
    text = _decoded(reading, source, data)
    if text is None:
        return
    reading.from_text = True
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB: long documents are legitimate
    try:
        _read_csv_rows(reading, source, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(limit)


def _read_csv_rows(reading: _Reading, source: str, rows: Any) -> None:
    names: list[str | None] | None = None
    while True:
        line = rows.line_num + 1  # where the next row begins; a quoted cell may span lines
        try:
            cells = next(rows, None)
        except csv.Error:
            reading.mistake(source, line, "the row is not valid CSV (check its quotes); reading stopped")
            return
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = _header(reading, source, line, cells)
            if names is None:
                return
        elif len(cells) != len(names):
            reading.rows += 1
            reading.mistake(source, line, f"expected {len(names)} cells as in the header, found {len(cells)}")
        else:
            reading.values(source, line, {name: cell for name, cell in zip(names, cells, strict=True) if name})


def _header(reading: _Reading, source: str, line: int, cells: list[str]) -> list[str | None] | None:
    """Fields of a table's columns, or None (a mistake is noted) where no row could be read."""
    if len(set(cells)) < len(cells):
        reading.mistake(source, line, "expected one column for each name in the header, found a name twice")
        return None
    names = reading.known(source, line, cells)
    if not any(names):
        reading.unknown = {key: seen for key, seen in reading.unknown.items() if key[0] != source}
        reading.mistake(
            source, line, f"expected columns among {', '.join(FIELDS)}, found none; add a header or map them"
        )
        return None
    return names


def _read_parquet(reading: _Reading, source: str, data: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError):
        reading.mistake(source, 0, "expected a Parquet file, found one that is damaged or encrypted")
        return
    _read_table(reading, source, table)


def _read_table(reading: _Reading, source: str, table: Any) -> None:
    """Rows of an Arrow table, column by column."""
    reading.unit, reading.from_text = " row ", False
    if not table.num_rows:
        return
    names = _header(reading, source, 0, table.column_names)
    if names is None:
        return
    columns = [(name, table.column(i).to_pylist()) for i, name in enumerate(names) if name]
    for number in range(table.num_rows):
        reading.values(source, number + 1, {name: cells[number] for name, cells in columns})


def _read_saved(reading: _Reading, folder: Path) -> None:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))  # memory-maps in place: no copy in a cache
    except Exception as error:
        reading.mistakes.add(folder.name, 0, f"expected a folder written by datasets, found {type(error).__name__}")
        return
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) != 1:
            reading.mistakes.add(folder.name, 0, f"expected one split, found {len(saved)}; point at one split's folder")
            return
        saved = next(iter(saved.values()))
    reading.folder = folder
    _read_table(reading, folder.name, saved.with_format("arrow")[:])


def _read_hub(reading: _Reading, ref: str, online: bool) -> None:
    role = reading.mistakes.subject
    match = _HUB.fullmatch(ref)
    if match is None or not online:
        hint = "; a data set on the hub needs --online" if match else ""
        raise UsageError(f"{role}: expected an existing file or folder, found none at {ref}{hint}")
    import datasets

    try:
        found = datasets.load_dataset(match["repo"], match["config"], split=match["split"])
    except Exception as error:  # connection, unknown repository, config or split: each library's own class
        raise ResourceError(f"{role}: expected a data set at {ref}, found {type(error).__name__}") from None
    if isinstance(found, datasets.DatasetDict):
        if len(found) != 1:
            raise UsageError(f"{role}: expected one split at {ref}, found {len(found)}; add :split to the id")
        found = next(iter(found.values()))
    _read_table(reading, ref, found.with_format("arrow")[:])


def write_records(records: Sequence[RawRecord], path: str | Path) -> Path:
    """Write records as JSON Lines that `read_records` reads back, readable by the owner alone.

    Raises:
        UsageError: if the file exists, cannot be written, or an image is held as bytes.
    """
    out = Path(path)
    if any(isinstance(record.image, bytes) for record in records):
        raise UsageError("expected images given by path, found images held as bytes, which JSON Lines cannot carry")
    lines = [json.dumps(as_row(record), ensure_ascii=False) + "\n" for record in records]
    try:
        out.touch(mode=0o600, exist_ok=False)
        out.write_text("".join(lines), encoding="utf-8", newline="\n")
    except FileExistsError:
        raise UsageError(f"expected a new file, found that {out} exists; choose another name") from None
    except OSError as error:
        raise UsageError(f"expected a writable path, found {type(error).__name__} at {out}") from None
    return out


def as_row(record: RawRecord) -> dict[str, object]:
    """The record as a mapping with the fields of its form, ready for JSON unless an image is held as bytes."""
    """A record as the JSON object that `read_records` reads back (an image held as bytes has no such form)."""
    row: dict[str, object] = {"id": record.id}
    if record.group is not None:
        row["group"] = record.group
    for name in FORMS[record.form]:
        row[name] = getattr(record, name)
    if record.messages is not None:
        row["messages"] = [{"role": turn.role, "content": turn.content} for turn in record.messages]
    return row
