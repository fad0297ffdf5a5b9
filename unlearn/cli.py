"""The command line. Heavy libraries are imported inside commands, so that `unlearn --help` answers at once.

Exit codes, whatever the display: 0 criteria met; 1 criteria not met or memorisation above policy; 2 usage or invalid
file; 3 inconclusive; 4 integrity refused; 5 runtime or environment; 130 interrupted and resumable.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from probes.errors import UnlearnError, UsageError
from unlearn._version import __version__
from unlearn.failure import explain
from unlearn.terminal import Display, make_display

if TYPE_CHECKING:
    from unlearn.records.raw import RecordFormat
    from unlearn.runs.job import Options

app = typer.Typer(
    name="unlearn",
    help="Audit a checkpoint for memorised records, forget them in a copy, attack the copy again, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
draft_app = typer.Typer(help="Propose a missing set as a file to review.", no_args_is_help=True)
app.add_typer(draft_app, name="draft")
probe_app = typer.Typer(help="Look inside a checkpoint with one probe; nothing is judged.", no_args_is_help=True)
app.add_typer(probe_app, name="probe")
ledger_app = typer.Typer(help="Which requests were carried out, and what came of them.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")

Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... [auto]", show_default=False)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64 [float32]", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="for every random choice [0]", show_default=False)]
BatchSize = Annotated[str | None, typer.Option(help="auto, or records per batch [auto]", show_default=False)]
DisplayName = Annotated[str | None, typer.Option(help="auto, rich, plain, json, none [auto]", show_default=False)]
Online = Annotated[bool | None, typer.Option("--online/--offline", help="allow hub ids [offline]", show_default=False)]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="read pickled weights (tensors only)")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the checkpoint")]
ExitZero = Annotated[bool, typer.Option("--exit-zero", help="return 0 instead of 1 and 3")]
Out = Annotated[Path | None, typer.Option(help="run folder to create [runs/TIME-KIND]", show_default=False)]

Field = Annotated[list[str] | None, typer.Option("--field", help="FIELD=COLUMN of the record files; repeatable")]
PromptTemplate = Annotated[str | None, typer.Option(help="text around every prompt, with {prompt}")]
CompletionTemplate = Annotated[str | None, typer.Option(help="text around every completion, with {completion}")]

Corpus = Annotated[Path | None, typer.Option(help="text to look for near-duplicates of the records in")]
Canaries = Annotated[Path | None, typer.Option(help="planted secrets with their format, JSONL")]
Candidates = Annotated[Path | None, typer.Option(help="candidates for each record's personal data, JSONL")]
Checkpoint = Annotated[str, typer.Argument(help="checkpoint folder, .gguf file, or hub id with --online")]
Store = Annotated[Path | None, typer.Option("--ledger", help="run store whose ledger is kept", show_default=False)]
Read = Annotated[
    Path | None,
    typer.Option("--ledger", help="run store with the ledger [UNLEARN_LEDGER, or runs]", show_default=False),
]
Complete = Annotated[bool, typer.Option("--complete-history", help="refuse where earlier records are gone")]

_GLOBAL: dict[str, Any] = {}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"unlearn {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    display: DisplayName = None,
    online: Online = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    _GLOBAL.clear()
    _GLOBAL.update(device=device, dtype=dtype, seed=seed, batch_size=batch_size, display=display, online=online)


def _chosen(name: str, value: Any, default: Any) -> Any:
    """An option given after the command, else before it, else the default."""
    found = value if value is not None else _GLOBAL.get(name)
    return default if found is None else found


# Options that commands share, by the name of the parameter; `shared` adds them to a command.
_RUNTIME = {
    "device": Device,
    "dtype": Dtype,
    "seed": Seed,
    "batch_size": BatchSize,
    "display": DisplayName,
    "online": Online,
    "allow_pickle": Pickle,
    "trust_remote_code": Remote,
}
_FORMAT = {"field": Field, "prompt_template": PromptTemplate, "completion_template": CompletionTemplate}


def shared(
    *, formats: bool = False, exit_zero: bool = False, out: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options every run has; it takes them as `options` and `shown`, and `format` if `formats`."""
    added = (_FORMAT if formats else {}) | ({"out": Out} if out else {}) | _RUNTIME
    added |= {"exit_zero": ExitZero} if exit_zero else {}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        given = ("options", "shown", "format", *added)
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in given]

        def run(**values: Any) -> None:
            parts = {name: values.pop(name) for name in _RUNTIME}
            shown = _display(parts.pop("display"))
            if formats:
                values["format"] = _format(*(values.pop(name) for name in _FORMAT))
            command(**values, options=_options(**parts), shown=shown)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword, annotation=eval(p.annotation, globals())) for p in own]
        for name, annotation in added.items():
            default = False if get_args(annotation)[0] is bool else None
            parameters.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _options(
    device: str | None,
    dtype: str | None,
    seed: int | None,
    batch_size: str | None,
    online: bool | None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Options:
    from unlearn.runs.job import Options

    size = _chosen("batch_size", batch_size, "auto")
    if size != "auto" and not (str(size).isdigit() and int(size) > 0):
        raise UsageError("expected --batch-size to be auto or a positive number, found something else")
    chosen = str(_chosen("dtype", dtype, "float32"))
    if chosen not in ("float32", "bfloat16", "float16", "float64"):
        raise UsageError("expected --dtype to be float32, bfloat16, float16 or float64, found another word")
    return Options(
        device=str(_chosen("device", device, "auto")),
        dtype=chosen,
        seed=int(_chosen("seed", seed, 0)),
        batch_size=None if size == "auto" else int(size),
        online=bool(_chosen("online", online, False)),
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )


def _format(fields: list[str] | None, prompt: str | None, completion: str | None) -> RecordFormat:
    from unlearn.records.raw import RecordFormat

    pairs = [entry.partition("=") for entry in fields or []]
    if any(not (name and equals and column) for name, equals, column in pairs):
        raise UsageError("expected --field FIELD=COLUMN, as in --field prompt=question, found another form")
    lines = [text.replace("\\n", "\n") if text else text for text in (prompt, completion)]
    return RecordFormat({name: column for name, _, column in pairs}, lines[0], lines[1])


def _display(name: str | None) -> Display:
    return make_display(str(_chosen("display", name, "auto")))


def _finish(run: Any, shown: Display, exit_zero: bool) -> None:
    from unlearn.summary import summary, summary_data

    shown.result(summary(run), summary_data(run))
    code = run.exit_code
    raise typer.Exit(0 if exit_zero and code in (1, 3) else code)


@app.command()
@shared(formats=True, exit_zero=True)
def audit(
    checkpoint: Checkpoint,
    records: Annotated[Path, typer.Option(help="records to look for: JSONL, CSV, Parquet or a datasets folder")],
    control: Annotated[Path | None, typer.Option(help="never-seen records of the same kind [drafted]")] = None,
    retain: Annotated[Path | None, typer.Option(help="data to measure beside the records")] = None,
    reference: Annotated[str | None, typer.Option(help="a checkpoint that never held the records")] = None,
    corpus: Corpus = None,
    canaries: Canaries = None,
    candidates: Candidates = None,
    suite: Annotated[str, typer.Option(help="quick, standard, deep, or a YAML file")] = "standard",
    budget: Annotated[float | None, typer.Option(help="forward passes a record that attacks may take")] = None,
    policy: Annotated[str, typer.Option(help="criteria: a policy name or YAML file")] = "default",
    *,
    out: Path | None,
    format: RecordFormat,
    options: Options,
    shown: Display,
    exit_zero: bool,
) -> None:
    """Does the checkpoint hold these records?"""
    from unlearn import api

    run = api.audit(
        checkpoint,
        records,
        control=control,
        retain=retain,
        reference=reference,
        corpus=corpus,
        canaries=canaries,
        candidates=candidates,
        suite=suite,
        budget=budget,
        policy=policy,
        format=format,
        out=out,
        options=options,
        display=shown,
    )
    _finish(run, shown, exit_zero)


@app.command()
@shared(formats=True)
def attack(
    name: Annotated[str, typer.Argument(help="attack; `unlearn ls attacks` lists them")],
    checkpoint: Checkpoint,
    records: Annotated[Path | None, typer.Option(help="records to look for")] = None,
    control: Annotated[Path | None, typer.Option(help="never-seen records of the same kind [drafted]")] = None,
    retain: Annotated[Path | None, typer.Option(help="data whose behaviour should stay")] = None,
    related: Annotated[Path | None, typer.Option(help="related text that is none of the records")] = None,
    reference: Annotated[str | None, typer.Option(help="a checkpoint that never held the records")] = None,
    corpus: Corpus = None,
    canaries: Canaries = None,
    candidates: Candidates = None,
    paraphrases: Annotated[Path | None, typer.Option(help="other prompts for each record: JSONL")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a setting; repeatable")] = None,
    *,
    out: Path | None,
    format: RecordFormat,
    options: Options,
    shown: Display,
) -> None:
    """Run one attack on a checkpoint; nothing is judged."""
    from unlearn import api

    run = api.attack(
        name,
        checkpoint,
        records=records,
        control=control,
        retain=retain,
        related=related,
        reference=reference,
        corpus=corpus,
        canaries=canaries,
        candidates=candidates,
        paraphrases=paraphrases,
        settings=_assignments(set_),
        format=format,
        out=out,
        options=options,
        display=shown,
    )
    _show(run, shown)


@app.command()
@shared(exit_zero=True)
def forget(
    request: Annotated[
        list[Path] | None, typer.Argument(help="request file; several are carried out by one edit")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="say what would be done, edit nothing")] = False,
    resume: Annotated[Path | None, typer.Option(help="go on with an interrupted run folder")] = None,
    ledger: Store = None,
    chain: Annotated[bool, typer.Option("--chain", help="start from the newest result on the checkpoint")] = False,
    again: Annotated[bool, typer.Option("--again", help="carry a request out that was carried out before")] = False,
    complete_history: Complete = False,
    *,
    out: Path | None,
    options: Options,
    shown: Display,
    exit_zero: bool,
) -> None:
    """Edit a copy of a checkpoint so that records are no longer in it, attack the copy, decide."""
    if not request and resume is None:
        raise UsageError("expected a request file or --resume RUN, found neither; `unlearn init` writes a request")
    if resume is not None and (
        plan_only or chain or again or complete_history or out is not None or ledger is not None
    ):
        raise UsageError("expected --resume alone, found another option that starts a run with it")
    from unlearn import api

    if plan_only:
        from unlearn.summary import plan_text

        planned = api.plan(
            request or [], out, options, shown, ledger=ledger, chain=chain, complete_history=complete_history
        )
        shown.result(plan_text(planned), planned)
        return
    run = api.forget(
        request,
        out=out,
        resume=resume,
        ledger=ledger,
        chain=chain,
        again=again,
        complete_history=complete_history,
        options=options,
        display=shown,
    )
    _finish(run, shown, exit_zero)


@app.command("queue")
@shared(exit_zero=True, out=False)
def queue_(
    folder: Annotated[Path, typer.Argument(help="folder of request files, carried out in the order of their names")],
    ledger: Annotated[
        Path | None, typer.Option(help="run store [UNLEARN_LEDGER, or runs in the folder]", show_default=False)
    ] = None,
    chain: Annotated[bool, typer.Option("--chain", help="each request starts from the result of those before")] = False,
    advance: Annotated[
        str, typer.Option(help="weakest verdict that a chain goes on from: met, inconclusive or any")
    ] = "inconclusive",
    complete_history: Complete = False,
    wait: Annotated[bool, typer.Option("--wait", help="wait for another process at this folder")] = False,
    *,
    options: Options,
    shown: Display,
    exit_zero: bool,
) -> None:
    """Carry out every request of a folder, one after another; a second pass repeats nothing."""
    from unlearn.ledger import queue
    from unlearn.ledger.history import ADVANCING

    if advance not in ADVANCING:
        raise UsageError(f"expected --advance to be one of {', '.join(ADVANCING)}, found another word")
    settings = queue.Settings(chain, advance, complete_history, options)  # type: ignore[arg-type]
    found = queue.process(folder, ledger, settings, wait=wait, display=shown)
    shown.result(queue.summary_text(found), found)
    code = found["exit_code"]
    raise typer.Exit(0 if exit_zero and code in (1, 3) else code)


def _ledger(named: Path | None) -> Any:
    from unlearn.ledger.chain import ENVIRONMENT, Ledger

    ledger = Ledger(named or os.environ.get(ENVIRONMENT) or "runs")
    if not ledger.exists():
        raise UsageError("expected a run store with a ledger.jsonl, found none; name it with --ledger")
    return ledger


def _results(display: str | None) -> Display:
    """A display for a command that only prints: its result is shown on every display but json as text."""
    shown = _display(display)
    return shown if shown.name != "none" else make_display("plain")


@ledger_app.command("list")
def ledger_list(ledger: Read = None, display: DisplayName = None) -> None:
    """Every request that was entered, with its state."""
    shown, kept = _results(display), _ledger(ledger)
    from unlearn.ledger.view import listing, listing_text

    data = listing(kept)
    shown.result(listing_text(data), data)


@ledger_app.command("show")
def ledger_show(
    which: Annotated[str, typer.Argument(help="number of an entry, run folder in the store, or subject_request_id")],
    ledger: Read = None,
    display: DisplayName = None,
) -> None:
    """Everything the ledger has about one request."""
    shown, kept = _results(display), _ledger(ledger)
    from unlearn.ledger.view import details, details_text

    data = details(kept, which)
    shown.result(details_text(data), data)


@ledger_app.command("verify")
def ledger_verify(ledger: Read = None, display: DisplayName = None) -> None:
    """Check the ledger against itself and against the runs in its store, offline."""
    shown, kept = _results(display), _ledger(ledger)
    from dataclasses import asdict

    from unlearn.ledger.checking import verify as verify_ledger
    from unlearn.runs.verify import passed

    checks = verify_ledger(kept)
    sound = passed(checks)
    lines = [f"{row.status:<8} {row.name:<18} {row.detail}" for row in checks]
    lines.append("the ledger verifies" if sound else "the ledger does not verify")
    data = {"schema": "unlearn.ledger.verify/v1", "sound": sound, "checks": [asdict(row) for row in checks]}
    shown.result("\n".join(lines), data)
    if not sound:
        raise typer.Exit(4)


@app.command()
@shared(formats=True)
def edit(
    method: Annotated[str, typer.Argument(help="method preset or YAML file; `unlearn ls editors` lists them")],
    checkpoint: Checkpoint,
    retain: Annotated[Path | None, typer.Option(help="data whose behaviour must stay")] = None,
    records: Annotated[Path | None, typer.Option(help="records to forget, for methods that need them")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a parameter; repeatable")] = None,
    *,
    out: Path | None,
    format: RecordFormat,
    options: Options,
    shown: Display,
) -> None:
    """Write an edited copy with one editor and measure nothing; `forget` is what audits an edit."""
    from unlearn import api

    run = api.edit(
        method,
        checkpoint,
        retain=retain,
        records=records,
        overrides=_assignments(set_),
        format=format,
        out=out,
        options=options,
        display=shown,
    )
    _show(run, shown)


def _assignments(pairs: list[str] | None) -> dict[str, Any]:
    """`--set NAME=VALUE`, values read as YAML."""
    import yaml

    found = {}
    for name, equals, text in (entry.partition("=") for entry in pairs or []):
        if not (name and equals):
            raise UsageError("expected --set NAME=VALUE, as in --set rho=0.6, found another form")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError("expected a YAML value after --set NAME=, found something else; quote it") from None
    return found


def _show(run: Any, shown: Display) -> None:
    from unlearn.summary import result_data, result_text

    shown.result(result_text(run), result_data(run))


def _settings(**chosen: Any) -> dict[str, Any]:
    """Options that were given."""
    return {name: value for name, value in chosen.items() if value is not None and value != []}


def _blocks(text: str | None) -> str | list[int] | None:
    """`auto`, `all`, `model`, or indices such as `0,3-5,-1`."""
    if text is None or text.isalpha():
        return text
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-") if not part.strip().startswith("-") else (part.strip(), "", "")
        try:
            found += range(int(low), int(high) + 1) if dash else [int(low)]
        except ValueError:
            raise UsageError("expected --blocks as in 0,3-5,-1, found something else") from None
    return found


@probe_app.command("kfac")
@shared(formats=True)
def probe_kfac(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="what curvature is measured on: ordinary data of the model's kind")],
    records: Annotated[Path | None, typer.Option(help="records to score for memorisation")] = None,
    control: Annotated[Path | None, typer.Option(help="never-seen records to score beside them")] = None,
    blocks: Annotated[str | None, typer.Option(help="auto, all, or indices such as 0,3-5,-1 [auto]")] = None,
    role: Annotated[list[str] | None, typer.Option(help="gate, up, down, q, ...; repeatable [the editor's]")] = None,
    module: Annotated[list[str] | None, typer.Option(help="glob of module paths, instead; repeatable")] = None,
    labels: Annotated[str | None, typer.Option(help="sampled from the model, or gold [sampled]")] = None,
    positions: Annotated[str | None, typer.Option(help="all, predicting, first [all]")] = None,
    rho: Annotated[float | None, typer.Option(help="curvature mass above the cut [the editor's]")] = None,
    correction: Annotated[str | None, typer.Option(help="none or ekfac [none]")] = None,
    autocast: Annotated[str | None, typer.Option(help="bfloat16, for hardware that is fast at it [none]")] = None,
    memory_mb: Annotated[int | None, typer.Option(help="memory for factors; more passes where it is short")] = None,
    factors: Annotated[Path | None, typer.Option(help="use this factor file instead of measuring")] = None,
    save_factors: Annotated[Path | None, typer.Option(help="write the factors to this file")] = None,
    *,
    out: Path | None,
    format: RecordFormat,
    options: Options,
    shown: Display,
) -> None:
    """Kronecker-factored curvature: spectra, the cut an edit would make, a score for each record."""
    from unlearn import api

    settings = _settings(
        blocks=_blocks(blocks),
        roles=role,
        modules=module,
        labels=labels,
        positions=positions,
        rho=rho,
        correction=correction,
        autocast=autocast,
        memory_mb=memory_mb,
    )
    run = api.probe(
        "kfac",
        checkpoint,
        data=data,
        records=records,
        control=control,
        settings=settings,
        factors=factors,
        save_factors=save_factors,
        format=format,
        out=out,
        options=options,
        display=shown,
    )
    _show(run, shown)


