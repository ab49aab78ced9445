"""`absorber bench icl`, `reasoning` and `summary`: a long context, and questions about it at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absorber.cli.bench_run import make_task, read_tables, run_methods, show_rows
from absorber.cli.console import Output
from absorber.cli.options import JsonFlag, ModelFlag

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
    seed: int = 0,
    config: Path | None = None,
    model: ModelFlag = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Classify texts after a long context of labelled examples.

    What the output file has already is not measured again; Ctrl-C keeps the methods that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        output: File of records, one JSON object a line.
        data_dir: Folder with ag_news/test.csv, trec/*.txt, banking77/*.csv; the Hugging Face hub if left out.
        dataset: ag_news, trec, banking77.
        split: report, or choose for searching options; each half of the texts serves one.
        rounds: Contexts absorbed; a stream has context_tokens * rounds + sync_tokens tokens.
        streams: Streams in one batch, each of other examples.
        seed: Of examples, queries and methods.
        config: TOML file with a table [icl] (context_tokens, sync_tokens, num_queries, num_classes) and one [absorb],
            which changes the method absorber.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    flags = {"kind": dataset, "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    return _run("icl", methods, flags, Output(json_lines=json), output, data_dir, config, model, device)


def reasoning(
    *methods: str,
    output: Path,
    data_dir: Path | None = None,
    split: str = "report",
    rounds: int = 10,
    streams: int = 24,
    seed: int = 0,
    config: Path | None = None,
    model: ModelFlag = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Ask questions that need several paragraphs of a long context (MuSiQue).

    What the output file has already is not measured again; Ctrl-C keeps the methods that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        output: File of records, one JSON object a line.
        data_dir: Folder with musique/*.jsonl; the Hugging Face hub if left out.
        split: report, or choose for searching options; each half of the questions serves one.
        rounds: Contexts absorbed; a stream has context_tokens * rounds + sync_tokens tokens.
        streams: Streams in one batch, each with its own questions.
        seed: Of questions, paragraphs and methods.
        config: TOML file with a table [reasoning] (context_tokens, sync_tokens, num_queries, max_new_tokens) and one
            [absorb], which changes the method absorber.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    flags = {"kind": "musique", "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    return _run("reasoning", methods, flags, Output(json_lines=json), output, data_dir, config, model, device)


def summary(
    *methods: str,
    output: Path,
    data_dir: Path | None = None,
    dataset: str = "samsum",
    split: str = "report",
    rounds: int = 10,
    streams: int = 24,
    seed: int = 0,
    config: Path | None = None,
    embedder: str | None = None,
    model: ModelFlag = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Ask for the summary of one of many dialogues or stories in a long context.

    What the output file has already is not measured again; Ctrl-C keeps the methods that are done.

    Args:
        methods: full, truncation, sink, bm25, ttt, temp-lora, temp-lora-16, dcd, absorber-paper, absorber,
            absorber-light, absorber-full; these if left out. Others by the entry points absorber.methods.
        output: File of records, one JSON object a line.
        data_dir: Folder with samsum/*.json, squality/dev.jsonl; the Hugging Face hub if left out.
        dataset: samsum, or squality, whose stories need 14 rounds or more.
        split: report, or choose for searching options; each half of the documents serves one.
        rounds: Contexts absorbed; a stream has context_tokens * rounds + sync_tokens tokens.
        streams: Streams in one batch, each asked about other documents.
        seed: Of documents and methods.
        config: TOML file with a table [summary] (context_tokens, sync_tokens, num_queries, max_new_tokens) and one
            [absorb], which changes the method absorber.
        embedder: Hub id or folder of a sentence-transformers model, for the similarity in meaning; that of
            $ABSORBER_EMBEDDER or of the extra "similarity" if left out, and no such figure without either.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    flags = {"kind": dataset, "split": split, "num_rounds": rounds, "num_streams": streams, "seed": seed}
    flags |= {"embedder": choose_embedder(embedder, report)}
    return _run("summary", methods, flags, report, output, data_dir, config, model, device)


def choose_embedder(given: str | None, report: Output) -> str:
    """The embedder to judge summaries with; none, which is told, where there is none."""
    from absorber.bench.similarity import usual_embedder, why_none

    embedder = given or usual_embedder()
    if not embedder:
        report.say(why_none())
    return embedder


def _run(
    name: str,
    methods: Sequence[str],
    flags: dict[str, Any],
    report: Output,
    output: Path,
    data_dir: Path | None,
    config: Path | None,
    model: str | None,
    device: str,
) -> int:
    from absorber.bench.answer_tables import ASKING_TASKS
    from absorber.bench.hub import fetched

    tables = read_tables(config)
    task = make_task(ASKING_TASKS[name], flags | tables.get(name, {}))
    folder = fetched(task.kind) if data_dir is None else data_dir
    records = run_methods(task, methods, tables, report, data_dir=folder, output=output, model=model, device=device)
    show_answers(report, records)
    report.event("done", num_records=len(records), output=str(output))
    return 0


def show_answers(report: Output, records: "Sequence[Record]") -> None:
    """Show a table of each task of those records that ask about a long context."""
    from absorber.bench.answer_tables import ASKING_TASKS, answer_rows

    for name in ASKING_TASKS:
        show_rows(report, *answer_rows(records, name))
