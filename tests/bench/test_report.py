"""The report: every number is there and says where it is from, nothing is loaded from elsewhere, and gaps are named."""

import csv
import dataclasses
import html
import io
import math
import re
from pathlib import Path

import pytest

from absorber.bench.ablation_tables import TABLES
from absorber.bench.methods import METHODS
from absorber.bench.records import append_records
from absorber.bench.report import make_report, read_all
from absorber.bench.report_cost import bargains
from absorber.bench.report_curves import curves
from absorber.bench.report_layout import Gallery, Table, origin
from absorber.bench.report_page import to_csv, to_html, to_markdown
from absorber.bench.report_paper import printed_tables
from absorber.bench.report_tables import groups, tables
from absorber.errors import BenchmarkError
from absorber.models import DEFAULT_MODEL
from report_records import cells_of, everything, made, retention


@pytest.fixture(scope="module")
def report():
    return make_report(everything())


@pytest.fixture(scope="module")
def page(report):
    return to_html(report)


def test_every_record_is_in_the_page_with_its_value(report, page):
    for number, record in enumerate(report.records, start=1):
        (row,) = re.findall(rf'<tr id="r{number}">.*?</tr>', page)
        cells = [html.unescape(re.sub("<small>.*?</small>", "", cell)) for cell in re.findall("<t[hd].*?</t[hd]>", row)]
        words = [re.sub("<[^>]*>", "", cell) for cell in cells]
        assert f"{record.value:.6g}" in words
        assert str(record.seed) in words
        assert re.sub("<[^>]*>", "", record.method) in words
        assert {record.metric, record.device, record.git} <= set(words)


def test_every_number_of_a_table_says_where_it_is_from(report, page):
    linked = re.findall(r'<a href="#r(\d+)" title="([^"]*)">', page)
    assert len(linked) > 60
    for number, title in linked:
        record, said = report.records[int(number) - 1], html.unescape(title)
        assert origin(record) in said
        for part in (record.task, record.method, record.metric, f"seed {record.seed}", "abc1234", "Device Q"):
            assert part in said
    numbers = 0
    for section in report.sections:
        for table in (part for part in section.parts if isinstance(part, Table)):
            assert all(len(row) == len(table.heads) for row in table.rows)
            for row in table.rows:
                for head, cell in zip(table.heads, row, strict=True):
                    free = ("seeds", "samples a seed", "tokens", "age", "chance", "batch")
                    if cell.is_number and cell.kind not in ("paper", "missing") and head not in free:
                        numbers += 1
                        assert cell.sources or table.title == "Methods and tasks", (table.title, head, cell)
    assert numbers > 60


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_records_say(page):
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)", page, re.IGNORECASE)
    assert all(link.startswith("#") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "&lt;script&gt;alert(&#39;$x_1$&#39;)&lt;/script&gt;" in page
    assert page.count("<svg") == page.count("</svg>") > 8
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page


def test_markdown_and_csv_hold_the_same(report):
    text = to_markdown(report)
    assert "<script" not in text
    assert "not run" in text
    assert "48.5 %" in text
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert [row["method"] for row in rows] == [record.method for record in report.records]
    for row, record in zip(rows, report.records, strict=True):
        assert float(row["value"]) == record.value or math.isnan(record.value)
        assert (row["git"], row["metric"]) == (record.git, record.metric)
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") - line.count("\\|") >= 3


def test_the_default_model_is_never_named_without_its_origin(report, page):
    for text in (page, to_csv(report), to_markdown(report).replace("\\", "")):
        assert DEFAULT_MODEL in text
        assert not re.search(re.escape(DEFAULT_MODEL) + r"(?! \(weights 4-bit in origin\))", text)


def test_recall_is_by_age_and_lengths_are_rows_of_other_tasks():
    records = everything()
    (group,) = groups([record for record in records if record.task == "recall"])
    exact = tables(group.records)[0]
    assert [row["age"] for row in cells_of(exact, method="absorber")] == ["1", "3"]
    assert cells_of(exact, method="absorber", age="3")[0]["text, contextless"] == "37.7 %"
    assert [gallery.title for gallery in curves(group.records)] == ["By rounds since it was absorbed"]
    (group,) = groups([record for record in records if record.task == "icl"])
    (table,) = tables(group.records)
    assert [
        (row["tokens"], row["accuracy, windowed"], row["chance"]) for row in cells_of(table, method="truncation")
    ] == [
        ("2048", "44.8 %", "0.25"),
        ("4096", "45.0 %", "0.25"),
    ]
    (gallery,) = curves(group.records)
    assert gallery.title == "By length of the context"
    titles = [f"{metric}, {view}" for metric in ("accuracy", "agreement") for view in ("contextless", "windowed")]
    assert sorted(panel.title for panel in gallery.panels) == titles
    assert {"everything in view", "by chance"} < {name for name, _, _ in gallery.legend}


def test_speed_is_by_length_and_batch_with_what_did_not_fit():
    (group,) = groups([record for record in everything() if record.task == "latency"])
    assert "weights random" in group.caption
    assert "512" in group.caption
    (table,) = tables(group.records)
    rows = {(row["method"], row["tokens"], row["batch"], row["checkpointing"]): row for row in cells_of(table)}
    assert rows["full", "2048", "8", "–"]["ms per token"] == "98.76"
    assert rows["full", "2048", "8", "–"]["peak memory bytes"] == "2.50 GB"
    assert rows["full", "16384", "1", "–"]["ms per token"] == "out of memory"
    assert rows["full", "16384", "1", "–"]["round ms"] == ""
    assert {row["round ms"] for key, row in rows.items() if key[0] == "absorber-round"} == {"512.2"}
    assert ("absorber-round", "4096", "1", "always") in rows
    (gallery,) = curves(group.records)
    titles = {panel.title for panel in gallery.panels}
    assert titles >= {"ms per token, batch 1", "ms per token, batch 8", "round ms, batch 1, always"}


def test_what_was_measured_otherwise_is_not_mixed():
    records = retention("absorber", [0.1, 0.2, 0.3])
    other = retention("absorber", [0.4, 0.5, 0.6])
    for record in other:
        object.__setattr__(record, "device", "Device R")
    assert [group.title for group in groups(records + other)] == ["Device Q", "Device R"]
    swept = []
    for scale in (0.1, 0.2):
        swept += [made("icl", "ttt", "accuracy", scale, own={"scale": scale, "batch_tokens": 16})]
    (table,) = tables(swept)
    assert [row[0].text for row in table.rows] == ["ttt (scale 0.1)", "ttt (scale 0.2)"]


def test_where_absorbing_pays_is_said_for_each_device():
    times = {"full": {2048: 4.0, 4096: 6.0}, "absorber": {2048: 5.0, 4096: 5.0}}
    found = [
        dataclasses.replace(
            made("latency", method, "ms_per_token" + "_with_absorption" * (method != "full"), value, tokens=tokens),
            device=device,
            config={"batch": 1},
        )
        for device, slower in (("a card", 0.0), ("another", 9.0))
        for method, own in times.items()
        for tokens, value in ((tokens, time + slower * (method == "full")) for tokens, time in own.items())
    ]
    (section,) = [section for section in make_report(found).sections if section.anchor == "task-latency"]
    rows = [[cell.text for cell in row] for row in section.parts[0].rows]
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("a card", "absorber", "about 3072"),
        ("another", "absorber", "2048 or fewer"),
    ]


