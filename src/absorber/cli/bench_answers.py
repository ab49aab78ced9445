"""`absorber bench icl`, `reasoning` and `summary`: a long context, and questions about it at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absorber.cli.bench_run import make_task, read_tables, run_methods, show_rows
from absorber.cli.console import Output
from absorber.cli.options import BatchFlag, JsonFlag, ModelFlag

if TYPE_CHECKING:
    from absorber.bench.records import Record


def icl(
    *methods: str,
    output: Path,
    data_dir: Path | None = None,
    dataset: str = "ag_news",
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
    """Classify texts after a long context of labelled examples.

    What the output file has already is not measured again; Ctrl-C keeps the methods and batches that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        output: File of records, one JSON object a line.
        data_dir: Folder with ag_news/test.csv, trec/*.txt, banking77/*.csv; the Hugging Face hub if left out.
        dataset: ag_news, trec, banking77.
        split: report, or choose for searching options; each half of the texts serves one.
        rounds: Contexts absorbed; a stream has context_tokens * rounds + sync_tokens tokens.
        streams: How many are read, each with a draw of its own of examples and queries.
        batch: How many streams are read at once, where a device has no room for all; the figures stay the same.
        seed: Of examples, queries and methods.
        config: TOML file with a table [icl] (context_tokens, sync_tokens, num_queries, num_classes) and one [absorb],
            which changes the method absorber.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    flags = {"kind": dataset, "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    where: dict[str, Any] = {"data_dir": data_dir, "output": output, "batch": batch, "model": model, "device": device}
    return _run("icl", methods, flags, config, Output(json_lines=json), **where)


def reasoning(
    *methods: str,
    output: Path,
    data_dir: Path | None = None,
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
    """Ask questions that need several paragraphs of a long context (MuSiQue).

    What the output file has already is not measured again; Ctrl-C keeps the methods and batches that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        output: File of records, one JSON object a line.
        data_dir: Folder with musique/*.jsonl; the Hugging Face hub if left out.
        split: report, or choose for searching options; each half of the questions serves one.
        rounds: Contexts absorbed; a stream has context_tokens * rounds + sync_tokens tokens.
        streams: How many are read, each with its own questions as far as there are so many.
        batch: How many streams are read at once, where a device has no room for all; the figures stay the same.
        seed: Of questions, paragraphs and methods.
        config: TOML file with a table [reasoning] (context_tokens, sync_tokens, num_queries, max_new_tokens) and one
            [absorb], which changes the method absorber.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    flags = {"kind": "musique", "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    where: dict[str, Any] = {"data_dir": data_dir, "output": output, "batch": batch, "model": model, "device": device}
    return _run("reasoning", methods, flags, config, Output(json_lines=json), **where)


def summary(
    *methods: str,
    output: Path,
    data_dir: Path | None = None,
    dataset: str = "samsum",
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
    """Ask for the summary of one of many dialogues or stories in a long context.

    What the output file has already is not measured again; Ctrl-C keeps the methods and batches that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        output: File of records, one JSON object a line.
        data_dir: Folder with samsum/*.json, squality/dev.jsonl; the Hugging Face hub if left out.
        dataset: samsum, or squality, whose stories need 14 rounds or more.
        split: report, or choose for searching options; each half of the documents serves one.
        rounds: Contexts absorbed; a stream has context_tokens * rounds + sync_tokens tokens.
        streams: How many are read, each asked about other documents as far as there are so many.
        batch: How many streams are read at once, where a device has no room for all; the figures stay the same.
        seed: Of documents and methods.
        config: TOML file with a table [summary] (context_tokens, sync_tokens, num_queries, max_new_tokens, embedder)
            and one [absorb], which changes the method absorber. The embedder is the hub id or folder of a
            sentence-transformers model, for the similarity in meaning; that of $ABSORBER_EMBEDDER or of the extra
            "similarity" if left out, and no such figure without either.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    flags = {"kind": dataset, "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    where: dict[str, Any] = {"data_dir": data_dir, "output": output, "batch": batch, "model": model, "device": device}
    return _run("summary", methods, flags, config, Output(json_lines=json), **where)


def with_embedder(table: dict[str, Any], report: Output) -> dict[str, Any]:
    """The settings of `summary` with the embedder to judge by; without one, which is told, where there is none."""
    from absorber.bench.similarity import usual_embedder, why_none

    table = {"embedder": usual_embedder()} | table
    if not table["embedder"]:
        report.say(why_none())
    return table


def _run(
    name: str,
    methods: Sequence[str],
    flags: dict[str, Any],
    config: Path | None,
    report: Output,
    *,
    data_dir: Path | None,
    output: Path,
    **where: Any,
) -> int:
    from absorber.bench.answer_tables import ASKING_TASKS
    from absorber.bench.hub import fetched

    tables = read_tables(config)
    table = tables.get(name, {})
    task = make_task(ASKING_TASKS[name], flags | (with_embedder(table, report) if name == "summary" else table))
    folder = fetched(task.kind) if data_dir is None else data_dir
    records = run_methods(task, methods, tables, report, data_dir=folder, output=output, **where)
    show_answers(report, records)
    report.event("done", num_records=len(records), output=str(output))
    return 0


def show_answers(report: Output, records: "Sequence[Record]") -> None:
    """Show a table of each task of those records that ask about a long context."""
    from absorber.bench.answer_tables import ASKING_TASKS, answer_rows

    for name in ASKING_TASKS:
        show_rows(report, *answer_rows(records, name))