@probe_app.command("spectrum")
@shared(formats=True)
def probe_spectrum(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="records whose mean loss is looked at")],
    operator: Annotated[str | None, typer.Option(help="ggn or hessian [ggn]")] = None,
    blocks: Annotated[str | None, typer.Option(help="model, all, or indices such as 0,3-5,-1 [-1]")] = None,
    k: Annotated[int | None, typer.Option("-k", help="eigenvalues at each end [5]")] = None,
    samples: Annotated[int | None, typer.Option(help="random vectors for density and trace [4]")] = None,
    steps: Annotated[int | None, typer.Option(help="Lanczos steps a vector [20]")] = None,
    max_products: Annotated[int | None, typer.Option(help="most products for one end's eigenvalues [200]")] = None,
    n: Annotated[int | None, typer.Option("-n", help="records of the data to use, from the first on [16]")] = None,
    memory_mb: Annotated[int | None, typer.Option(help="memory for the Lanczos vectors [4096]")] = None,
    *,
    out: Path | None,
    format: RecordFormat,
    options: Options,
    shown: Display,
) -> None:
    """Eigenvalues, density and trace of the Hessian or the generalised Gauss-Newton matrix."""
    from unlearn import api

    settings = _settings(
        operator=operator,
        blocks=_blocks(blocks),
        k=k,
        samples=samples,
        steps=steps,
        max_products=max_products,
        records=n,
        memory_mb=memory_mb,
    )
    run = api.probe(
        "spectrum", checkpoint, data=data, settings=settings, format=format, out=out, options=options, display=shown
    )
    _show(run, shown)


