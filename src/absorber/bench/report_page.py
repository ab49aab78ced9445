"""A report as files: one page of HTML that needs nothing else, Markdown, and a table of all records."""

import csv
import io
from pathlib import Path
from typing import Any

from absorber.bench.records import Record, model_label
from absorber.bench.report_layout import Cell, Gallery, Report, Table, origin, place_of
from absorber.bench.report_tables import spell_value
from absorber.errors import MissingExtraError

_FIELDS = ("value", "unit", "ci95_low", "ci95_high", "num_samples", "context_length", "round", "seed")
_MOST_ORIGINS = 6


def to_html(report: Report) -> str:
    """Write the page. Everything in it that is text is escaped.

    Raises:
        MissingExtraError: If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("the page needs jinja2: pip install 'absorber[bench]'") from error
    places = {id(record): number for number, record in enumerate(report.records, start=1)}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    by_task: dict[str, list[Record]] = {}
    for record in report.records:
        by_task.setdefault(record.task, []).append(record)
    return environment.get_template("report.html.jinja").render(
        report=report,
        by_task=by_task,
        is_table=lambda part: isinstance(part, Table),
        is_numeric=is_numeric,
        origins=origins,
        model_label=model_label,
        number_of=lambda record: places.get(id(record), 0),
        place=place,
        drawn=Markup,
    )


def is_numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers."""
    return any(row[column].is_number for row in table.rows)


def origins(cell: Cell) -> str:
    """What is said of the records behind a number."""
    shown = [origin(record) for record in cell.sources[:_MOST_ORIGINS]]
    more = len(cell.sources) - len(shown)
    return "\n".join([*shown, *([f"and {more} more"] if more else [])])


def place(record: Record) -> str:
    """The places of a record in one line."""
    return ", ".join(f"{name} {spell_value(value)}" for name, value in place_of(record).items())


def to_markdown(report: Report) -> str:
    """Write the tables; figures are in the page alone."""
    lines = ["# Absorber: what was measured", ""]
    lines += [f"- {name}: {_inline(value)}" for name, value in report.facts]
    for section in report.sections:
        lines += ["", f"## {_inline(section.title)}"]
        lines += [line for text in section.text for line in ("", _inline(text))]
        for part in section.parts:
            lines += _markdown_table(part) if isinstance(part, Table) else _markdown_gallery(part)
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    lines = ["", f"### {_inline(table.title)}"] if table.title else []
    lines += [
        "",
        _line(map(_inline, table.heads)),
        _line("---:" if is_numeric(table, at) else "---" for at in range(len(table.heads))),
    ]
    lines += [_line(_inline(f"{cell.text} {cell.interval}".strip()) for cell in row) for row in table.rows]
    return lines + [line for note in table.notes for line in ("", _inline(note))]


def _markdown_gallery(gallery: Gallery) -> list[str]:
    names = ", ".join(panel.title for panel in gallery.panels)
    return ["", f"Figures in the page: {_inline(gallery.title or 'cost')} ({_inline(names)})."]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _inline(text: str) -> str:
    """Take from a text what Markdown would read as its own, and HTML."""
    for letter in "\\`*_|[]":
        text = text.replace(letter, "\\" + letter)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def to_csv(report: Report) -> str:
    """Write a line for each record, with all that a table or a figure is made from but the samples."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("task", "method", "model", "metric", "place", *_FIELDS, "seconds", "device", "dtype", "git"))
    for record in report.records:
        head = (record.task, record.method, model_label(record.model), record.metric, place(record))
        values = (getattr(record, name) for name in _FIELDS)
        writer.writerow((*head, *values, record.seconds, record.device, record.dtype, record.git))
    return file.getvalue()
