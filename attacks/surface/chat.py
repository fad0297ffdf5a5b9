"""Chat wrappers: the same prompt as a turn of a conversation, and a conversation as plain text.

An edit made on one form of a prompt may leave the others as they were. Where the tokenizer has a chat template the
caller renders `turns` through it, in one piece with the answer. Otherwise, or besides, the wrappers here are common
forms of instruction data, written out. A record that came as a conversation is asked for as plain text.

Limits: a template that a model was not trained on says little either way; compare with never-seen records.
"""

from __future__ import annotations

from collections.abc import Sequence

from attacks.surface.rewrites import behind
from probes.errors import UsageError

Turn = tuple[str, str]  # role and content

# What stands before the user's words, and between them and the answer.
WRAPPERS: dict[str, tuple[str, str]] = {
    "user_assistant": ("User: ", "\nAssistant:"),
    "human_ai": ("Human: ", "\n\nAI:"),
    "instruction": ("### Instruction:\n", "\n\n### Response:"),
    "question_answer": ("Q: ", "\nA:"),
}


def wrapped(prompt: str, wrapper: str) -> str:
    """A prompt as the user's turn of a conversation written out; blanks at its end stay at the end.

    Raises:
        UsageError: an unknown wrapper.
    """
    before, after = _wrapper(wrapper)
    return before + behind(prompt, after)


def turns(prompt: str, completion: str) -> tuple[Turn, Turn]:
    """A user's and an assistant's turn for a chat template, which sets its own blanks around both."""
    return ("user", prompt.strip()), ("assistant", completion.strip())


def flattened(conversation: Sequence[Turn], wrapper: str | None = None) -> str:
    """A conversation before its last answer as one prompt.

    Args:
        conversation: role and content of each turn but the answer's, at least one.
        wrapper: names speakers as this wrapper does; None for the contents alone, line by line.

    Returns:
        The prompt. The answer follows it behind a blank where there is a wrapper, on a new line otherwise.

    Raises:
        UsageError: no turn, or an unknown wrapper.
    """
    if not conversation:
        raise UsageError("expected a conversation of at least one turn before the answer, found none")
    if wrapper is None:
        return "\n".join(content for _, content in conversation)
    before, after = _wrapper(wrapper)
    gap = after[: len(after) - len(after.lstrip("\n"))]  # the line breaks between turns
    parts = [
        f"{after.strip()} {content}" if role == "assistant" else before + content for role, content in conversation
    ]
    return gap.join(parts) + after


def _wrapper(name: str) -> tuple[str, str]:
    if name not in WRAPPERS:
        raise UsageError(f"expected a wrapper among {', '.join(WRAPPERS)}, found another name")
    return WRAPPERS[name]
