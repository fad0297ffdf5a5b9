"""Probe runs (`unlearn probe`), and the probes stage of an audit or forget run.

A probe's result is `probes/NAME.json` (schema `unlearn.probe/v1`): numbers, module names and pseudonyms, no text.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from probes.errors import UnsupportedError, UsageError
from unlearn import reporting
from unlearn.requests.probes import catalogue
from unlearn.workspace import Workspace

SCHEMA = "unlearn.probe/v1"
Settings = dict[str, Any]
Runner = Callable[[Workspace, Settings], dict[str, Any]]

NAMES = {"retain": "data whose behaviour should stay (a retain set)", "records": "records"}


def missing(name: str, roles: set[str]) -> str | None:
    """What a probe lacks among these record sets, in words; None if nothing."""
    lacking = [NAMES[role] for role in catalogue()[name].needs if role not in roles]
    return f"it needs {' and '.join(lacking)}" if lacking else None


def run_probes(workspace: Workspace) -> list[str]:
    """Run the job's probes on its checkpoint and write their results.

    Returns:
        One line for each probe that could not run, and why: in an audit, the rest of the evidence does not depend on
        it.
    """
    notes = []
    roles = {role for role, records in workspace.sets().items() if records}
    for settings in workspace.job.suite["probes"]:
        name = settings["name"]
        if reason := missing(name, roles):
            notes.append(f"The probe {name} was not run: {reason}.")
            continue
        module, _, attribute = catalogue()[name].runner.partition(":")
        runner: Runner = getattr(import_module(module), attribute)
        try:
            found = runner(workspace, settings)
        except (UsageError, UnsupportedError) as error:
            if workspace.job.kind == "probe":
                raise
            notes.append(f"The probe {name} was not run: {error}.")
            continue
        shown = {key: value for key, value in settings.items() if key != "name"}
        head = {"schema": SCHEMA, "probe": name, "settings": shown | {"seed": workspace.job.options.seed}}
        workspace.run.write_json(f"probes/{name}.json", head | found)
    return notes


class ProbeRun(Workspace):
    """One probe run in flight: inputs, sets, probes, report."""

    def execute(self) -> None:
        """Run every stage that is not done yet."""
        self.stage("inputs", self._inputs)
        self.stage("sets", lambda: self.summarise(self.given(), {}))
        self.stage("probes", self._probes)
        self.release()
        self.stage("report", self._report)

    def detail(self, name: str) -> str:
        """What a stage does, for the display."""
        probes = ", ".join(settings["name"] for settings in self.job.suite["probes"])
        return {"inputs": "digests, record files", "probes": probes, "report": "probe.html, probe.md"}.get(name, "")

    def _inputs(self) -> None:
        roles = {*self.job.sources, *self.live.records}
        for settings in self.job.suite["probes"]:
            if reason := missing(settings["name"], roles):
                raise UsageError(f"expected the sets the probe {settings['name']} works on, found too few: {reason}")
        self.checkpoint("checkpoint")
        self.freeze(apart=False)  # factors and importances may be those of all training data
        self.identify("checkpoint")
        self.describe_run(probes=self.job.suite["probes"])

    def _probes(self) -> None:
        run_probes(self)

    def _report(self) -> None:
        for path in reporting.write(self.run.path):
            self.run.claim(path)
