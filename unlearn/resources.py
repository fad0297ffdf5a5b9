"""Where the shipped YAML presets lie: inside the installed package, or beside it in a source tree."""

from __future__ import annotations

from pathlib import Path

from probes.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent
KINDS = ("suites", "methods", "policies")


def config_root() -> Path:
    """The folder that holds `suites/`, `methods/` and `policies/`."""
    for root in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if root.is_dir():
            return root
    raise UsageError("expected the preset folder configs/ beside the package, found none; reinstall unlearn-audit")


def config_names(kind: str) -> list[str]:
    """Names of the shipped presets of one kind (`suites`, `methods` or `policies`), sorted."""
    return sorted(path.stem for path in (config_root() / kind).glob("*.yaml"))


def config_path(kind: str, name: str) -> Path:
    """Path of a shipped preset.

    Raises:
        UsageError: if there is no preset of that name.
    """
    path = config_root() / kind / f"{name}.yaml"
    if name not in config_names(kind):
        raise UsageError(f"expected one of {', '.join(config_names(kind))} in {kind}, found no such preset")
    return path