@probe_app.command("localise")
@shared(formats=True)
def probe_localise(
    checkpoint: Checkpoint,
    records: Annotated[Path, typer.Option(help="records whose completions are traced")],
    data: Annotated[Path | None, typer.Option(help="ordinary data: what an ablated neuron is set to")] = None,
    training: Annotated[Path | None, typer.Option(help="training records whose influence is wanted")] = None,
    n: Annotated[int | None, typer.Option("-n", help="records to trace, the most probable first [8]")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of the integrated gradients [32]")] = None,
    neurons: Annotated[int | None, typer.Option(help="neurons to list and to ablate [20]")] = None,
    draws: Annotated[int | None, typer.Option(help="random sets of neurons to compare with [5]")] = None,
    influence: Annotated[int | None, typer.Option(help="training records to list [5]")] = None,
    *,
    out: Path | None,
    format: RecordFormat,
    options: Options,
    shown: Display,
) -> None:
    """Which prompt positions, layers and neurons bring a record out, and what training lies behind it."""
    from unlearn import api

    run = api.probe(
        "localise",
        checkpoint,
        records=records,
        data=data,
        training=training,
        settings=_settings(records=n, steps=steps, neurons=neurons, draws=draws, influence=influence),
        format=format,
        out=out,
        options=options,
        display=shown,
    )
    _show(run, shown)


@probe_app.command("condition")
@shared()
def probe_condition(
    checkpoint: Checkpoint,
    *,
    out: Path | None,
    options: Options,
    shown: Display,
) -> None:
    """Condition number, stable rank and effective rank of every weight matrix; needs no data."""
    from unlearn import api

    _show(api.probe("condition", checkpoint, out=out, options=options, display=shown), shown)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="run folder")],
    audience: Annotated[str, typer.Option(help="engineer, regulator or subject")] = "engineer",
    format: Annotated[str, typer.Option(help="comma-separated: html, md, json")] = "html,md,json",
    check: Annotated[bool, typer.Option("--check", help="compare the documents with what the run renders to")] = False,
) -> None:
    """Write the evidence of a run as documents."""
    from unlearn import reporting
    from unlearn.runs.folder import read_header

    read_header(run)
    if check:
        problems = reporting.check(run)
        for problem in problems:
            typer.echo(problem)
        if problems:
            raise typer.Exit(4)
        typer.echo("every document is what the run renders to")
        return
    for path in reporting.write(run, [name.strip() for name in format.split(",")], audience):
        typer.echo(str(path))


