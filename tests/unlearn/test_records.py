"""Records: the formats agree, every mistake is reported once with its line, and ids decode to the joint text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from probes.errors import ResourceError, UnlearnError, UnsupportedError, UsageError
from tests import tiny
from unlearn.mistakes import SHOWN, MistakesError
from unlearn.records.tokens import (
    Message,
    RawRecord,
    RecordFormat,
    data_digest,
    images,
    read_records,
    records_from,
    render_chat,
    tokenise,
    write_records,
)

CANARY = "zqxcanaryvjk"
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Name:", "completion": " Ada, born 1815", "group": "g1"},
    {"id": "b", "prompt": 'A "quoted", prompt\nover lines', "completion": " ü and 猫", "group": None},
    {"id": "c", "prompt": "x", "completion": "y", "group": "g1"},
]


def lines(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def wrong(path: Path | str, **options: Any) -> list[str]:
    with pytest.raises(MistakesError) as caught:
        read_records(path, **options)
    assert caught.value.exit_code == 2
    return list(caught.value.mistakes)


# Formats


def as_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_every_format_reads_the_same_records(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "split")
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder / "1.jsonl", ROWS[0])
    as_csv(folder / "2.csv", ROWS[1:])
    lines(folder / "README.md", "not data")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    expected = read_records(lines(tmp_path / "a.jsonl", *ROWS))
    assert [record.completion for record in expected] == [row["completion"] for row in ROWS]
    assert [record.group for record in expected] == ["g1", None, "g1"]
    for path in (
        tmp_path / "a.json",
        as_csv(tmp_path / "a.csv", ROWS),
        as_csv(tmp_path / "a.tsv", ROWS, "\t"),
        as_parquet(tmp_path / "a.parquet", ROWS),
        as_parquet(tmp_path / "parquet_by_content", ROWS),
        tmp_path / "saved",
        tmp_path / "split",
        folder,
    ):
        assert read_records(path) == expected, path.name


def test_token_ids_and_messages_agree_across_formats(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ids = {"prompt_ids": [1, 2], "completion_ids": [3]}
    one = read_records(lines(tmp_path / "a.jsonl", ids, {"messages": turns}))
    assert one[0].form == "ids"
    assert one[1].messages == (Message("user", "hi"), Message("assistant", "ho"))
    assert [record.id for record in one] == ["row-1", "row-2"]
    spelled = {"prompt_ids": "1 2", "completion_ids": "[3]", "messages": ""}
    assert read_records(as_csv(tmp_path / "a.csv", [spelled, {"messages": json.dumps(turns)}])) == one
    assert read_records(as_parquet(tmp_path / "a.parquet", [ids | {"messages": None}, {"messages": turns}])) == one


def test_a_byte_order_mark_and_windows_lines_are_no_mistake(tmp_path: Path) -> None:
    body = "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + body.encode())
    assert [record.where for record in read_records(tmp_path / "a.jsonl")] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    as_csv(tmp_path / "a.csv", ROWS)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    assert len(read_records(tmp_path / "a.csv")) == 3


def test_a_csv_cell_over_the_default_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit(1000)
    try:
        (record,) = read_records(as_csv(tmp_path / "a.csv", [{"text": "x" * 1001}]))
        assert len(str(record.text)) == 1001
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_columns_are_renamed_and_wrapped(tmp_path: Path) -> None:
    fmt = RecordFormat(
        {"prompt": "question", "completion": "answer", "id": "text"},
        prompt_template="Question: {prompt}\nAnswer:",
        completion_template=" {completion}",
    )
    row = {"question": "Q {completion} {0}", "answer": "A {prompt}", "text": "t"}
    (record,) = read_records(lines(tmp_path / "a.jsonl", row), fmt=fmt)
    assert (record.id, record.prompt, record.completion) == (
        "t",
        "Question: Q {completion} {0}\nAnswer:",
        " A {prompt}",
    )
    assert read_records(as_csv(tmp_path / "a.csv", [row]), fmt=fmt) == [record]
    assert any(
        "field 1 of 2" in line for line in wrong(lines(tmp_path / "b.jsonl", {"prompt": "Q", "answer": "A"}), fmt=fmt)
    )
    extra = lines(tmp_path / "c.jsonl", row | {"score": 0.5})
    assert "field 4 of 4 is not a known field" in wrong(extra, fmt=fmt)[0]
    assert read_records(extra, fmt=RecordFormat(fmt.fields, ignore_unknown=True))[0].prompt == row["question"]


@pytest.mark.parametrize(
    "bad",
    [
        {"fields": {"question": "prompt"}},
        {"fields": {"prompt": "q", "completion": "q"}},
        {"prompt_template": "no placeholder"},
        {"completion_template": "{completion}{completion}"},
    ],
)
def test_a_format_that_cannot_work_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RecordFormat(**bad)


def test_written_records_read_back(tmp_path: Path) -> None:
    records = records_from(
        [
            {"id": "a", "text": "line\u2028separator", "group": "g"},
            {"prompt": "p", "completion": "c"},
            {"prompt_ids": [1], "completion_ids": [2]},
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        ]
    )
    path = write_records(records, tmp_path / "out.jsonl")
    assert read_records(path) == records
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="exists"):
        write_records(records, path)
    with pytest.raises(UsageError, match="bytes"):
        write_records([RawRecord("i", image=b"x", label=0)], tmp_path / "b.jsonl")


def test_a_record_does_not_print_itself(tmp_path: Path) -> None:
    rows = [
        {"id": CANARY, "text": CANARY},
        {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY}]},
    ]
    for record in read_records(lines(tmp_path / "a.jsonl", *rows)):
        assert CANARY not in repr(record) + repr(record.messages)


# Mistakes


def test_every_mistake_is_reported_with_its_line(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"id": "a", "text": "fine"},
        {"id": "a", "prompt": "p", "completion": " "},
        "",
        '{"id": 1, "text": "cut',
        {"prompt": "p"},
        {"text": "t", "label": 3},
        {"id": 1.5, "text": "", "complation": "x"},
        {"prompt_ids": [1, True], "completion_ids": []},
        {"prompt_ids": [-1], "completion_ids": [2**40]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
        {"messages": [{"role": "poet", "content": "x"}, {"role": "assistant", "content": "y", "mood": 1}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"id": "", "group": [], "text": 7},
        "[1]",
        '{"text": "a", "text": "b"}',
        {"text": "\ud800"},
        {},
        '{"text": %s}' % ("[" * 100_000),
        '{"id": %s, "text": "x"}' % ("9" * 5000),
    )
    expected = {
        2: ["`completion` is empty", "the id repeats the one at a.jsonl:1"],
        4: ["not valid JSON"],
        5: ["`completion` is missing or empty beside `prompt`"],
        6: ["found `text` + `label`"],
        7: ["`id` to be text or a whole number, found a number", "`text` is empty", "did you mean `completion`?"],
        8: ["`prompt_ids` to be a list of whole numbers", "`completion_ids` is empty"],
        9: ["`prompt_ids` to be token ids", "`completion_ids` to be token ids"],
        10: ["the last message to be the assistant's"],
        11: ["role of message 1"],
        12: ["found 1 of them"],
        13: ["`id` is empty", "`group` to be text", "`text` to be text, found a whole number"],
        14: ["expected a JSON object, found a list"],
        15: ["a key twice"],
        16: ["unpaired surrogate"],
        17: ["found none of them"],
        18: ["not usable JSON"],
        19: ["not usable JSON"],
    }
    found = wrong(path)
    for line, parts in expected.items():
        at = [text for text in found if text.startswith(f"a.jsonl:{line}: ")]
        assert len(at) == len(parts), at
        for part in parts:
            assert any(part in text for text in at), (line, part, at)
    assert len(found) == sum(map(len, expected.values()))
    numbers = [int(text.split(":")[1]) for text in found]
    assert numbers == sorted(numbers)


def test_the_list_is_capped_and_counts_the_rest(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": ""} for _ in range(SHOWN + 7)))
    with pytest.raises(MistakesError) as caught:
        read_records(path, role="control")
    shown = str(caught.value).splitlines()
    assert shown[0] == f"control ({SHOWN + 7} read): {SHOWN + 7} mistakes"
    assert len(shown) == 1 + SHOWN + 1
    assert shown[-1] == "and 7 more"
    assert len(caught.value.mistakes) == SHOWN + 7


def test_an_unknown_name_in_every_record_is_one_mistake(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"question": "q", "answer": "a"} for _ in range(9)))
    assert [text.split(";")[0] for text in wrong(path)] == [
        "a.jsonl:1: field 1 of 2 is not a known field in 9 records",
        "a.jsonl:1: field 2 of 2 is not a known field in 9 records",
    ]


def test_csv_mistakes_name_the_line_a_row_begins_on(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\na,"two\nlines"\nb,\nc,x,y\na,z\nd,"open\n')
    found = wrong(tmp_path / "a.csv")
    assert [text.split(": ")[0] for text in found] == ["a.csv:4", "a.csv:5", "a.csv:6", "a.csv:7"]
    assert "found 3" in found[1]
    assert "repeats the one at a.csv:2" in found[2]
    assert "check its quotes" in found[3]


def test_a_csv_without_a_header_does_not_print_its_first_record(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{CANARY},secret one\nx,secret two\n")
    (found,) = wrong(tmp_path / "a.csv")
    assert CANARY not in found
    assert "secret" not in found
    assert found.startswith("a.csv:1: expected columns among id, group, text")
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    assert "found a name twice" in wrong(tmp_path / "b.csv")[0]


def test_json_list_mistakes_name_the_line_a_record_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[\n  {"text":\n   "a"},\n  {"text": ""},\n  7,\n  {"text": "b"} {"text": "c"}\n]')
    assert [text.split(": ")[0] for text in wrong(path)] == ["a.json:5", "a.json:6", "a.json:7"]
    path.write_text('[{"text": "a"},\n{"text": "b"')
    assert "a.json:2: the record that begins here is not usable JSON" in wrong(path)[0]
    path.write_text('[{"text": "a"}]\n[]')
    assert "nothing after it" in wrong(path)[0]
    path.write_text("[]")
    assert "expected at least one record" in wrong(path)[0]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.csv", b" \n\n", "the file is empty"),
        ("binary.jsonl", bytes(range(256)), "found binary data"),
        ("utf16.csv", "id,text\na,b\n".encode("utf-16"), "found binary data"),
        ("noise.jsonl", b"\x93\x81\n" * 99, "expected JSON Lines, found no such line in 99"),
        ("prose.txt", b"Dear Sir,\nplease erase me.\n", "expected JSON Lines"),
        ("latin.csv", b"id,text\na,x\nb,caf\xe9\n", "latin.csv:3: the line is not valid UTF-8"),
        ("latin.json", b'[\n{"text": "caf\xe9"}]', "latin.json:2: the line is not valid UTF-8"),
        ("cut.parquet", b"PAR1 and no more", "damaged or encrypted"),
        ("header.csv", b"id,text\n", "expected at least one record"),
    ],
)
def test_a_file_that_is_no_record_file_is_one_line(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    (found,) = wrong(tmp_path / name)
    assert part in found


def test_one_undecodable_line_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": ""}\n')
    assert [text.split(": ")[0] for text in wrong(tmp_path / "a.jsonl")] == ["a.jsonl:2", "a.jsonl:3"]


def test_parquet_and_saved_mistakes_name_the_row(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": "a", "mood": "x"}, {"text": None, "mood": "y"}]
    found = wrong(as_parquet(tmp_path / "a.parquet", rows))
    assert found[0].startswith("a.parquet: field 2 of 2 is not a known field")
    assert found[1].startswith("a.parquet row 2: expected `text`")
    two = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"a": two, "b": two}).save_to_disk(tmp_path / "two")
    assert "expected one split, found 2" in wrong(tmp_path / "two")[0]
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "state.json").write_text("{}")
    assert "written by datasets" in wrong(tmp_path / "junk")[0]
    (tmp_path / "none").mkdir()
    assert "found none" in wrong(tmp_path / "none")[0]


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected an existing file or folder"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="needs --online"):
        read_records("owner/name:train")
    for impossible in ("nul\0byte", "x" * 5000, "\ud800"):
        with pytest.raises(UsageError, match="found"):
            read_records(impossible)


def test_a_hub_data_set_is_read_when_online(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        if args[0] == "owner/absent":
            raise ConnectionError(CANARY)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [record.id for record in read_records("owner/name/part:train[:5]", online=True)] == ["a", "b", "c"]
    assert seen == [(("owner/name", "part"), {"split": "train[:5]"})]
    with pytest.raises(ResourceError, match="ConnectionError") as caught:
        read_records("owner/absent", online=True)
    assert CANARY not in str(caught.value)


def test_text_and_images_do_not_mix(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    path = lines(tmp_path / "a.jsonl", {"text": "a"}, {"image": "a.png", "label": 0})
    assert "found both" in wrong(path)[0]


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    as_parquet(tmp_path / "a.parquet", ROWS)
    program = (
        "import sys\nfrom unlearn.records.tokens import read_records\n"
        f"read_records({str(tmp_path / 'a.parquet')!r}); read_records({str(tmp_path / 'saved')!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# Properties

_junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(CANARY) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.just(CANARY) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
_names = st.sampled_from(
    [
        "id",
        "text",
        "prompt",
        "completion",
        "prompt_ids",
        "completion_ids",
        "messages",
        "image",
        "label",
        "group",
        CANARY,
    ]
)
_rows = st.lists(st.dictionaries(_names, _junk, max_size=5), max_size=4)
_relaxed = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(path: Path) -> None:
    """Either records, or a clean error that quotes nothing."""
    caught: list[UnlearnError] = []
    try:
        read_records(path)
    except UnlearnError as error:
        caught.append(error)
    for error in caught:
        assert CANARY not in str(error)
        assert error.__cause__ is None
        assert error.exit_code == 2


@_relaxed
@given(rows=_rows)
def test_any_rows_give_records_or_a_clean_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    survives(lines(tmp_path / "a.jsonl", *rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    survives(tmp_path / "a.json")
    if rows and rows[0]:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), extrasaction="ignore", escapechar="\\")
        writer.writeheader()
        writer.writerows(rows)
        (tmp_path / "a.csv").write_text(out.getvalue(), encoding="utf-8", errors="replace", newline="")
        survives(tmp_path / "a.csv")


@_relaxed
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a"]),
    head=st.sampled_from([b"", b"PAR1", b"[", b'{"text": "', b"id,text\n", b'[{"text":"', CANARY.encode()]),
)
def test_any_bytes_give_records_or_a_clean_error(tmp_path: Path, data: bytes, name: str, head: bytes) -> None:
    (tmp_path / name).write_bytes(head + data)
    survives(tmp_path / name)


# Tokens


def byte_tokenizer(texts: list[str], vocab: int = 340, bos: bool = False, eos: bool = False) -> Any:
    """A byte-level BPE such as GPT-2's: a token may hold a space and a letter, or part of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
        ),
    )
    marks = [("<s>", 0), ("</s>", 1)]
    template = processors.TemplateProcessing(
        single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos), special_tokens=marks
    )
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


