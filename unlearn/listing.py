"""What an installation has: probes, attacks, editors, suites, with one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unlearn.resources import config_names

KINDS = ("probes", "attacks", "editors", "suites")


def _broken(lines: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, problem) for name, _, problem in (line.partition(": ") for line in lines)]


def _probes() -> list[tuple[str, str]]:
    from unlearn.requests.probes import broken, catalogue

    return [
        ("likelihood", "one teacher-forced pass: log p, rank, margin, moments of log p per token"),
        ("figures", "loss, extraction strength, Min-K%, Min-K%++, zlib, p_z from that pass"),
        ("classify", "label probability, margin, loss, entropy of an image classifier"),
        ("fisher", "diagonal Fisher information: batch, example, token, label-free"),
        *((name, probe.what) for name, probe in catalogue().items()),
        *_broken(broken()),
    ]


def _attacks() -> list[tuple[str, str]]:
    from unlearn.requests.attacks import broken, catalogue

    rows = [
        (name, f"{attack.access}  {attack.goal}" + ("" if attack.runner else f"  [{attack.reason}]"))
        for name, attack in catalogue().items()
    ]
    return rows + _broken(broken())


def _editors() -> list[tuple[str, str]]:
    from unlearn.requests.presets import load_method

    return [(name, load_method(name).description) for name in config_names("methods")]


def _suites() -> list[tuple[str, str]]:
    from unlearn.requests.presets import load_suite

    return [(name, load_suite(name).description) for name in config_names("suites")]


def listing(what: str) -> list[tuple[str, str]]:
    """(name, one line) of everything of one of `KINDS`."""
    makers: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "probes": _probes,
        "attacks": _attacks,
        "editors": _editors,
        "suites": _suites,
    }
    return makers[what]()
