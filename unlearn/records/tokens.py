r"""Records: read from files, checked all at once, tokenised exactly once.

A record is `text`, or `prompt` + `completion`, or `prompt_ids` + `completion_ids`, or `messages`, or `image` + `label`;
optionally with `id` (else `row-<n>`, n counting records from 1) and `group`. `RecordFormat` renames columns and
wraps the two texts: with `fields={"prompt": "question", "completion": "answer"}`,
`prompt_template="Question: {prompt}\nAnswer:"` and `completion_template=" {completion}"`, the line

    {"question": "Q", "answer": "A"}    becomes    prompt "Question: Q\nAnswer:", completion " A"

Prompt and completion are tokenised jointly, so the ids are those the model saw in training; the character offsets
then say where the completion begins. A token that straddles the boundary belongs to the completion.

Nothing here quotes a record: a mistake names its file, its line and the rule it broke. Reading needs no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.errors import UnsupportedError, UsageError
from unlearn.mistakes import Mistakes
from unlearn.records.files import read_records, records_from, write_records
from unlearn.records.raw import MAX_TOKEN_ID, Message, Mistake, RawRecord, RecordFormat

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from probes.records import ImageRecord, TokenRecord

__all__ = [
    "Message",
    "RawRecord",
    "RecordFormat",
    "data_digest",
    "images",
    "read_records",
    "records_from",
    "render_chat",
    "tokenise",
    "write_records",
]


def tokenise(
    raw: Sequence[RawRecord],
    tokenizer: Any,
    *,
    max_length: int | None,
    text_prompt_tokens: int = 1,
    vocab_size: int | None = None,
) -> list[TokenRecord]:
    """Turn records into token ids, once.

    A beginning-of-sequence token that the tokenizer adds is kept as conditioning; tokens it appends are dropped, since
    they are no part of the record. Conversations go through the chat template: the completion is the content of the
    last message as the template renders it, without the end-of-turn marker. A template that prints today's date gets
    a fixed one, so that the ids of a record never depend on the day.

    Args:
        raw: text records of any form.
        tokenizer: a fast Hugging Face tokenizer; None is enough where all records are `prompt_ids` + `completion_ids`.
        max_length: the most tokens a record may have, prompt included; None for no limit.
        text_prompt_tokens: how many tokens of a `text` record only condition, at least 1, a beginning-of-sequence
            token included.
        vocab_size: the model's vocabulary; by default the tokenizer's.

    Returns:
        One `TokenRecord` for each record, in order. `compressed_bytes` is the zlib size of the completion's text (of
        its ids spelled out, where there is no tokenizer to decode them).

    Raises:
        UsageError: with every mistake: too long, no completion token, ids outside the vocabulary, no chat template, ...
        UnsupportedError: if the tokenizer gives no character offsets.
    """
    from probes.records import TokenRecord

    if text_prompt_tokens < 1:
        raise UsageError(f"expected text_prompt_tokens to be at least 1, found {text_prompt_tokens}")
    forms = {record.form for record in raw}
    if tokenizer is None and forms - {"ids"}:
        raise UsageError("expected a tokenizer, found none; give the records as prompt_ids + completion_ids")
    if forms & {"text", "completion", "messages"} and not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "expected a fast tokenizer (tokenizer.json), found one without character offsets; "
            "convert it, or give the records as prompt_ids + completion_ids"
        )
    if "messages" in forms and not getattr(tokenizer, "chat_template", None):
        raise UsageError("expected a tokenizer with a chat template, found none; give prompt + completion instead")
    limit = vocab_size if vocab_size is not None else (len(tokenizer) if tokenizer is not None else MAX_TOKEN_ID)
    mistakes = Mistakes("tokenising")
    tokens: list[TokenRecord] = []
    for record in raw:
        try:
            ids, n_prompt, completion = _encode(record, tokenizer, text_prompt_tokens)
            if max(ids) >= limit:
                whose = "" if record.form == "ids" else "; this tokenizer does not belong to the checkpoint"
                raise Mistake(f"expected token ids below the vocabulary size {limit}, found a larger one{whose}")
            if max_length is not None and len(ids) > max_length:
                raise Mistake(f"expected at most {max_length} tokens, found {len(ids)}; shorten or split the record")
        except Mistake as mistake:
            mistakes.add(record.where or "records", 0, str(mistake))
            continue
        size = len(zlib.compress(completion.encode("utf-8", "replace")))
        tokens.append(TokenRecord(record.id, tuple(ids), n_prompt, size, record.group))
    mistakes.raise_any()
    return tokens


def _encode(record: RawRecord, tokenizer: Any, text_prompt_tokens: int) -> tuple[list[int], int, str]:
    """Token ids, how many of them condition, and the completion's text."""
    if record.prompt_ids is not None and record.completion_ids is not None:
        words = " ".join(map(str, record.completion_ids))
        if tokenizer is not None and max(record.completion_ids) < len(tokenizer):
            words = tokenizer.decode(record.completion_ids, clean_up_tokenization_spaces=False)
        return [*record.prompt_ids, *record.completion_ids], len(record.prompt_ids), words
    if record.text is not None:
        ids, offsets = _offsets(tokenizer, record.text, add_special_tokens=True)
        if len(ids) <= text_prompt_tokens:
            raise Mistake(
                f"expected more than {text_prompt_tokens} tokens, found {len(ids)}: "
                f"the first {text_prompt_tokens} only condition"
            )
        return ids, text_prompt_tokens, record.text[offsets[text_prompt_tokens][0] :]
    if record.messages is not None:
        prompt, completion = _conversation(record.messages, tokenizer)
        special = False  # the template has written them
    elif record.prompt is not None and record.completion is not None:
        prompt, completion, special = record.prompt, record.completion, True
    else:
        raise Mistake("expected a text record, found an image")
    ids, offsets = _offsets(tokenizer, prompt + completion, add_special_tokens=special)
    n_prompt = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    if n_prompt == len(ids):
        raise Mistake("the completion yields no token")
    if n_prompt == 0:
        raise Mistake("no token lies wholly in the prompt; lengthen the prompt or shorten the completion")
    return ids, n_prompt, completion