CORPUS = ["The name of the author is Ada. " * 3, "Question: who? Answer: no one knows the answer."]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_prompt_and_completion_ids_decode_to_the_joint_text(bos: bool, eos: bool) -> None:
    tokenizer = byte_tokenizer(CORPUS, bos=bos, eos=eos)
    rows = [
        ("Question: who? Answer:", " no one"),
        ("The name ", "is Ada"),
        ("a", "🙂 ü"),
        ("a  ", "  b"),
        ("x\n", "\ny </s>"),
    ]
    records = records_from({"prompt": p, "completion": c} for p, c in rows)
    for (prompt, completion), record in zip(rows, tokenise(records, tokenizer, max_length=None), strict=True):
        start = ("<s>" if bos else "") + prompt
        assert tokenizer.decode(record.ids) == start + completion  # what the tokenizer appends is gone
        head, tail = tokenizer.decode(record.ids[: record.n_prompt]), tokenizer.decode(record.completion)
        assert head + tail == start + completion
        assert tail.endswith(completion)  # a straddling token belongs to the completion
        assert start.startswith(head)
        plain = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        assert list(record.ids) == [0] * bos + plain
        assert record.compressed_bytes == len(zlib.compress(completion.encode()))


def test_a_token_over_the_boundary_belongs_to_the_completion() -> None:
    tokenizer = tiny.tokenizer(vocab=100, merges=[(":", " "), ("i", "s")])
    joint = tokenise(records_from([{"prompt": "A:", "completion": " b"}]), tokenizer, max_length=None)[0]
    assert tokenizer.convert_ids_to_tokens(joint.completion) == [": ", "b"]
    assert joint.n_prompt == 1
    with pytest.raises(UsageError, match="no token lies wholly in the prompt"):
        tokenise(records_from([{"prompt": "i", "completion": "s"}]), tokenizer, max_length=None)
    begun = tiny.tokenizer(vocab=100, merges=[(":", " "), ("i", "s")], bos=True)
    assert tokenise(records_from([{"prompt": "i", "completion": "s"}]), begun, max_length=None)[0].n_prompt == 1


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=12).filter(str.strip),
    completion=st.text(min_size=1, max_size=12).filter(str.strip),
)
def test_any_text_splits_where_it_should(prompt: str, completion: str) -> None:
    tokenizer = _SHARED
    record = tokenise(records_from([{"prompt": prompt, "completion": completion}]), tokenizer, max_length=None)[0]
    assert tokenizer.decode(record.ids) == "<s>" + prompt + completion
    raw = b"".join(_bytes_of(token) for token in tokenizer.convert_ids_to_tokens(record.completion))
    assert raw.endswith(completion.encode())
    if record.n_prompt + 1 < len(record.ids):  # one token fewer would lose part of the completion
        rest = b"".join(_bytes_of(token) for token in tokenizer.convert_ids_to_tokens(record.completion[1:]))
        assert not rest.endswith(completion.encode())


