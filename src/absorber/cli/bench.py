"""`absorber bench`: methods measured against each other, and tables from the records."""

import dataclasses
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from absorber.cli.bench_ablation import ablation, show_ablation
from absorber.cli.console import Output
from absorber.cli.opening import open_model
from absorber.cli.options import JsonFlag, ModelFlag
from absorber.errors import AbsorberError, BenchmarkError, ConfigError

if TYPE_CHECKING:
    from absorber.bench.records import Record
    from absorber.bench.retention import Retention

app = App(name="bench", help="Measure methods against each other.")
app.command(ablation)


@app.command
def retention(
    *methods: str,
    data_dir: Path,
    output: Path,
    kind: str = "books",
    split: str = "report",
    rounds: int = 10,
    streams: int = 24,
    seed: int = 0,
    config: Path | None = None,
    model: ModelFlag = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Score the text that follows a stream, round by round, with and without what a method remembers.

    What the output file has already is not measured again; Ctrl-C keeps the methods that are done.

    Args:
        methods: full, truncation, sink, temp-lora, dcd, absorber-paper, absorber; all if left out.
        data_dir: Folder with novels/*.txt (or *.txt), samsum/*.json, wikitext2/*.txt.
        output: File of records, one JSON object a line.
        kind: What is streamed: books, dialogues, encyclopedia, code.
        split: report, or choose for searching options; each half of the documents serves one.
        rounds: Contexts absorbed.
        streams: Streams in one batch.
        seed: Of streams and methods.
        config: TOML file with a table [retention] (context_tokens, sync_tokens, passage_tokens) and one [absorb], which
            changes the method absorber.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.methods import METHODS, LoRA, method
    from absorber.bench.runner import Listener, run_task

    chosen = {name: method(name) for name in methods or METHODS}
    tables = _tables(config)
    if tables.get("absorb") and "absorber" in chosen:
        own = chosen["absorber"]
        assert isinstance(own, LoRA)
        chosen["absorber"] = LoRA(own.absorb_config.replace(**tables["absorb"]))
    task = _task(
        {"kind": kind, "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
        | tables.get("retention", {})
    )
    loaded = open_model(model, report, device=device)

    def on_failure(name: str, error: AbsorberError) -> None:
        report.event("failed", method=name, type=type(error).__name__, message=str(error))
        report.say(f"{name} failed: {error}")

    listener = Listener(
        say=report.say,
        on_round=lambda name, number: report.event("progress", method=name, round=number, num_rounds=rounds),
        on_failure=on_failure,
    )
    records = run_task(task, chosen, *loaded, data_dir=data_dir, output=output, listener=listener)
    _show(report, records)
    report.event("done", num_records=len(records), output=str(output))
    return 0


@app.command
def table(*files: Path, picture: Path | None = None, kind: str = "books", json: JsonFlag = False) -> int:
    """Show records as a table, and draw them round by round.

    Args:
        files: Files of records.
        picture: Image file to draw.
        kind: Of the streams in the picture.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.figures import draw_retention
    from absorber.bench.records import read_records

    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise BenchmarkError(f"there is no file {', '.join(missing) or 'given'}; give files of records")
    found = [record for path in files for record in read_records(path)]
    records = [record for record in found if record.task == "retention"]
    if picture is not None:
        draw_retention(records, picture, kind=kind)
    if records:
        _show(report, records)
    show_ablation(report, found)
    return 0


def _tables(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        return tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the settings file {config}: {error}") from error


def _task(values: dict[str, Any]) -> "Retention":
    from absorber.bench.retention import DRIFT_KINDS, Retention

    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(Retention)})
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)} in [retention]")
    if values["kind"] not in DRIFT_KINDS or values["split"] not in ("report", "choose"):
        raise ConfigError(f"kind is one of {', '.join(DRIFT_KINDS)} and split report or choose; got {values}")
    if min(value for value in values.values() if isinstance(value, int)) < 0 or values["num_rounds"] < 1:
        raise ConfigError(f"counts are 1 or more; got {values}")
    return Retention(**values)


def _show(report: Output, records: "list[Record]") -> None:
    from absorber.bench.figures import retention_rows

    heads, rows = retention_rows(records)
    report.table(rows, heads=heads)
    for row in rows:
        report.event("row", **dict(zip(heads, row, strict=True)))
