"""`absorber bench families`: sequence models trained from scratch on the same text, and measured alike."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absorber.cli.bench_run import listener, read_tables, show_rows
from absorber.cli.console import Output
from absorber.cli.options import JsonFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from absorber.bench.methods import Method
    from absorber.bench.records import Record


def families(
    *names: str,
    data_dir: Path,
    output: Path,
    checkpoints: Path,
    size: str = "30m",
    tokens: int = 30_000_000,
    learning_rate: float = 1e-3,
    seconds: float | None = None,
    seed: int = 0,
    config: Path | None = None,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Train a transformer, a Mamba, an RNN and a TTT model alike, and score them beyond their training length.

    All have equal parameters, tokenizer, tokens, order of tokens and optimizer. Truncation and Absorber then read with
    the trained transformer. Training goes on from its last checkpoint, and what the output file has is not done again.

    Args:
        names: transformer, mamba, rnn, ttt, truncation, absorber; these if left out. Also ttt-mlp, and the methods of
            absorber bench retention.
        data_dir: Folder with novels_train/*.txt to train on, and novels/*.txt to be scored.
        output: File of records, one JSON object a line.
        checkpoints: Folder of trained weights, tokens and tokenizer.
        size: tiny, 3m or 30m: parameters with embeddings.
        tokens: Training tokens of each family.
        learning_rate: Peak of the optimizer's.
        seconds: Training ends at the first point of its curve after so many; run it again to go on.
        seed: Of weights, order and streams.
        config: TOML file with a table [families] for all other settings (row_tokens, step_tokens, pair_share,
            scored_tokens, distances, ...), [absorb], and one for any other method.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.bench.families.run import Place, check_names, run_families
    from absorber.bench.families.settings import Families
    from absorber.cli.opening import quiet_libraries
    from absorber.models import choose_device

    check_names(names)
    tables = read_tables(config)
    flags = {"size": size, "tokens": tokens, "learning_rate": learning_rate, "seed": seed}
    task = Families.from_table(flags | tables.get("families", {}))
    quiet_libraries()
    failures: list[str] = []
    place = Place(data_dir, output, checkpoints)
    records = run_families(
        task,
        names,
        place,
        device=choose_device(device),
        methods=_changed(tables),
        seconds=seconds,
        listener=listener(report, "family", failures),
    )
    show_families(report, records)
    report.event("done", num_records=len(records), failures=failures, output=str(output))
    return 0 if not failures else 1


def _changed(tables: dict[str, Any]) -> "dict[str, Method]":
    """The methods, with what a settings file changes."""
    from absorber.bench.methods import METHODS

    settings = tables | {"absorber": tables.get("absorb", {}) | tables.get("absorber", {})}
    return {name: method.replace(**settings.get(name, {})) for name, method in METHODS.items()}


def show_families(report: Output, records: "Sequence[Record]") -> None:
    """Show the tables of those records that are of families."""
    from absorber.bench.report_families import family_tables

    for table in family_tables([record for record in records if record.task == "families"]):
        show_rows(report, table.heads, [tuple(cell.text for cell in row) for row in table.rows])
