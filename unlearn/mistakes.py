"""Every mistake of a file in one error: collected, ordered by line, capped, never quoting what the file holds."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from probes.errors import UsageError

SHOWN = 50


class MistakesError(UsageError):
    """Several mistakes at once: a summary line, then `place: what is wrong` for up to `SHOWN` of them.

    Attributes:
        mistakes: every line, uncapped.
    """

    def __init__(self, summary: str, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(mistakes)
        shown = self.mistakes[:SHOWN]
        if len(self.mistakes) > SHOWN:
            shown += (f"and {len(self.mistakes) - SHOWN} more",)
        super().__init__("\n".join((summary, *shown)))


class Mistakes:
    """Collector of mistakes, one place at a time.

    Args:
        subject: what is being read, for the summary line.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._found: list[tuple[str, int, str]] = []

    def add(self, source: str, line: int, what: str, *, unit: str = ":") -> None:
        """Note one mistake at `source:line`, or `source row line` with `unit=" row "`; line 0 is the whole source."""
        place = f"{source}{unit}{line}" if line else source
        self._found.append((source, line, f"{place}: {what}"))

    def __len__(self) -> int:
        return len(self._found)

    def lines(self) -> list[str]:
        """All mistakes in the order of their lines; sources keep the order in which they first appeared."""
        order = {source: i for i, source in reversed(list(enumerate(source for source, _, _ in self._found)))}
        return [text for _, _, text in sorted(self._found, key=lambda found: (order[found[0]], found[1]))]

    def error(self) -> MistakesError:
        """What was collected, as one error."""
        return MistakesError(f"{self.subject}: {len(self)} mistake{'s' * (len(self) != 1)}", self.lines())

    def raise_any(self) -> None:
        """Raise what was collected.

        Raises:
            MistakesError: if there is at least one mistake.
        """
        if self._found:
            raise self.error()


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """`(did you mean X?)` where a known name is close, else nothing: an unknown name may itself hold personal data."""
    close = get_close_matches(unknown.strip().lower(), list(known), n=1, cutoff=0.75)
    return f" (did you mean `{close[0]}`?)" if close else ""
