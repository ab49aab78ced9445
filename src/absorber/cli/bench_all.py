"""`absorber bench all`: every task with every method."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from absorber.cli.bench_answers import with_embedder
from absorber.cli.bench_run import choose_methods, read_tables
from absorber.cli.console import Output
from absorber.cli.opening import open_model
from absorber.cli.options import BatchFlag, JsonFlag, ModelFlag

if TYPE_CHECKING:
    from absorber.bench.everything import Meter, Outcome


def all_(
    *tasks: str,
    output: Path,
    quick: Annotated[bool, Parameter(negative="")] = False,
    data_dir: Path | None = None,
    batch: BatchFlag = None,
    seed: int = 0,
    config: Path | None = None,
    model: ModelFlag = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Run every task with every method, one after another.

    What the output file has is not measured again, so that a run that was interrupted goes on. What fails ends nothing:
    it is named at the end, and the exit code is 1. Then: absorber report OUTPUT.

    Args:
        tasks: retention, recall, icl, reasoning, summary, ablation, latency, cost; all if left out.
        output: File of records, one JSON object a line.
        quick: Make everything tiny, so that it takes minutes on two cores: whether it works, not how good it is.
        data_dir: Folder with the data of all tasks; with --quick texts made up for it if left out, otherwise the
            Hugging Face hub for icl, reasoning and summary, and none for the others.
        batch: How many streams are read at once, where a device has no room for all; the figures stay the same.
        seed: Of everything.
        config: TOML file with a table for any task or method.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.everything import TASKS, Everything
    from absorber.bench.made_up import write

    tables = read_tables(config)
    methods = choose_methods(_names(tables, report), tables)
    if not tasks or "summary" in tasks:
        tables["summary"] = with_embedder(tables.get("summary", {}), report)
    loaded = open_model(model, report, device=device)
    with ExitStack() as stack:
        if quick and data_dir is None:
            data_dir = write(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="absorber-"))))
        everything = Everything(
            model=loaded[0],
            tokenizer=loaded[1],
            methods=methods,
            output=output,
            data_dir=data_dir,
            settings={name: tables[name] for name in TASKS if name in tables},
            quick=quick,
            batch=batch,
            seed=seed,
            device=device,
            say=report.say,
            on_progress=lambda task, what, meter: _progress(report, task, what, meter),
        )
        outcome = everything.run(tasks)
    _show(report, outcome)
    report.event("done", num_failures=len(outcome.failures), output=str(output))
    return 1 if outcome.failures else 0


def _names(tables: dict[str, Any], report: Output) -> list[str]:
    """All methods of ours that can run here."""
    from absorber.bench.methods import METHODS, OUTSIDE

    outside = {name: way.replace(**tables.get(name, {})).where for name, way in OUTSIDE.items()}
    absent = [name for name, where in outside.items() if not where]
    if absent:
        report.say(f"{', '.join(absent)} are left out, for they need an environment of their own: docs/methods.md")
    return [*METHODS, *(name for name in outside if name not in absent)]


def _progress(report: Output, task: str, what: str, meter: "Meter") -> None:
    seconds = meter.seconds_left
    left = "" if seconds is None else f", about {spell_seconds(seconds)} left"
    report.event("progress", task=task, what=what, done=meter.done, total=meter.total, seconds_left=seconds)
    if not report.json_lines:
        report.say(f"[{meter.done}/{meter.total}{left}] {task}: {what}")


def spell_seconds(seconds: float) -> str:
    """Write a time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show(report: Output, outcome: "Outcome") -> None:
    failed = [failure.task for failure in outcome.failures]
    rows = [
        (task, str(count), str(outcome.known[task]), str(failed.count(task)))
        for task, count in outcome.measured.items()
    ]
    report.table(rows, heads=("task", "measured", "known", "failed"))
    for row in rows:
        report.event("row", **dict(zip(("task", "measured", "known", "failed"), row, strict=True)))
    for failure in outcome.failures:
        what = f"{failure.task}, {failure.what}" if failure.what else failure.task
        report.show(f"failed: {what}: {failure.kind}: {failure.message}")
        report.event("failed", task=failure.task, method=failure.what, type=failure.kind, message=failure.message)