def _bytes_of(token: str) -> bytes:
    return token.encode() if token in ("<s>", "</s>") else bytes(_BYTES[c] for c in token)


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes, from the published rule."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in plain)}


_BYTES = _byte_letters()
_SHARED = byte_tokenizer(CORPUS, bos=True, eos=True)


@pytest.mark.parametrize("bos", [False, True])
def test_text_conditions_on_its_first_tokens(bos: bool) -> None:
    tokenizer = tiny.tokenizer(bos=bos, eos=True)
    records = records_from([{"text": "hello"}])
    one = tokenise(records, tokenizer, max_length=None)[0]
    assert one.n_prompt == 1
    assert len(one.ids) == 5 + bos
    assert one.compressed_bytes == len(zlib.compress(b"hello" if bos else b"ello"))
    assert tokenise(records, tokenizer, max_length=None, text_prompt_tokens=3)[0].n_prompt == 3
    short = records_from([{"text": "h"}])
    if bos:
        assert tokenise(short, tokenizer, max_length=None)[0].n_tokens == 1
    else:
        with pytest.raises(UsageError, match="expected more than 1 tokens, found 1"):
            tokenise(short, tokenizer, max_length=None)
    with pytest.raises(UsageError, match="at least 1"):
        tokenise(records, tokenizer, max_length=None, text_prompt_tokens=0)