def test_the_papers_tables_stand_beside_ours_or_say_not_run(report):
    parts = {part.title: part for section in report.sections for part in section.parts if isinstance(part, Table)}
    news = next(part for title, part in parts.items() if title.startswith("Table 2"))
    assert [row[2].text for row in news.rows[:2]] == ["54.2", "54.8 %"]  # full attention, the paper's and ours
    assert [row[4].text for row in news.rows[:2]] == ["43.7", "not run"]
    absorber = [row for row in news.rows if row[0].text == "absorber"]
    assert [[cell.text for cell in row[2:]] for row in absorber] == [["37.9", "38.2", "35.5"], ["not run"] * 3]
    dialogues = next(part for title, part in parts.items() if title.startswith("Table 4"))
    assert [cell.text for cell in dialogues.rows[-1]] == ["all", "ours", *["not run"] * 3]
    latency = next(part for title, part in parts.items() if title.startswith("Table 1"))
    assert [row[1].text.split(",")[0] for row in latency.rows if row[0].text == "full"] == ["paper", "ours"]
    assert [row[-1].text for row in latency.rows[:2]] == ["out of memory"] * 2
    assert [cell.text for cell in latency.rows[1][2:]] == ["12.35", "12.35", "not run", "out of memory"]
    objective = next(part for title, part in parts.items() if title.startswith("objective"))
    assert [row[0].text for row in objective.rows] == ["hidden (default)", "KL (default)"]
    assert objective.rows[0][1].sources[0].value == 0.111
    assert objective.heads[3:5] == ("paper's F1", "paper's BLEURT")
    assert [cell.text for cell in objective.rows[0][3:5]] == ["57.5", "0.415"]
    window = next(part for title, part in parts.items() if title.startswith("Table 6"))
    assert {row[1].text for row in window.rows} == {"not run"}


def test_of_several_lengths_in_a_range_the_longest_counts():
    values = {1024: 0.11, 1025: 0.12, 2048: 0.13, 2049: 0.14, 3072: 0.15, 9000: 0.16}
    settings = {"kind": "ag_news"}
    records = [made("icl", "sink", "accuracy", value, tokens=at, settings=settings) for at, value in values.items()]
    records.append(made("icl", "sink", "accuracy", 0.99, tokens=2000, settings={"kind": "trec"}))
    table = printed_tables(records)[1]
    (row,) = (row for row in table.rows if row[0].text == "sink")
    assert [cell.text for cell in row[2:]] == ["13.0 %", "15.0 %", "not run"]


