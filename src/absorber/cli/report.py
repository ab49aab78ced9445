"""`absorber report`: records as one page."""

from pathlib import Path

from absorber.cli.console import Output
from absorber.cli.options import JsonFlag
from absorber.errors import BenchmarkError


def report(
    *records: Path,
    output: Path = Path("report.html"),
    markdown: Path | None = None,
    csv: Path | None = None,
    json: JsonFlag = False,
) -> int:
    """Make one page from records: tables, curves, the paper's numbers beside ours, and what was not run.

    The page needs no network and no other file.

    Args:
        records: Files of records, as absorber bench writes them.
        output: The page, in HTML.
        markdown: File for the tables in Markdown.
        csv: File for the records as a table, one a line.
        json: Write one JSON object per line to stdout.
    """
    shown = Output(json_lines=json)
    from absorber.bench.report import make_report, read_all
    from absorber.bench.report_page import to_csv, to_html, to_markdown

    made = make_report(read_all(records))
    for path, write in ((output, to_html), (markdown, to_markdown), (csv, to_csv)):
        if path is None:
            continue
        text = write(made)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise BenchmarkError(f"cannot write {path}: {error.strerror}; choose another place") from error
        shown.show(f"{path}: {len(text.encode()) / 1e3:,.0f} kB")
    shown.event("done", num_records=len(made.records), output=str(output))
    return 0