def _offsets(tokenizer: Any, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans of a text; what the tokenizer appends after the text (end of sequence) is dropped."""
    try:
        encoded = tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
    except Exception as error:  # the cause may quote the text
        raise Mistake(f"the tokenizer cannot encode it ({type(error).__name__})") from None
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while offsets and offsets[-1][1] == 0:  # added tokens have the empty span (0, 0)
        ids.pop()
        offsets.pop()
    if not ids:
        raise Mistake("the text yields no token")
    return ids, offsets


# A macro shadows the function `strftime_now` that transformers gives to templates.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format|replace('%d','01')|replace('%m','01')|replace('%Y','2025')"
    "|replace('%b','Jan')|replace('%B','January')|replace('%A','Wednesday')|replace('%a','Wed')"
    "|replace('%H','00')|replace('%M','00')|replace('%S','00') }}{%- endmacro -%}"
)


def render_chat(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """A conversation as the tokenizer's chat template writes it, on a fixed date.

    Raises:
        UsageError: if the template refuses the conversation (roles that do not alternate, no system role, ...).
    """
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    try:
        rendered = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template raises what it likes, with the text in it
        raise UsageError(f"the chat template refuses this conversation ({type(error).__name__})") from None
    return str(rendered)


def _conversation(messages: Sequence[Message], tokenizer: Any) -> tuple[str, str]:
    """Everything before the last message's content, and that content as rendered."""
    try:
        opening = render_chat(tokenizer, messages[:-1], add_generation_prompt=True)
        whole = render_chat(tokenizer, messages, add_generation_prompt=False)
    except UsageError as error:
        raise Mistake(str(error)) from None
    if not whole.startswith(opening):
        raise Mistake("the chat template does not render the prompt the same with and without the answer")
    for content in (messages[-1].content, messages[-1].content.strip()):  # some templates trim
        at = whole.find(content, len(opening))
        if at >= 0:
            return whole[:at], content
    raise Mistake("the chat template does not render the last message as it is written")


def images(
    raw: Sequence[RawRecord],
    processor: Callable[[Image.Image], Tensor],
    label2id: Mapping[str, int],
    base_folder: str | Path | None = None,
) -> list[ImageRecord]:
    """Open, normalise and label image records.

    Args:
        raw: image records.
        processor: image -> float32 [channels, height, width], resized and normalised.
        label2id: the classifier's class names and indices; a label may be either.
        base_folder: what relative image paths start from (records read from a file hold absolute ones).

    Raises:
        UsageError: with every mistake: a missing or unreadable file, a label out of range or unknown.
    """
    from probes.records import ImageRecord

    mistakes = Mistakes("images")
    done: list[ImageRecord] = []
    for record in raw:
        try:
            label = _label(record.label, label2id)
            done.append(ImageRecord(record.id, _pixels(record.image, processor, base_folder), label, record.group))
        except Mistake as mistake:
            mistakes.add(record.where or "records", 0, str(mistake))
    mistakes.raise_any()
    return done


def _label(label: int | str | None, label2id: Mapping[str, int]) -> int:
    indices = set(label2id.values())
    if isinstance(label, str):
        if label in label2id:
            return label2id[label]
        if not re.fullmatch(r"[0-9]{1,9}", label):
            raise Mistake(f"expected one of the classifier's {len(indices)} class names, found another name")
        label = int(label)  # a CSV has no numbers
    if label is None:
        raise Mistake("expected an image record, found text")
    if label not in indices:
        raise Mistake(f"expected a class index below {len(indices)}, found one out of range")
    return label


def _pixels(image: str | bytes | None, processor: Callable[[Image.Image], Tensor], base: str | Path | None) -> Tensor:
    from PIL import Image

    try:
        source = io.BytesIO(image) if isinstance(image, bytes) else Path(base or ".") / str(image)
        with Image.open(source) as opened:
            opened.load()
            return processor(opened)
    except FileNotFoundError:
        raise Mistake("the image file does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise Mistake(f"the image cannot be read ({type(error).__name__})") from None


def data_digest(records: Sequence[TokenRecord] | Sequence[ImageRecord]) -> str:
    """`sha256:<hex>` over what a probe sees, in order: ids, tokens, splits and groups, or pixels, labels and groups."""
    digest = hashlib.sha256()
    for part in _digest_parts(records):
        digest.update(len(part).to_bytes(8, "little"))  # lengths first: no two lists of parts share their bytes
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _digest_parts(records: Sequence[TokenRecord] | Sequence[ImageRecord]) -> Iterator[bytes]:
    from probes.records import TokenRecord

    for record in records:
        if isinstance(record, TokenRecord):
            yield json.dumps(["tokens", record.record_id, record.group, record.n_prompt, record.ids]).encode()
        else:
            pixels = record.pixels.detach().cpu().contiguous()
            yield json.dumps(["image", record.record_id, record.group, record.label, list(pixels.shape)]).encode()
            yield pixels.numpy().tobytes()