@app.command()
def verify(run: Annotated[Path, typer.Argument(help="run folder, with or without private/")]) -> None:
    """Check a run folder offline: chain, files, criteria, edited checkpoint, documents."""
    from unlearn.runs.verify import passed
    from unlearn.runs.verify import verify as verify_run

    checks = verify_run(run)
    for row in checks:
        typer.echo(f"{row.status:<8} {row.name:<18} {row.detail}")
    sound = passed(checks)
    typer.echo("the evidence verifies" if sound else "the evidence does not verify")
    if not sound:
        raise typer.Exit(4)


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="request, policy, suite, method preset or record file")],
) -> None:
    """Report every mistake of a file at once, without loading a model library."""
    from unlearn.requests.request import validate_file

    mistakes = validate_file(file)
    for line in mistakes:
        typer.echo(line)
    if mistakes:
        raise typer.Exit(2)
    typer.echo(f"{file.name}: valid")


@app.command("diff")
def diff_(
    run_a: Annotated[Path, typer.Argument(help="run folder")],
    run_b: Annotated[Path, typer.Argument(help="run folder")],
    display: DisplayName = None,
) -> None:
    """Show what differs between two runs."""
    from unlearn.runs.diff import diff
    from unlearn.summary import diff_text

    found = diff(run_a, run_b)
    _results(display).result(diff_text(found), found)


