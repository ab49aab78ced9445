"""`absorber bench recall`: facts that left the window, asked for later."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absorber.cli.bench_run import make_task, read_tables, run_methods, show_rows
from absorber.cli.console import Output
from absorber.cli.options import BatchFlag, JsonFlag, ModelFlag

if TYPE_CHECKING:
    from absorber.bench.records import Record


def recall(
    *methods: str,
    data_dir: Path,
    output: Path,
    kind: str = "books",
    split: str = "report",
    rounds: int = 30,
    streams: int = 24,
    batch: BatchFlag = None,
    seed: int = 0,
    config: Path | None = None,
    model: ModelFlag = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Plant facts in every round of a stream, and ask for them when they have left the window.

    What the output file has already is not measured again; Ctrl-C keeps the methods and batches that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        data_dir: Folder with novels/*.txt (or *.txt), samsum/*.json, wikitext2/*.txt; it needs what --kind says.
        output: File of records, one JSON object a line.
        kind: What is streamed: books, dialogues, encyclopedia, code.
        split: report, or choose for searching options; each half of the documents serves one.
        rounds: Contexts absorbed.
        streams: How many are read.
        batch: How many streams are read at once, where a device has no room for all; the figures stay the same.
        seed: Of streams, facts and methods.
        config: TOML file with a table [recall] (context_tokens, sync_tokens, num_facts, ages), one [absorb], which
            changes the method absorber, and one for any other method, such as [ttt].
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.recall import Recall

    tables = read_tables(config)
    flags = {"kind": kind, "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    task = make_task(Recall, flags | tables.get("recall", {}))
    records = run_methods(
        task, methods, tables, report, data_dir=data_dir, output=output, batch=batch, model=model, device=device
    )
    show_recall(report, records)
    report.event("done", num_records=len(records), output=str(output))
    return 0


def show_recall(report: Output, records: "Sequence[Record]") -> None:
    """Show a table of those records that are of recall."""
    from absorber.bench.figures import recall_rows

    show_rows(report, *recall_rows([record for record in records if record.task == "recall"]))