def test_a_special_token_in_a_record_is_not_mistaken_for_an_appended_one() -> None:
    tokenizer = tiny.tokenizer(eos=True)
    record = tokenise(records_from([{"prompt": "a", "completion": "b<|im_end|>"}]), tokenizer, max_length=None)[0]
    assert record.ids[-1] == tiny.EOS
    assert record.n_tokens == 2


def test_token_mistakes_are_reported_at_once_by_line(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    path = lines(
        tmp_path / "a.jsonl",
        {"text": "x" * 9},
        {"text": "fine"},
        {"text": "x"},
        {"prompt_ids": [1, 2], "completion_ids": [96]},
        {"prompt_ids": [3], "completion_ids": [95]},
    )
    with pytest.raises(MistakesError) as caught:
        tokenise(read_records(path), tokenizer, max_length=8)
    found = caught.value.mistakes
    assert [text.split(": ")[0] for text in found] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert "at most 8 tokens, found 9" in found[0]
    assert "below the vocabulary size 96" in found[2]
    with pytest.raises(UsageError, match="does not belong to the checkpoint"):
        tokenise(records_from([{"text": "zz"}]), tokenizer, max_length=None, vocab_size=20)


def test_token_ids_are_taken_as_they_are() -> None:
    records = records_from([{"id": "a", "prompt_ids": [2, 2], "completion_ids": [9, 1], "group": "g"}])
    for tokenizer, text in ((tiny.tokenizer(bos=True, eos=True), None), (None, "9 1")):
        (record,) = tokenise(records, tokenizer, max_length=4)
        assert (record.record_id, record.ids, record.n_prompt, record.group) == ("a", (2, 2, 9, 1), 2, "g")
        spelled = text or tokenizer.decode([9, 1])
        assert record.compressed_bytes == len(zlib.compress(spelled.encode()))
    with pytest.raises(UsageError, match="expected a tokenizer"):
        tokenise(records_from([{"text": "a b"}]), None, max_length=None)


def test_a_tokenizer_without_offsets_is_unsupported() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="fast tokenizer"):
        tokenise(records_from([{"text": "ab"}]), Slow(), max_length=None)


