"""Gap closed of what is asked, from records of the same texts."""

import dataclasses
import math

import pytest

from absorber.bench.answer_gaps import with_gaps
from absorber.bench.answer_tables import answer_rows
from absorber.bench.report import make_report
from absorber.bench.report_page import to_html
from report_records import cells_of, made

SETTINGS = {"kind": "ag_news", "num_rounds": 2}
NLL = {
    ("truncation", "windowed"): [4.0, 6.0],
    ("truncation", "contextless"): [8.0, 8.0],
    ("absorber", "windowed"): [3.5, 4.5],
    ("absorber", "contextless"): [9.0, 9.0],
}
FULL = [3.0, 3.0]


def record(method, view, per_sample, **more):
    value = sum(per_sample) / len(per_sample)
    found = made("icl", method, "label_nll", value, unit="nats", settings=SETTINGS, view=view, chance=0.25, **more)
    return dataclasses.replace(found, per_sample=per_sample, num_samples=len(per_sample))


def measured(seed=0):
    found = [record(method, view, own, seed=seed) for (method, view), own in NLL.items()]
    return found + [record(method, "full", FULL, seed=seed) for method in ("truncation", "absorber")]


def gaps(records):
    found = with_gaps(records)
    assert found[: len(records)] == records
    return {(one.method, one.config["view"], one.seed): one for one in found[len(records) :]}


def test_gaps_by_hand():
    """Windowed 5, 4 and 3: half; drawn alone the streams have .5 and .5. Contextless 8, 9 and 3: minus a fifth."""
    found = gaps(measured())
    values = {key[:2]: one.value for key, one in found.items()}
    assert values == {
        ("truncation", "windowed"): 0,
        ("truncation", "contextless"): 0,
        ("absorber", "windowed"): pytest.approx(0.5),
        ("absorber", "contextless"): pytest.approx(-0.2),
    }
    own = found["absorber", "windowed", 0]
    assert (own.metric, own.unit, own.num_samples) == ("label_gap_closed", "ratio", 2)
    # Paired: .5 / 1 and 1.5 / 3 are the same for each stream, so that there is no spread; unpaired there would be.
    assert (own.ci95_low, own.ci95_high) == pytest.approx((0.5, 0.5))
    assert own.config["chance"] == 0.25


def test_only_what_was_asked_about_the_same_texts_compares():
    absorber = [one for one in measured() if one.method == "absorber"]
    assert gaps(absorber) == {}
    for change in ({"seed": 1}, {"context_length": 4096}, {"device": "Device R"}, {"model": "other"}):
        others = [dataclasses.replace(one, **change) for one in measured() if one.method == "truncation"]
        assert {method for method, _, _ in gaps(absorber + others)} == {"truncation"}
    assert len(gaps(measured() + measured(seed=1))) == 8


def test_where_full_attention_gains_nothing_there_is_no_gap():
    records = [
        dataclasses.replace(one, per_sample=[9.0, 9.0]) if one.config["view"] == "full" else one for one in measured()
    ]
    found = gaps(records)["absorber", "windowed", 0]
    assert math.isnan(found.value)
    assert found.ci95_low is None
    assert "no gap" in to_html(make_report(records))
    # In the mean there is none, but in some draws: an interval of those alone would say nothing.
    records = [
        dataclasses.replace(one, per_sample=[3.9, 9.0]) if one.config["view"] == "full" else one for one in measured()
    ]
    found = gaps(records)["absorber", "windowed", 0]
    assert (found.ci95_low, found.ci95_high) == (None, None)


def test_the_report_and_the_command_show_them():
    accuracy = [
        made("icl", method, "accuracy", 0.25, settings=SETTINGS, view=view, chance=0.25)
        for method in ("truncation", "absorber")
        for view in ("windowed", "contextless", "full")
    ]
    records = accuracy + measured()
    heads, rows = answer_rows(records, "icl")
    shown = [row[heads.index("label gap closed")] for row in rows]
    assert shown == ["0.0 %", "0.0 %", "50.0 %", "-20.0 %"]
    report = make_report(records)
    assert dict(report.facts)["Records"] == str(len(records))
    (section,) = [one for one in report.sections if one.title == "Task: icl"]
    cells = [row for part in section.parts if hasattr(part, "heads") for row in cells_of(part, method="absorber")]
    assert any("50.0 %" in row.values() and "-20.0 %" in row.values() for row in cells)
    short = report.sections[0].parts[0]
    assert "icl: label gap closed, windowed" in {row[0].text for row in short.rows}
