"""The error family of the whole toolkit, at the bottom layer so that every package can raise it.

A message is one line: what was expected, what was found, what to do. It never quotes record text.
The exit code is the one the command line documents (docs/cli.md).
"""

from __future__ import annotations


class UnlearnError(Exception):
    """Base class; `exit_code` is what the command line returns for it."""

    exit_code = 5


class UsageError(UnlearnError):
    """A file, option or request is missing or invalid (exit code 2)."""

    exit_code = 2


class IntegrityError(UnlearnError):
    """A digest, signature or path rule was violated; nothing was written (exit code 4)."""

    exit_code = 4


class UnsupportedError(UnlearnError):
    """The model, tokenizer or format is one the toolkit cannot handle (exit code 5)."""


class ResourceError(UnlearnError):
    """The environment failed: memory, disk, a missing optional package (exit code 5)."""
