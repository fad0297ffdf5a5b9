"""What a ledger says of a checkpoint: its lineage, the newest one of a chain, the state of each request."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from probes.errors import IntegrityError, UsageError
from unlearn.ledger import history, view
from unlearn.ledger.chain import Ledger, mac
from unlearn.ledger.history import earlier, earlier_records, head, limits, lineage, states
from unlearn.runs.pseudonyms import load_key


class Store:
    """A ledger with entries as finished runs leave them, and what is left of the runs."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder)

    def open(self, run: str, parent: str, *requests: str) -> int:
        keys = [
            {"request": name, "content": f"content {name}", "records": 2, "subject_request_id": f"id-{name}"}
            for name in requests or (run,)
        ]
        data = {
            "run": run,
            "parent": parent,
            "root": parent,
            "place": "",
            "chain": False,
            "requests": keys,
            "earlier": [],
        }
        with self.ledger.locked() as session:
            return session.append(("opened", data))[-1].n

    def close(self, n: int, checkpoint: str, verdict: str = "criteria met", **more: Any) -> int:
        opened = next(entry for entry in self.ledger.entries() if entry.n == n).data
        rows = [{"id": f"{opened['run']}-{i}", "text": f"text {i}"} for i in range(2 * len(opened["requests"]))]
        frozen = "".join(json.dumps(row) + "\n" for row in rows).encode()
        private = self.ledger.folder / opened["run"] / "private"
        private.mkdir(parents=True)
        (private / "records.jsonl").write_bytes(frozen)
        (private / "job.json").write_text(json.dumps({"sources": {"records": {"text_prompt_tokens": n}}}))
        data = {
            "opened": n,
            "run": opened["run"],
            "verdict": verdict,
            "claim_level": "E1",
            "parent": opened["parent"],
            "checkpoint": checkpoint,
            "requests": [key | {"verdict": verdict} for key in opened["requests"]],
            "records": len(rows),
            "records_file": mac(load_key(), frozen),
            "pseudonyms": [f"r-{row['id']}" for row in rows],
            "earlier": [],
        }
        with self.ledger.locked() as session:
            return session.append(("finished", data | more))[-1].n

    def run(self, run: str, parent: str, checkpoint: str, verdict: str = "criteria met", **more: Any) -> int:
        return self.close(self.open(run, parent), checkpoint, verdict, **more)

    def on_the_way(self, digest: str) -> list[str]:
        return [entry.data["run"] for entry in lineage(self.ledger.entries(), digest)]

    def head(self, root: str, advance: history.Advance = "inconclusive") -> str:
        return head(self.ledger.entries(), root, advance).digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_lineage_goes_back_to_the_root(store: Store) -> None:
    store.run("first", "root", "A")
    store.run("aside", "root", "X")
    store.run("second", "A", "B", "criteria not met")
    store.run("third", "B", "C")
    store.open("under way", "C")
    assert store.on_the_way("C") == ["first", "second", "third"]  # whatever their verdicts
    assert store.on_the_way("X") == ["aside"]
    assert store.on_the_way("root") == []
    assert store.on_the_way("fine-tuned C") == []


def test_an_edit_that_changed_nothing_is_part_of_its_own_checkpoint(store: Store) -> None:
    store.run("first", "root", "A")
    store.run("idle", "A", "A")
    store.run("idle and wrong", "A", "A", "criteria not met")  # nothing was forgotten
    assert store.on_the_way("A") == ["first", "idle"]
    assert store.head("root") == "A"


def test_two_ways_to_the_same_tensors_both_count(store: Store) -> None:
    store.run("left", "root", "L")
    store.run("right", "root", "R")
    store.run("from left", "L", "A")
    store.run("from right", "R", "A")
    assert store.on_the_way("A") == ["left", "right", "from left", "from right"]


def test_a_way_back_to_the_root_is_not_on_the_way_of_what_went_before(store: Store) -> None:
    store.run("there", "root", "A")
    store.run("back", "A", "root", "criteria not met")
    assert store.on_the_way("A") == ["there"]
    assert store.on_the_way("root") == ["there", "back"]
    store.run("there again", "root", "B")
    assert store.on_the_way("B") == ["there", "back", "there again"]
    assert store.head("root", "any") == "B"


def test_a_request_carried_out_twice_counts_once_by_its_newest_run(store: Store) -> None:
    n = store.open("first", "root", "r")
    store.close(n, "A")
    n = store.open("again", "root", "r")
    last = store.close(n, "A")
    assert [(one.n, one.run) for one in earlier(store.ledger, "A")] == [(last, "again")]


def test_earlier_records_are_read_in_order_under_names_of_their_own(store: Store) -> None:
    a = store.run("first", "root", "A")
    b = store.run("second", "A", "B")
    found = earlier(store.ledger, "B")
    raw = earlier_records(found)
    assert [record.id for record in raw] == [f"{a}/first-0", f"{a}/first-1", f"{b}/second-0", f"{b}/second-1"]
    assert [one.pseudonyms for one in found] == [("r-first-0", "r-first-1"), ("r-second-0", "r-second-1")]
    assert history.text_prompt_tokens(found) == b - 1  # that of the newest
    assert all("text 0" not in repr(one) for one in raw)