@app.command("ls")
def ls(what: Annotated[str, typer.Argument(help="probes, attacks, editors or suites")]) -> None:
    """List what this installation has."""
    from unlearn.listing import KINDS, listing

    if what not in KINDS:
        raise UsageError(f"expected one of {', '.join(KINDS)}, found another word")
    rows = listing(what)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        typer.echo(f"{name:<{width}}  {text}")


@app.command()
def init(out: Annotated[Path, typer.Argument(help="file to write")] = Path("request.yaml")) -> None:
    """Write a commented request to fill in."""
    from unlearn.requests.request import template

    if out.exists():
        raise UsageError(f"expected a new file, found that {out} exists; choose another name")
    from unlearn.disk import write_atomic

    write_atomic(out, template().encode())
    typer.echo(f"{out}: fill it in, then run `unlearn validate {out}`")


@draft_app.command("control")
def draft_control(
    records: Annotated[Path, typer.Argument(help="the records to match")],
    out: Annotated[Path, typer.Option(help="JSONL file to write")],
    seed: Seed = None,
) -> None:
    """Swap names, numbers and dates of each record for random ones: never seen by construction."""
    from unlearn.records.draft import draft_control as make
    from unlearn.records.tokens import read_records

    _write_draft(make(read_records(records), int(_chosen("seed", seed, 0))), out)


