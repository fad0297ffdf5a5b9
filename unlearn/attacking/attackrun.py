"""Attack runs (`unlearn attack NAME`): one attack on one checkpoint, nothing judged and nothing edited."""

from __future__ import annotations

from probes.errors import UsageError
from unlearn.attacking.run import run_attacks, size_of
from unlearn.pipeline import Pipeline
from unlearn.requests.attacks import NEEDS, catalogue
from unlearn.runs.job import ROLES


class AttackRun(Pipeline):
    """One attack run in flight: inputs, sets, the reference where one is given, the attack, report."""

    def execute(self) -> None:  # type: ignore[override]
        """Run every stage that is not done yet."""
        self.stage("inputs", self._inputs)
        self.stage("sets", self._draft_sets)
        self.estimate()
        if self.job.reference is not None:
            self.stage("reference", lambda: self._measure("reference", "reference", ROLES))
        self.stage("before", self._attack)
        self.release()
        self.stage("report", self._report)

    def detail(self, name: str) -> str:
        """What a stage does, for the display."""
        (entry,) = self.job.suite["attacks"]
        words = {
            "before": str(entry["name"]),
            "reference": "a checkpoint that never held the records",
            "report": "attack.html, attack.md",
        }
        return words.get(name, "")

    def _inputs(self) -> None:
        (entry,) = self.job.suite["attacks"]
        declaration = catalogue()[entry["name"]]
        if "edited" in declaration.needs:
            raise UsageError(
                f"expected an attack on one checkpoint, found that {entry['name']} compares an edited copy with its "
                "original; it runs within `unlearn forget`"
            )
        given = {*self.job.sources, *self.live.records, *self.job.inputs} | {"text", "chat_template", "control"}
        given |= {"reference"} if self.job.reference else set()
        lacking = [NEEDS.get(need, need) for need in declaration.needs if need not in given]
        if lacking:
            raise UsageError(f"expected what {entry['name']} needs, found none: {', '.join(lacking)}")
        self.checkpoint("checkpoint")
        self.freeze()
        self.identify("checkpoint")
        if self.job.reference is not None:
            self.identify("reference")
            self._check_reference()
        self.describe_run(suite=self.job.suite, settings=self.settings().as_dict())

    def _attack(self) -> None:
        (entry,) = self.job.suite["attacks"]
        if self.sets().get("records") and "pass" in catalogue()[entry["name"]].cost(entry, size_of(self)):
            self._measure("before", "checkpoint", ROLES)
            return
        rows = run_attacks(self, "before", "checkpoint", None, self.settings())
        self.run.write_json("before/attacks.json", rows)