def test_a_tokenizer_that_fails_does_not_quote_the_text() -> None:
    class Broken:
        is_fast = True

        def __len__(self) -> int:
            return 10

        def __call__(self, text: str, **_: Any) -> None:
            raise ValueError(text)

    with pytest.raises(UsageError) as caught:
        tokenise(records_from([{"text": CANARY}]), Broken(), max_length=None)
    assert CANARY not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# Chat


def chat(*turns: tuple[str, str]) -> list[RawRecord]:
    return records_from([{"messages": [{"role": role, "content": content} for role, content in turns]}])


def test_a_conversation_goes_through_the_template() -> None:
    tokenizer = tiny.tokenizer(bos=True, eos=True)
    (record,) = tokenise(chat(("system", "be"), ("user", "hi"), ("assistant", "ho ho")), tokenizer, max_length=None)
    turns = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(record.ids[: record.n_prompt]) == turns  # no second beginning of sequence
    assert tokenizer.decode(record.completion) == "ho ho"  # and no end of turn
    assert record.compressed_bytes == len(zlib.compress(b"ho ho"))


def test_what_a_template_puts_before_the_answer_conditions() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}<t></t>{% endif %}"
        "{{ m['content'] | trim }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (record,) = tokenise(chat(("user", "assistant"), ("assistant", " yes ")), tokenizer, max_length=None)
    assert tokenizer.decode(record.ids[: record.n_prompt]) == "[user]assistant;[assistant]<t></t>"
    assert tokenizer.decode(record.completion) == "yes"


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ raise_exception('" + CANARY + "') }}", "refuses this conversation"),
        ("{% for m in messages %}{{ m['role'] }};{% endfor %}", "does not render the last message"),
        ("{{ messages | length }}{{ messages[-1]['content'] }}", "the same with and without the answer"),
    ],
)
def test_a_template_that_cannot_split_is_a_mistake(template: str, part: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=part) as caught:
        tokenise(chat(("user", "a"), ("assistant", "b")), tokenizer, max_length=None)
    assert CANARY not in str(caught.value)


