"""A report of records: what was measured, beside the paper, what it costs, and what was not run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from absorber.bench.answer_gaps import with_gaps
from absorber.bench.records import Record, model_label, read_records
from absorber.bench.report_cost import cost_figure, cost_table
from absorber.bench.report_curves import curves
from absorber.bench.report_families import family_tables
from absorber.bench.report_layout import Cell, Gallery, Report, Section, Table
from absorber.bench.report_missing import TASKS, gaps, matrix
from absorber.bench.report_paper import ablated_tables, printed_tables
from absorber.bench.report_short import in_short
from absorber.bench.report_tables import BY_ROUND, groups, tables
from absorber.bench.speed import break_even
from absorber.errors import BenchmarkError, MissingExtraError

_PAPER = (
    "The paper (arXiv 2604.20915) has LLaMA2-7B on one RTX 4080 SUPER. Model, data and metrics are not ours, so only "
    "orders compare."
)
_MOST_ROWS, _FEW_ROWS = 12, 7
"""The second table of a setting, and those after it, are opened only when asked for if they are longer."""
_LAST = " Of figures taken round by round the tables have the last, the curves all."


def read_all(files: Sequence[Path]) -> list[Record]:
    """Read files of records; a record that stands in several, or twice in one, counts once.

    Raises:
        BenchmarkError: If there are no files, one is missing, empty, not text or damaged.
    """
    if not files:
        raise BenchmarkError("there are no files of records; give some, such as records/*/*.jsonl")
    found: dict[str, Record] = {}
    for path in files:
        if not path.is_file():
            raise BenchmarkError(f"there is no file {path}; give files of records")
        own = read_records(path)
        if not own:
            raise BenchmarkError(f"{path} has no records; run absorber bench, or leave the file out")
        for record in own:
            _check(record, path)
            found.setdefault(repr(record), record)
    return list(found.values())


def _check(record: Record, path: Path) -> None:
    """Look for what a damaged record would fail at later, where nobody would know why."""
    task = record.config.get("task", {}) if isinstance(record.config, dict) else None
    numbers = (record.value, record.num_samples, record.context_length, record.round, record.seed)
    texts = (record.task, record.method, record.model, record.metric, record.unit, record.device, record.git)
    if (
        not isinstance(task, dict)
        or (record.task == "ablation" and not {"table", "variant"} <= set(record.config))
        or not all(isinstance(value, int | float) for value in numbers)
        or not all(isinstance(text, str) for text in texts)
    ):
        line = json.dumps({"task": record.task, "method": record.method, "metric": record.metric}, default=str)
        raise BenchmarkError(
            f"{path} holds a damaged record, {line}: a field is missing or of a wrong type. Delete its line"
        )


def make_report(records: Sequence[Record]) -> Report:
    """Lay out a report.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the report's figures need matplotlib: pip install 'absorber[bench]'") from error
    own = with_gaps(records)
    tasks = [task for task in dict.fromkeys([*TASKS, *(record.task for record in own)]) if task != "ablation"]
    sections = [_of_task(task, [record for record in own if record.task == task]) for task in tasks]
    sections = [section for section in sections if section.parts]
    short = in_short([record for record in own if record.task != "ablation"])
    sections[:0] = [Section("short", "In short", [], [short])] if short.rows else []
    sections.append(Section("cost-quality", "Cost against quality", [_COST], _cost(own)))
    sections.append(Section("paper", "The paper's tables 1 to 4 beside ours", [_PAPER], list(printed_tables(own))))
    ablations = Section("ablations", "Ablations, and the paper's tables 5 to 7", [_PAPER], list(ablated_tables(own)))
    missing = Section("not-run", "What was not run", gaps(records), [matrix(records)])
    return Report(own, _facts(records), [*sections, ablations, missing])


_COST = "Wall time of reading and absorbing a stream, from the records of retention, against the gap that is closed."


def _cost(records: Sequence[Record]) -> list[Table | Gallery]:
    parts: list[Table | Gallery] = []
    for group in groups([record for record in records if record.task == "retention"]):
        parts += [part for part in (cost_figure(group), cost_table(group)) if part is not None]
    return parts


def _of_task(task: str, records: Sequence[Record]) -> Section:
    asks = TASKS.get(task, "")
    text = [f"{asks[:1].upper()}{asks[1:]}.{_LAST if task in BY_ROUND else ''}"] if asks else []
    section = Section(f"task-{task}", f"Task: {task}", text)
    for group in groups(records):
        made = family_tables(group.records) if task == "families" else tables(group.records)
        laid: list[Table] = []
        for place, table in enumerate(made):
            title = " — ".join(part for part in (group.title, table.title) if part)
            notes = [*table.notes, *([group.caption] if place == 0 else [])]
            is_folded = place > 0 and len(table.rows) > (_MOST_ROWS if place == 1 or task == "families" else _FEW_ROWS)
            laid.append(dataclasses.replace(table, title=title, notes=notes, is_folded=is_folded))
        section.parts.extend(table for table in laid if not table.is_folded)
        for gallery in curves(group.records):
            title = " — ".join(part for part in (group.title, gallery.title) if part)
            section.parts.append(type(gallery)(title, gallery.legend, gallery.panels))
        section.parts.extend(table for table in laid if table.is_folded)
    if task == "latency" and (even := _even(records)).rows:
        section.parts.insert(0, even)
    return section


def _even(records: Sequence[Record]) -> Table:
    """From how many tokens on absorbing is quicker than full attention, on each device."""
    rows = [
        (Cell(device), *map(Cell, row))
        for device in dict.fromkeys(record.device for record in records)
        for row in break_even([record for record in records if record.device == device])
    ]
    heads = ("device", "model", "method", "streams", "tokens")
    notes = ["A token of full attention at its best takes longer from so many tokens on than one with absorption."]
    return Table("Quicker than full attention, absorption included", heads, rows, notes)


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    def each(values: Sequence[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return [
        ("Models", each([model_label(record.model) for record in records])),
        ("Devices", each([record.device for record in records])),
        ("Methods", each([record.method for record in records if record.task != "ablation"])),
        ("Seeds", each([str(seed) for seed in sorted({record.seed for record in records})])),
        ("Commits", each([record.git for record in records])),
        ("Records", f"{len(records):,}"),
    ]
