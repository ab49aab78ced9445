"""`absorber bench ablation`: one choice of the method changed at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from absorber.cli.bench_run import listener
from absorber.cli.console import Output
from absorber.cli.opening import open_model
from absorber.cli.options import BatchFlag, JsonFlag, ModelFlag
from absorber.errors import ConfigError

if TYPE_CHECKING:
    from absorber.bench.records import Record


def ablation(
    *tables: str,
    data_dir: Path | None = None,
    output: Path | None = None,
    kind: str = "books",
    split: str = "choose",
    tokens: int = 5120,
    streams: int = 12,
    batch: BatchFlag = None,
    seed: int = 0,
    model: ModelFlag = None,
    device: str = "auto",
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    json: JsonFlag = False,
) -> int:
    """Change one choice of the method at a time, and measure what it is worth.

    What the output file has already is not measured again; Ctrl-C keeps the variants and batches that are done.

    Args:
        tables: Questions to ask, which --list shows; all if left out.
        data_dir: Folder with novels/*.txt (or *.txt), samsum/*.json, wikitext2/*.txt.
        output: File of records, one JSON object a line.
        kind: What is streamed: books, dialogues, encyclopedia, code.
        split: choose, for ablations choose options, or report; each half of the documents serves one.
        tokens: Absorbed per stream.
        streams: How many are read.
        batch: How many streams are read at once, where a device has no room for all; the figures stay the same.
        seed: Of streams and methods.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        list_: Show tables and variants, and measure nothing.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.ablation import Ablation, cells, run_ablation

    options: dict[str, Any] = {"kind": kind, "split": split, "num_tokens": tokens, "num_streams": streams, "seed": seed}
    task = Ablation(**options)
    cells(task, tables, num_layers=1)  # a wrong name must not wait for the model
    if list_:
        _list(report, tables)
        return 0
    if data_dir is None or output is None:
        raise ConfigError("measuring needs --data-dir and --output; --list shows what there is to measure")
    loaded = open_model(model, report, device=device)
    heard = listener(report, "variant")
    records = run_ablation(task, *loaded, tables=tables, data_dir=data_dir, output=output, batch=batch, listener=heard)
    show_ablation(report, records)
    report.event("done", num_records=len(records), output=str(output))
    return 0


def show_ablation(report: Output, records: "Sequence[Record]") -> None:
    """Show the tables of those records that are of ablations."""
    from absorber.bench.ablation_report import ablation_sections

    for section in ablation_sections(records):
        report.show(f"\n{section.table}: {section.title} {section.setting}")
        report.table(section.rows, heads=section.heads)
        for line in (*section.sources, *section.contradictions):
            report.show(line)
        for row in section.rows:
            report.event("row", table=section.table, **dict(zip(section.heads, row, strict=True)))
        for line in section.contradictions:
            report.event("contradiction", table=section.table, message=line)


def _list(report: Output, names: Sequence[str]) -> None:
    from absorber.bench.ablation_tables import TABLES

    for name in names or TABLES:
        table = TABLES[name]
        report.show(f"\n{name}: {table.asks}")
        rows = [
            (variant, ", ".join(f"{key} = {value}" for key, value in changes.items()) or "the default")
            for variant, changes in table.variants.items()
        ]
        report.table(rows)
        report.event("table", table=name, asks=table.asks, variants=dict(table.variants))