def test_records_that_are_gone_are_named_and_the_others_kept(store: Store) -> None:
    store.run("first", "root", "A")
    b = store.run("second", "A", "B")
    store.run("third", "B", "C")
    (store.ledger.folder / "first/private/records.jsonl").unlink()
    (store.ledger.folder / "third").rename(store.ledger.folder.parent / "moved")
    found = earlier(store.ledger, "C")
    assert [bool(one.missing) for one in found] == [True, False, True]
    assert [record.id for record in earlier_records(found)] == [f"{b}/second-0", f"{b}/second-1"]
    sentences = limits(one.as_dict() for one in found)
    assert len(sentences) == 2
    assert "private folder was purged" in sentences[0]
    assert "run folder is gone" in sentences[1]


def test_changed_records_are_refused(store: Store) -> None:
    store.run("first", "root", "A")
    file = store.ledger.folder / "first/private/records.jsonl"
    file.write_text(file.read_text().replace("text 0", "text 9"))
    with pytest.raises(IntegrityError, match="found another file"):
        earlier(store.ledger, "A")


def test_the_head_of_a_chain(store: Store) -> None:
    assert store.head("root") == "root"
    store.run("first", "root", "A")
    store.run("second", "A", "B", "inconclusive")
    store.run("third", "B", "C", "criteria not met")
    assert (store.head("root", "met"), store.head("root"), store.head("root", "any")) == ("A", "B", "C")
    store.run("aside", "root", "X")
    assert store.head("root") == "B"  # newer, but beside the chain
    store.run("fourth", "B", "D")
    assert store.head("root") == "D"
    assert store.head("A") == "D"
    assert store.head("elsewhere") == "elsewhere"
    store.run("fifth", "D", "E", inference_time=True)  # no weights of its own: nothing can start from it
    assert store.head("root", "any") == "D"


def test_of_equal_results_the_newest_is_the_head(store: Store) -> None:
    store.run("old", "root", "A")
    store.run("new", "root", "B")
    assert store.head("root") == "B"


def test_states(store: Store) -> None:
    ledger = store.ledger
    done = store.run("done", "root", "A")
    store.run("asked", "A", "B", earlier=[{"n": done, "records": 2, "status": "met", "emitted_again": 0}])
    store.open("open", "B")
    n = store.open("failed", "B")
    with ledger.locked() as session:
        session.append(("failed", {"opened": n, "run": "failed"}))
    n = store.open("lost", "B")
    with ledger.locked() as session:
        session.append(("abandoned", {"opened": n, "run": "lost"}))
    running = store.ledger.folder / "running" / "private"
    running.mkdir(parents=True)
    store.open("running", "B")
    with (running / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {row.run: row for row in states(ledger)}
    assert {run: row.state for run, row in found.items()} == {
        "done": "finished",
        "asked": "finished",
        "open": "open",
        "failed": "failed",
        "lost": "abandoned",
        "running": "running",
    }
    assert (found["done"].verdict, found["done"].closed, found["done"].checkpoint) == ("criteria met", done, "A")
    assert found["asked"].asked_again is None
    assert found["done"].asked_again is not None
    assert found["open"].gone
    assert {row.run: row.state for row in states(ledger)}["running"] == "open"  # the process is gone


def test_the_newest_run_that_asked_decides_whether_a_request_resurfaced(store: Store) -> None:
    done = store.run("done", "root", "A")
    back = [{"n": done, "records": 2, "status": "not met", "emitted_again": 1}]
    store.run("second", "A", "B", "criteria not met", earlier=back)
    assert states(store.ledger)[0].state == "resurfaced"
    store.run("third", "A", "C", earlier=[{"n": done, "records": 2, "status": "not audited", "emitted_again": None}])
    assert states(store.ledger)[0].state == "resurfaced"
    store.run("fourth", "A", "D", earlier=[back[0] | {"status": "met", "emitted_again": 0}])
    assert states(store.ledger)[0].state == "finished"


def test_carried_out_again_is_superseded(store: Store) -> None:
    store.open("killed", "root", "r")
    store.close(store.open("second", "root", "r"), "A")
    store.close(store.open("elsewhere", "base", "r"), "B")  # another checkpoint: another thing
    assert [row.state for row in states(store.ledger)] == ["superseded", "finished", "finished"]


def test_each_request_of_a_batch_has_a_state(store: Store) -> None:
    n = store.open("both", "root", "a", "b")
    keys = next(entry for entry in store.ledger.entries() if entry.n == n).data["requests"]
    verdicts = [keys[0] | {"verdict": "criteria met"}, keys[1] | {"verdict": "criteria not met"}]
    store.close(n, "A", "criteria not met", requests=verdicts)
    assert [row.verdict for row in states(store.ledger)] == ["criteria met", "criteria not met"]


def test_views(store: Store) -> None:
    assert view.listing_text(view.listing(store.ledger)) == "no request was entered yet"
    done = store.run("done", "root", "A")
    store.run("second", "A", "B", earlier=[{"n": done, "records": 2, "status": "met", "emitted_again": 0}])
    store.open("third", "B")
    text = view.listing_text(view.listing(store.ledger))
    assert [line.split()[1] for line in text.splitlines()] == ["state", "finished", "finished", "open"]
    for which in ("done", "done/", "id-done", "2", str(done)):
        shown = view.details(store.ledger, which)
        assert [row["run"] for row in shown["requests"]] == ["done"]
    assert shown["asked_again"] == [{"entry": done + 2, "of": done, "status": "met", "emitted_again": 0}]
    assert view.details(store.ledger, "second")["after"] == [done]
    assert "asked again in entry" in view.details_text(shown)
    with pytest.raises(UsageError, match="ledger list"):
        view.details(store.ledger, "nothing")