def test_no_chat_template_is_one_clear_line() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="expected a tokenizer with a chat template"):
        tokenise(chat(("user", "a"), ("assistant", "b")), tokenizer, max_length=None)


def test_a_template_that_prints_the_date_prints_a_fixed_one() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y|%Y-%m-%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    assert render_chat(tokenizer, [Message("user", "x")], add_generation_prompt=False) == "01 Jan 2025|2025-01-01x"


# Images


def processor(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float().reshape(3, 2, 2)


def test_images_are_opened_beside_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (2, 2), (9, 9, 9)).save(folder / "a.png")
    encoded = (folder / "a.png").read_bytes()
    rows = [{"image": "a.png", "label": 1}, {"image": "a.png", "label": "cat", "group": "g"}]
    records = read_records(lines(folder / "r.jsonl", *rows))
    table = as_parquet(tmp_path / "a.parquet", [{"image": {"bytes": encoded, "path": None}, "label": 1}])
    records += read_records(table) + read_records(as_csv(folder / "r.csv", rows[:1]))
    done = images(records, processor, {"dog": 1, "cat": 0})
    assert [record.label for record in done] == [1, 0, 1, 1]
    assert done[1].group == "g"
    for record in done:
        torch.testing.assert_close(record.pixels, torch.full((3, 2, 2), 9.0))
    relative = images([RawRecord("x", image="set/a.png", label=0)], processor, {"a": 0}, tmp_path)
    torch.testing.assert_close(relative[0].pixels, done[0].pixels)