def test_what_was_not_run_is_named(report):
    section = next(section for section in report.sections if section.anchor == "not-run")
    text = " ".join(section.text)
    for words in (
        "Task reasoning",
        "Task summary",
        "Task cost",
        "Task retention on dialogues",
        "Task icl on trec, banking77",
        "absorber (2)",
    ):
        assert words in text
    for name in set(TABLES) - {"objective"}:
        assert f"Ablation {name}: not run." in text
    assert "Ablation objective, default, hidden + KL" in text
    (table,) = section.parts
    (row,) = cells_of(table, method="bm25")
    assert {name for name, text in row.items() if text == "not run"} == {
        *("retention", "recall", "icl", "reasoning", "summary")
    }
    # What has no method of this name is not a gap.
    assert {row[name] for name in ("latency", "cost", "families", "divination")} == {"–"}
    assert cells_of(table, method="mamba")[0]["latency"] == "not run"  # for the paper has it
    (row,) = cells_of(table, method="absorber-round")
    assert set(row.values()) == {"absorber-round", "–", "8 records"}
    (row,) = cells_of(table, method="absorber")
    assert (row["retention"], row["icl"]) == ("30 records", "not run")
    assert {row[0].text for row in table.rows} >= {*METHODS, "snapkv", "kvzip", "tea-leaves", "mamba", "rwkv"}
    assert "not run from scratch either: mamba (by mamba), rwkv (by rnn)" in text
    assert "divination" in table.heads


def test_the_frontier_is_of_those_whom_nobody_beats():
    records = retention("truncation", [0, 0, 0], seconds=0.1) + retention("dear", [0, 0, 0.5], seconds=9)
    records += retention("good", [0, 0, 0.5], seconds=5) + retention("cheap", [0, 0, 0.2], seconds=1)
    records += retention("bad", [0, 0, -0.5], seconds=2)
    (group,) = groups(records)
    found = bargains(group)
    assert {one.name for one in found if not one.is_beaten(found, 1)} == {"truncation", "cheap", "good"}
    cost = {one.name: one.cost for one in found}
    assert cost["good"] == pytest.approx(1000 * 5 / (2560 * 4))


def test_a_curve_has_a_point_for_each_round_in_the_color_of_its_method(report):
    section = next(section for section in report.sections if section.anchor == "task-retention")
    (gallery,) = (part for part in section.parts if isinstance(part, Gallery))
    titles = [panel.title for panel in gallery.panels]
    assert titles == ["saved with the window in view", "contextless gap closed", "drift nll, books", "drift nll, code"]
    colors = {name: color for name, color, _ in gallery.legend}
    assert set(colors) == {"truncation", "absorber"}
    for panel in gallery.panels:
        for color in colors.values():
            assert color in panel.svg
    assert "drift nll" in to_html(report)


def test_a_record_counts_once_and_bad_files_are_named(tmp_path):
    good, empty, damaged, binary = (tmp_path / name for name in ("good", "empty", "damaged", "binary"))
    append_records(good, everything())
    empty.write_text("")
    append_records(damaged, everything()[:2])
    damaged.write_text(damaged.read_text() + '{"task": "retention"}\n')
    binary.write_bytes(b"\xff\xfe\x00")
    assert len(read_all([good, good])) == len(everything())
    for path, words in {
        empty: "has no records",
        damaged: "line 3 of .* is not a record",
        binary: "cannot read|not a record",
        tmp_path / "none": "there is no file",
    }.items():
        with pytest.raises(BenchmarkError, match=words):
            read_all([good, path])
    with pytest.raises(BenchmarkError, match="no files of records"):
        read_all([])


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "ablation"},
        {"config": []},
        {"config": {"task": 3}},
        {"value": "much"},
        {"method": None},
        {"seed": None},
    ],
)
def test_a_field_of_a_wrong_type_is_named(changes, tmp_path):
    path = tmp_path / "records.jsonl"
    append_records(path, [dataclasses.replace(everything()[0], **changes)])
    with pytest.raises(BenchmarkError, match="damaged record"):
        read_all([path])


def test_a_record_without_settings_of_its_task_is_shown():
    bare = dataclasses.replace(made("latency", "full", "ms_per_token", 7.25, unit="ms/token", tokens=2048), config={})
    report = make_report([bare])
    assert 'title="latency, full, ms_per_token: 7.25' in to_html(report)


@pytest.mark.parametrize("task", ["retention", "recall", "icl", "ablation", "divination"])
def test_one_task_alone_is_a_report(task):
    text = to_html(make_report([record for record in everything() if record.task == task]))
    assert "What was not run" in text


def test_the_committed_records_make_a_page():
    folder = Path(__file__).parents[2] / "records"
    report = make_report(read_all(sorted(folder.glob("recall/*.jsonl"))))
    assert "75.0 %" in to_html(report)


def test_a_setting_that_older_records_do_not_know_parts_nothing_unless_it_differs():
    def record(**settings):
        return dataclasses.replace(made("divination", "full", "f1", 0.5), config={"task": {"kind": "stars"} | settings})

    old, new, other = record(), record(query=64), record(query=32)
    assert len(groups([old, new])) == 1
    assert len(groups([old, new, other])) == 3
    assert len(groups([new, other])) == 2
