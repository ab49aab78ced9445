"""`absorber bench`: methods measured against each other, and tables from the records."""

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from absorber.cli.bench_ablation import ablation, show_ablation
from absorber.cli.bench_all import all_
from absorber.cli.bench_answers import icl, reasoning, show_answers, summary
from absorber.cli.bench_families import families, show_families
from absorber.cli.bench_recall import recall, show_recall
from absorber.cli.bench_run import make_task, read_tables, run_methods, show_rows
from absorber.cli.bench_speed import cost, latency, show_speed
from absorber.cli.console import Output
from absorber.cli.options import BatchFlag, JsonFlag, ModelFlag
from absorber.errors import BenchmarkError

if TYPE_CHECKING:
    from absorber.bench.records import Record

app = App(name="bench", help="Measure methods against each other.")
app.command(all_, name="all")
app.command(ablation)
app.command(recall)
app.command(latency)
app.command(cost)
app.command(icl)
app.command(reasoning)
app.command(summary)
app.command(families)


@app.command
def retention(
    *methods: str,
    data_dir: Path,
    output: Path,
    kind: str = "books",
    split: str = "report",
    rounds: int = 10,
    streams: int = 24,
    batch: BatchFlag = None,
    seed: int = 0,
    config: Path | None = None,
    model: ModelFlag = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Score the text that follows a stream, round by round, with and without what a method remembers.

    What the output file has already is not measured again; Ctrl-C keeps the methods and batches that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        data_dir: Folder with novels/*.txt (or *.txt), samsum/*.json, wikitext2/*.txt; drift needs all of them.
        output: File of records, one JSON object a line.
        kind: What is streamed: books, dialogues, encyclopedia, code.
        split: report, or choose for searching options; each half of the documents serves one.
        rounds: Contexts absorbed.
        streams: How many are read.
        batch: How many streams are read at once, where a device has no room for all; the figures stay the same.
        seed: Of streams and methods.
        config: TOML file with a table [retention] (context_tokens, sync_tokens, passage_tokens), one [absorb], which
            changes the method absorber, and one for any other method, such as [ttt].
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.retention import Retention

    tables = read_tables(config)
    flags = {"kind": kind, "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    task = make_task(Retention, flags | tables.get("retention", {}))
    records = run_methods(
        task, methods, tables, report, data_dir=data_dir, output=output, batch=batch, model=model, device=device
    )
    _show(report, records)
    report.event("done", num_records=len(records), output=str(output))
    return 0


@app.command
def table(*files: Path, picture: Path | None = None, kind: str = "books", json: JsonFlag = False) -> int:
    """Show records as a table, and draw them round by round.

    Args:
        files: Files of records.
        picture: Image file to draw: of retention, or of recall where there is no record of retention.
        kind: Of the streams in the picture.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.figures import draw_recall, draw_retention
    from absorber.bench.records import read_records

    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise BenchmarkError(f"there is no file {', '.join(missing) or 'given'}; give files of records")
    found = [record for path in files for record in read_records(path)]
    records = [record for record in found if record.task == "retention"]
    if picture is not None and records:
        draw_retention(records, picture, kind=kind)
    elif picture is not None:
        draw_recall([record for record in found if record.task == "recall"], picture, kind=kind)
    _show(report, found)
    show_recall(report, found)
    show_answers(report, found)
    show_ablation(report, found)
    show_speed(report, found)
    show_families(report, found)
    return 0


def _show(report: Output, records: "list[Record]") -> None:
    from absorber.bench.figures import retention_rows

    show_rows(report, *retention_rows([record for record in records if record.task == "retention"]))