def test_image_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "ok.png")
    (tmp_path / "junk.png").write_bytes(b"junk" + CANARY.encode())
    (tmp_path / "cut.png").write_bytes((tmp_path / "ok.png").read_bytes()[:40])
    path = lines(
        tmp_path / "a.jsonl",
        {"image": f"{CANARY}.png", "label": 0},
        {"image": "ok.png", "label": -1},
        {"image": 3, "label": True},
    )
    found = wrong(path)
    assert [text.split(": ")[0] for text in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:3"]
    assert CANARY not in "".join(found)
    path = lines(
        tmp_path / "b.jsonl",
        {"image": "ok.png", "label": 2},
        {"image": "ok.png", "label": CANARY},
        {"image": "junk.png", "label": 0},
        {"image": "cut.png", "label": "1"},
        {"image": "ok.png", "label": "1"},
    )
    with pytest.raises(MistakesError) as caught:
        images(read_records(path), processor, {"a": 0, "b": 1})
    found = list(caught.value.mistakes)
    assert [text.split(": ")[0] for text in found] == ["b.jsonl:1", "b.jsonl:2", "b.jsonl:3", "b.jsonl:4"]
    assert "out of range" in found[0]
    assert "class names" in found[1]
    assert CANARY not in "".join(found)
    with pytest.raises(UsageError, match="expected an image record, found text"):
        images([RawRecord("a", text="t")], processor, {"a": 0})
    with pytest.raises(UsageError, match="expected a text record, found an image"):
        tokenise([RawRecord("a", image="x", label=0)], tiny.tokenizer(), max_length=None)


# Digest


def test_the_digest_covers_everything_a_probe_sees() -> None:
    tokenizer = tiny.tokenizer()
    rows = [{"id": "a", "prompt": "xy", "completion": "z", "group": "g"}, {"id": "b", "text": "pq"}]
    base = tokenise(records_from(rows), tokenizer, max_length=None)
    changes = [
        [{**rows[0], "id": "c"}, rows[1]],
        [{**rows[0], "group": None}, rows[1]],
        [{**rows[0], "prompt": "x", "completion": "yz"}, rows[1]],
        [{**rows[0], "completion": "w"}, rows[1]],
        rows[::-1],
        rows[:1],
    ]
    digests = [data_digest(tokenise(records_from(change), tokenizer, max_length=None)) for change in changes]
    assert len({data_digest(base), *digests}) == len(changes) + 1
    assert data_digest(base) == data_digest(tokenise(records_from(rows), tokenizer, max_length=None))
    assert data_digest([]) == f"sha256:{hashlib.sha256().hexdigest()}"


def test_the_digest_of_images_sees_pixels_and_labels(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png")
    Image.new("RGB", (2, 2), (1, 2, 4)).save(tmp_path / "b.png")
    names = {"x": 0, "y": 1}

    def digest(name: str, label: int) -> str:
        return data_digest(images([RawRecord("i", image=str(tmp_path / name), label=label)], processor, names))

    assert len({digest("a.png", 0), digest("b.png", 0), digest("a.png", 1)}) == 3
