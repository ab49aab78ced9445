"""Tables of a report: seeds in one row, the best marked, who wins in short, and what is folded away."""

import math

from absorber.bench.report import make_report
from absorber.bench.report_curves import curves, style
from absorber.bench.report_page import to_html
from absorber.bench.report_paper import printed_tables
from absorber.bench.report_short import in_short
from absorber.bench.report_tables import groups, labels, tables
from absorber.models import DEFAULT_MODEL
from report_records import cells_of, everything, made, timed


def test_tables_have_the_last_round_with_all_seeds_in_one_row():
    (group,) = groups([record for record in everything() if record.task == "retention"])
    main, drift = tables(group.records)
    (row,) = cells_of(main, method="absorber")
    assert (row["contextless gap closed"], row["seeds"], row["samples a seed"]) == ("48.5 %", "2 (0, 1)", "4")
    (cell,) = (cells[main.heads.index("contextless gap closed")] for cells in main.rows if cells[0].text == "absorber")
    # From the lowest end of the lower seed's interval to the highest of the upper one's.
    assert cell.interval == "[32.7, 64.4]"
    assert [(record.seed, record.round) for record in cell.sources] == [(0, 3), (1, 3)]
    assert [row["seeds"] for row in cells_of(main, method="truncation")] == ["1 (0)"]
    assert drift.heads[-2:] == ("books", "code")
    assert cells_of(drift, method="absorber")[0]["code"] == "+0.0097"


def best_of(values, metric="accuracy", **more):
    """Methods marked as best in a table of these values."""
    records = [made("icl", name, metric, value, **more) for name, value in values.items()]
    (table,) = tables(records)
    return [row[0].text for row in table.rows if row[-1].kind == "best"]


def test_the_best_and_those_whose_intervals_overlap_are_marked():
    # Intervals reach 0.0123 to either side.
    assert best_of({"full": 0.9, "a": 0.5, "b": 0.52, "c": 0.4}) == ["a", "b"]
    assert best_of({"full": 0.1, "a": 0.5, "b": 0.6}, metric="windowed_nll", unit="nats") == ["a"]
    assert best_of({"a": 0.5, "b": 0.51}) == []
    assert best_of({"a": 0.5, "b": 0.9}, metric="omens") == []
    assert best_of({"a": 0.5, "b": math.nan, "c": 0.3}) == ["a"]


def test_the_first_table_says_who_is_best_and_who_is_not_told_apart():
    records = [made("icl", "full", "accuracy", 0.9)]
    records += [made("icl", "good", "accuracy", value, seed=seed) for seed, value in enumerate((0.5, 0.54))]
    records += [made("icl", "near", "accuracy", 0.5), made("icl", "bad", "accuracy", 0.3)]
    records += [made("icl", name, "accuracy", 0.1, tokens=64) for name in ("good", "bad")]
    records.append(made("recall", "alone", "recall_exact", 0.9))
    table = in_short(records)
    assert [[cell.text for cell in row] for row in table.rows] == [
        [
            "icl: accuracy",
            "good",
            "52.0 %",
            "near",
            "bad",
            "90.0 %",
            "SmolLM2-135M-Instruct; Device Q; 1,024 tokens",
        ]
    ]
    assert f"{DEFAULT_MODEL} (weights 4-bit in origin)." in table.notes
    assert "In short" in to_html(make_report(records))
    assert "In short" not in to_html(make_report(records[-1:]))


def test_seeds_with_data_of_their_own_are_one_line():
    records = [
        made("families", "rnn", "nll", 2.0 + seed, unit="nats", seed=seed, own={"data": f"digest {seed}", "rank": 3})
        for seed in (0, 1)
    ]
    assert set(labels(records).values()) == {"rnn"}
    other = made("families", "rnn", "nll", 2.0, unit="nats", own={"data": "digest 0", "rank": 4})
    assert set(labels([*records, other]).values()) == {"rnn (rank 3)", "rnn (rank 4)"}


def test_how_a_method_was_computed_and_what_older_records_do_not_know_are_no_difference():
    settings = ({"rank": 3}, {"rank": 3, "cuda_graphs": True, "anchors": 5}, {"rank": 3, "cuda_graphs": False})
    records = [made("icl", "lora", "nll", 2.0, unit="nats", seed=seed, own=own) for seed, own in enumerate(settings)]
    assert set(labels(records).values()) == {"lora"}
    idle, studied = ({"study": study, "study_steps": 4} for study in ("off", "light"))
    records = [made("icl", "lora", "nll", 2.0, unit="nats", own=own) for own in (idle, idle | {"study_steps": 8})]
    assert set(labels(records).values()) == {"lora"}
    records = [made("icl", "lora", "nll", 2.0, unit="nats", own=own) for own in (studied, studied | {"study_steps": 8})]
    assert set(labels(records).values()) == {"lora (study steps 4)", "lora (study steps 8)"}


def test_what_absorbing_adds_is_drawn_beside_what_it_does_not():
    records = []
    for tokens in (1024, 2048):
        records += [timed(name, "ms_per_token", 5.0, "ms", tokens, 1) for name in ("full", "absorber")]
        records.append(timed("absorber", "ms_per_token_with_absorption", 9.0, "ms", tokens, 1))
    (gallery,) = curves(records)
    assert [panel.title for panel in gallery.panels] == ["ms per token, batch 1"]
    assert [name for name, _, _ in gallery.legend] == ["full", "absorber", "absorber, with absorption"]
    colors = {name: color for name, color, _ in gallery.legend}
    assert colors["absorber"] == colors["absorber, with absorption"]


def test_long_tables_after_the_first_are_opened_when_asked_for():
    records = [
        made("recall", f"method {number}", metric, 0.5, age=1, wording=word, view=view)
        for number in range(13)
        for metric in ("recall_exact", "recall_share", "recall_nll")
        for word in ("text", "other")
        for view in ("contextless", "windowed")
    ]
    made_page = to_html(make_report(records))
    assert made_page.count("<details><summary>") == 2
    assert "(13 rows)</summary>" in made_page


def test_a_method_nobody_chose_a_color_for_takes_one_that_is_free():
    names = ["full", "absorber", "truncation", "absorber-merged", "full-eager"]
    assert len({style(name, names)[0] for name in names}) == len(names)


def test_a_length_that_the_paper_has_not_is_no_row_of_its_table():
    settings = {"kind": "ag_news"}
    far = [made("icl", name, "accuracy", 0.5, tokens=64, settings=settings) for name in ("sink", "absorber")]
    near = made("icl", "absorber", "accuracy", 0.5, tokens=2048, settings=settings)
    for records, rows in ((far, [["all", "ours"]]), ([*far, near], [["absorber", "ours"]])):
        table = printed_tables(records)[1]
        own = [[row[0].text, row[1].text.split(",")[0]] for row in table.rows if row[1].text != "paper"]
        assert "sink" not in [name for name, _ in own]
        assert own[-1:] == rows
