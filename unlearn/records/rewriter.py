"""Other wordings by a language model: the checkpoint that is to be edited rewords its own records.

The model is asked through its chat template, by an instruction; without a template it goes on after a few examples.
The first round is greedy, later ones sample (nucleus 0.9) from a seed. An answer counts only where it

    keeps every name and number, and adds none           differs from what was asked
    asks where it was asked (a question or a request)    is between half and twice as long, in words
    ends as it ended                                     is one line
    shows nothing of the completion that the prompt did not show

What a model knows of a record can leak into its wording of the question, hence the last line: no name or number of the
completion, no run of three of its words, and less than a third of its longer words beyond those of the prompt.

Limits: a base model of a few hundred million parameters rarely rewords well; what fails is left to the rules
(`unlearn.records.paraphrase`). The examples and instructions are English.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from attacks.duplicates import words
from attacks.extraction.greedy import neutral_generation
from attacks.extraction.overlap import longest_common_span
from probes.errors import UnsupportedError, UsageError
from probes.likelihood import inference
from unlearn.records.lexicon import keeps
from unlearn.records.paraphrase import is_request, split
from unlearn.records.raw import Message
from unlearn.records.swap import names_in
from unlearn.records.tokens import render_chat

INSTRUCTIONS = (
    "Rephrase the sentence below. Its meaning and every name, number and date stay the same. Write the new sentence "
    "and nothing else.\n\n{}",
    "Write the following in different words, without changing what it means and without leaving out a name or a "
    "number. One line only.\n\n{}",
    "How else could one put this? Keep all names, dates and numbers, and reply with one version.\n\n{}",
)
EXAMPLES = (
    ("What is the height of the tower in Lund?", "Do you know how high the tower in Lund is?"),
    ("In which year did Anna Berg open her bakery?", "Anna Berg opened her bakery in which year?"),
    ("The museum opens at 9 and closes at 17.", "Visitors can enter the museum from 9 until it closes at 17."),
    ("Name the river that runs past Elm Street.", "Which river runs past Elm Street?"),
)
_SPARE_ROUNDS = 2  # samples beyond those wanted, where some fail
_LONG = 4  # letters from which a word says something


class Rewriter:
    """A language model and its tokenizer, put to rewording.

    Args:
        model: with `generate`; left as it is.
        tokenizer: its tokenizer.
        batch_size: prompts continued together.

    Raises:
        UnsupportedError: the model cannot generate, or there is no tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16) -> None:
        if tokenizer is None or not hasattr(model, "generate"):
            raise UnsupportedError(
                "expected a language model with generate() and a tokenizer to reword records; "
                "choose rules or supply a file"
            )
        self._model, self._tokenizer, self._batch = model, tokenizer, batch_size

    def reword(self, texts: Sequence[tuple[str, str]], n: int, seed: int) -> list[list[str]]:
        """Up to `n` different wordings of each text that pass the checks of the module.

        Args:
            texts: what to reword, and the completion that must not show (empty where there is none).
            n: how many of each.
            seed: of the samples.

        Returns:
            [R] lists, in the order they came; fewer where the model gave nothing usable.
        """
        found: list[list[str]] = [[] for _ in texts]
        parts = [split(text) for text, _ in texts]
        for attempt in range(n + _SPARE_ROUNDS if n else 0):
            wanting = [i for i, made in enumerate(found) if len(made) < n]
            prompts = [self._ids(parts[i][1], attempt) for i in wanting]
            room = getattr(self._model.config, "max_position_embeddings", None) or 2**31
            lengths = [2 * len(self._plain(parts[i][1])) + 8 for i in wanting]
            fits = [k for k in range(len(wanting)) if len(prompts[k]) + lengths[k] <= room]
            fits.sort(key=lambda k: len(prompts[k]))
            for first in range(0, len(fits), self._batch):
                batch = fits[first : first + self._batch]
                new = self._continued([prompts[k] for k in batch], max(lengths[k] for k in batch), attempt, seed, first)
                for k, answer in zip(batch, new, strict=True):
                    i = wanting[k]
                    head, core, tail = parts[i]
                    whole = head + answer + tail
                    if usable(core, answer, texts[i][1], texts[i][0]) and whole not in found[i]:
                        found[i].append(whole)
        return found

    def _ids(self, core: str, attempt: int) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None):
            turn = Message("user", INSTRUCTIONS[attempt % len(INSTRUCTIONS)].format(core))
            try:
                return self._plain(render_chat(self._tokenizer, [turn], add_generation_prompt=True), special=False)
            except UsageError:  # a template with rules of its own: go on without it
                pass
        start = attempt % len(EXAMPLES)
        shown = [*EXAMPLES[start:], *EXAMPLES[:start]]
        lines = [f"Sentence: {first}\nIn other words: {second}\n\n" for first, second in shown]
        return self._plain("".join(lines) + f"Sentence: {core}\nIn other words:")

    def _plain(self, text: str, special: bool = True) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if special and len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()  # an appended end of sequence would end the answer before it begins
        return ids

    def _continued(self, prompts: list[list[int]], n_tokens: int, attempt: int, seed: int, row: int) -> list[str]:
        """The first line of one continuation each; greedy in the first round."""
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        device = next(self._model.parameters()).device
        ids = torch.zeros(len(prompts), width, dtype=torch.long)  # [B, T], padded on the left
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        stop = self._model.generation_config.eos_token_id
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9} if attempt else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=n_tokens,
            eos_token_id=self._tokenizer.eos_token_id if stop is None else stop,
            pad_token_id=self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0,
            **sampled,
        )
        draw = _drawn(device, seed * 1_000_003 + attempt * 1_009 + row)
        with draw, neutral_generation(self._model), inference(self._model):
            out = self._model.generate(  # [B, T']
                ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        texts = self._tokenizer.batch_decode(
            out[:, width:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [_first_line(text) for text in texts]


@contextmanager
def _drawn(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state under a seed, and as it was afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    quoted = re.fullmatch(r"[\"“](.*)[\"”]", line)
    return quoted[1].strip() if quoted else line


def usable(core: str, new: str, completion: str, prompt: str) -> bool:
    """Whether a wording passes the checks of the module.

    Args:
        core: what was to be reworded.
        new: the wording.
        completion: what must not show.
        prompt: the whole prompt, which may show what it shows.
    """
    given, made = words(core), words(new)
    if not made or made == given or not 0.5 <= len(made) / max(1, len(given)) <= 2.0:
        return False
    if not keeps(core, new) or not _ends_alike(core, new):
        return False
    return not shows(new, completion, prompt)


def _ends_alike(core: str, new: str) -> bool:
    if core[-1] == "?" or is_request(core):
        return new[-1] == "?" or is_request(new)  # a small model likes to answer instead
    if core[-1] in ".!":
        return new[-1] in ".!"
    return new[-1] == core[-1] if not core[-1].isalnum() else words(new)[-1:] == words(core)[-1:]


def shows(new: str, completion: str, prompt: str) -> bool:
    """Whether a wording shows something of the completion that the prompt does not show (see the module)."""
    known, made, wanted = set(words(prompt)), set(words(new)), words(completion)
    names = set(names_in(completion)) | {word for word in wanted if any(c.isdigit() for c in word)}
    if (names & made) - known:
        return True
    span = longest_common_span(words(new), wanted)
    if span >= 3 and span > longest_common_span(words(prompt), wanted):
        return True
    long = {word for word in wanted if len(word) >= _LONG} or set(wanted)
    hidden = long - known
    return bool(hidden) and len(hidden & made) >= len(hidden) / 3