@draft_app.command("retain")
def draft_retain(
    records: Annotated[Path, typer.Argument(help="the records to forget")],
    checkpoint: Annotated[str, typer.Argument(help="the checkpoint to be edited")],
    out: Annotated[Path, typer.Option(help="JSONL file to write")],
    n: Annotated[int, typer.Option("-n", help="how many")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    online: Online = None,
) -> None:
    """Sample the checkpoint's own text, free and from prompts near the records."""
    options = _options(device, dtype, seed, None, online)
    from unlearn.checkpoints.checkpoint import open_checkpoint
    from unlearn.records.draft import draft_retain as make
    from unlearn.records.tokens import read_records

    opened = open_checkpoint(checkpoint, online=options.online)
    raw = read_records(records)
    model = opened.load_model(options.dtype, options.resolved_device())
    _write_draft(make(model, opened.load_tokenizer(), raw, n=n, seed=options.seed), out)


def _write_draft(drafted: Any, out: Path) -> None:
    from unlearn.records.tokens import write_records

    if not drafted.records:
        raise UsageError(f"expected something to draft from, found nothing; {' '.join(drafted.limits)}")
    write_records(drafted.records, out)
    typer.echo(f"{out}: {len(drafted.records)} records to review")
    for limit in drafted.limits:
        typer.echo(f"  - {limit}")


@app.command()
def demo(
    tiny: Annotated[bool, typer.Option("--tiny", help="a small model trained on the spot, under a minute")] = False,
    out: Annotated[Path | None, typer.Option(help="folder to create [runs/TIME-demo]", show_default=False)] = None,
    display: DisplayName = None,
) -> None:
    """Plant fictitious records, audit, forget some of them, audit again, report."""
    shown = _display(display)
    from unlearn.demo.run import demo as run_demo

    run_demo(tiny=tiny, out=out, display=shown)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every error is one line on stderr, with the documented exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _guard(lambda: app(args=arguments, prog_name="unlearn"))


def _guard(call: Callable[[], Any]) -> None:
    try:
        call()
    except (Exception, KeyboardInterrupt) as error:
        ours = isinstance(error, (UnlearnError, KeyboardInterrupt, MemoryError, OSError))
        if not ours and os.environ.get("UNLEARN_TRACEBACK"):
            raise
        code, line = explain(error)
        print(f"error: {line}" if "\n" not in line else line, file=sys.stderr)
        sys.exit(code)
