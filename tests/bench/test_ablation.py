"""The tables of ablations: valid, different in effect, measured once, resumable, and compared with the paper."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from absorber.backbone import inspect, sink_token
from absorber.bench import ablation
from absorber.bench.ablation import Ablation, cells, run_ablation
from absorber.bench.ablation_report import ablation_sections, contradictions
from absorber.bench.ablation_tables import LAYERS, TABLES, Published, Table
from absorber.bench.methods import METHODS
from absorber.bench.records import Record, read_records
from absorber.bench.retention import Retention, Streams
from absorber.bench.runner import Listener
from absorber.config import PRESETS, AbsorbConfig
from absorber.errors import AbsorptionError, ConfigError
from absorber.models import config_of

TASK = Ablation(num_streams=2, num_tokens=32, context_tokens=16, sync_tokens=32, passage_tokens=16)
SMALL = {"max_steps": 2, "rank": 2, "anchor_texts": 2, "anchor_tokens": 8}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(120)]
        (folder / f"book{book}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def few_texts(monkeypatch):
    """Measure drift on books alone: the folder has nothing else."""
    monkeypatch.setattr(Retention.prepare, "__kwdefaults__", {"drift_kinds": ("books",)})


@pytest.fixture
def small_tables(monkeypatch, few_texts):
    """Two tables with the default in both."""
    monkeypatch.setattr(ablation, "AbsorbConfig", lambda: AbsorbConfig(**SMALL))
    tables = {
        "teacher": Table(asks="Who?", variants={"base": {}, "memory": {"teacher": "memory"}}),
        "window": Table(asks="How long?", variants={"16 x 32": {}, "8 x 32": {"context_tokens": 8}}),
    }
    for name, table in tables.items():
        monkeypatch.setitem(TABLES, name, table)
    return tuple(tables)


def variants(table):
    return [cell for cell in cells(Ablation(), num_layers=30) if cell.table == table]


def test_the_default_of_every_table_is_there_and_everything_is_valid():
    found = cells(Ablation(), num_layers=30)
    assert {cell.table for cell in found} == set(TABLES)
    assert len(found) == sum(len(table.variants) for table in TABLES.values())
    with_default = {cell.table for cell in found if (cell.task, cell.config) == (Ablation(), AbsorbConfig())}
    assert with_default == set(TABLES) - {"norm"}
    for num_layers in (1, 2, 3):
        assert len(cells(Ablation(), num_layers=num_layers)) == len(found)


@pytest.mark.parametrize("table", TABLES)
def test_the_paper_is_quoted_for_variants_that_exist(table):
    for group in TABLES[table].published:
        assert set(group.values) <= set(TABLES[table].variants)
        assert all(len(values) == len(group.metrics) for values in group.values.values())


def test_windows_absorb_the_same_tokens():
    for cell in variants("window"):
        assert cell.task.context_tokens * cell.task.num_rounds == 5120
        assert cell.task.checkpoints == [cell.task.num_rounds]
    assert Ablation(num_tokens=1000).with_window(300, 512).num_rounds == 3
    assert Ablation(num_tokens=100).with_window(300, 512).num_rounds == 1


def test_both_readings_of_the_papers_objective():
    configs = {cell.variant: cell.config for cell in variants("objective")}
    paper = PRESETS["paper"].absorb.replace(threshold=None, sink="shared")
    assert configs["paper's, hidden"] == paper
    assert configs["paper's, KL"] == paper.replace(hidden_weight=0.0, kl_weight=1.0)
    default = AbsorbConfig(hidden_weight=1.0, kl_weight=0.0, next_token_weight=0.0)
    assert configs["hidden"] == default
    assert configs["KL"] == default.replace(hidden_weight=0.0, kl_weight=1.0)


def test_temp_lora_is_the_baseline_at_its_best_and_at_its_published_rate():
    configs = [cell.config for cell in variants("temp_lora")]
    assert {METHODS[name].absorb_config for name in ("temp-lora", "temp-lora-16")} <= set(configs)
    assert METHODS["temp-lora"].replace(learning_rate=5e-5).absorb_config in configs
    for steps in (2, 16):
        rates = {config.learning_rate for config in configs[1:] if config.max_steps == steps}
        assert len(rates) == 4


def test_parts_of_the_blocks():
    chosen = {name: list(part(30)) for name, part in LAYERS.items()}
    assert sorted(chosen["upper half"] + chosen["lower half"]) == list(range(30))
    assert len(chosen["every second"]) == 15


@pytest.mark.parametrize("values", [{"num_tokens": 0}, {"num_streams": 0}, {"kind": "songs"}, {"split": "all"}])
def test_a_bad_task_is_an_error(values):
    with pytest.raises(ConfigError, match=r"counts are|kind is one of"):
        Ablation(**values)


def test_an_unknown_table_is_an_error():
    with pytest.raises(ConfigError, match="there is no table magic; there are objective"):
        cells(Ablation(), ["sink", "magic"], num_layers=2)


@pytest.fixture(scope="module")
def deep():
    """Four blocks, so that halves of them differ."""
    config = config_of("tiny")
    config.num_hidden_layers = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def shrunk(config):
    """The same with fewer and larger steps."""
    return config.replace(
        max_steps=max(1, config.max_steps // 4),
        learning_rate=config.learning_rate * 10,
        rank=max(1, config.rank // 8),
        warmup_steps=0,
        anchor_texts=max(1, config.anchor_texts // 16),
        anchor_tokens=8,
        held_out_tokens=config.held_out_tokens // 64,
    )


@pytest.mark.parametrize("table", [name for name in TABLES if name != "window"])
def test_variants_differ_in_effect(table, deep, tokenizer):
    task = Ablation(num_streams=1, num_tokens=48, context_tokens=8, sync_tokens=16, passage_tokens=16)
    text = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    )
    texts = Streams(token_ids_BT=torch.tensor([tokenizer(text)["input_ids"]]), guide=None, drift={})
    sink = sink_token(deep, tokenizer)
    measured = {}
    for cell in cells(task, [table], num_layers=4):
        method = ablation.LoRA(shrunk(cell.config))
        [last] = cell.task.measure(method, inspect(deep), texts, sink_id=sink)
        measured[cell.variant] = (last.metrics["windowed_nll"][0], last.metrics["contextless_nll"][0])
    assert len(set(measured.values())) == len(measured), measured


def test_records_carry_their_place_and_the_default_is_measured_once(model, tokenizer, data_dir, tmp_path, small_tables):
    measured = []
    listener = Listener(on_method=lambda name, records: measured.append(name))
    output = tmp_path / "records.jsonl"
    run = {"data_dir": data_dir, "output": output, "listener": listener, "tables": small_tables}
    records = run_ablation(TASK, model, tokenizer, **run)
    assert measured == ["teacher/base", "teacher/memory", "window/8 x 32"]
    places = {(record.config["table"], record.config["variant"]) for record in records}
    assert places == {("teacher", "base"), ("teacher", "memory"), ("window", "16 x 32"), ("window", "8 x 32")}
    assert {record.method for record in records} == {f"{table}/{variant}" for table, variant in places}
    assert {(record.task, record.context_length) for record in records} == {("ablation", 64)}
    assert {(record.config["variant"], record.round) for record in records if record.config["table"] == "window"} == {
        ("16 x 32", 2),
        ("8 x 32", 4),
    }
    metrics = [record.metric for record in records if record.method == "window/16 x 32"]
    gaps, views = ["windowed_gap_closed", "contextless_gap_closed"], ("windowed", "contextless")
    assert sorted(metrics) == sorted(
        [*gaps, "drift_nll", *(f"{view}_{what}" for view in views for what in ("nll", "kl"))]
        + ["gate_open", "gated_drift_nll"] * 6  # three rules, with and without a kind of drift
    )
    assert repr(sorted(map(repr, records))) == repr(sorted(map(repr, read_records(output))))

    again = run_ablation(TASK, model, tokenizer, **run)
    assert len(measured) == 3
    assert repr(again) == repr(records)
    assert len(read_records(output)) == len(records)
    sections = ablation_sections(records)
    assert [section.table for section in sections] == ["window", "teacher"]
    assert [row[0] for row in sections[1].rows] == ["base", "memory"]
    assert all(len(row) == len(section.heads) for section in sections for row in section.rows)


def test_a_table_asked_for_later_takes_what_is_measured(model, tokenizer, data_dir, tmp_path, small_tables):
    measured = []
    listener = Listener(on_method=lambda name, records: measured.append(name))
    output = tmp_path / "records.jsonl"
    for table in ("window", "teacher"):
        run_ablation(TASK, model, tokenizer, tables=[table], data_dir=data_dir, output=output, listener=listener)
    assert measured == ["window/16 x 32", "window/8 x 32", "teacher/memory"]
    default = [record for record in read_records(output) if record.config["variant"] in ("base", "16 x 32")]
    by_table = {name: [r.value for r in default if r.config["table"] == name] for name in ("window", "teacher")}
    assert by_table["window"] == by_table["teacher"]
    run_ablation(TASK, model, tokenizer, data_dir=data_dir, output=output, tables=small_tables)
    keys = {record.key for record in read_records(output)}
    assert len(keys) == 4 * 2 * 4  # with and without a kind of drift, without a gate and with each of three


def test_a_failed_variant_does_not_end_the_run(model, tokenizer, data_dir, tmp_path, small_tables, monkeypatch):
    class Failing(ablation.LoRA):
        def begin(self, setting):
            if self.absorb_config.teacher == "memory":
                raise AbsorptionError("no")
            return super().begin(setting)

    monkeypatch.setattr(ablation, "LoRA", Failing)
    failed = []
    listener = Listener(on_failure=lambda name, error: failed.append(name))
    output = tmp_path / "records.jsonl"
    records = run_ablation(
        TASK, model, tokenizer, tables=small_tables, data_dir=data_dir, output=output, listener=listener
    )
    assert failed == ["teacher/memory"]
    assert {record.method for record in records} == {"teacher/base", "window/16 x 32", "window/8 x 32"}


def made(variant, value, *, table="objective", metric="windowed_gap_closed", low=None, high=None):
    """A record as a run would write it."""
    config = {"task": Ablation().config(), "method": AbsorbConfig().to_dict(), "table": table, "variant": variant}
    return Record(
        task="ablation",
        method=f"{table}/{variant}",
        model="tiny",
        metric=metric,
        value=value,
        unit="ratio",
        num_samples=12,
        ci95_low=low,
        ci95_high=high,
        context_length=6144,
        round=10,
        seed=0,
        config=json.loads(json.dumps(config)),
        device="cpu",
        dtype="float32",
        versions={},
        git="",
    )


def of_variant(variant, *, windowed, contextless, table="objective"):
    values = {"windowed": windowed, "contextless": contextless}
    kinds = [made(variant, value, table=table, metric=f"{view}_gap_closed") for view, value in values.items()]
    return kinds + [
        made(variant, 3.0, table=table, metric=f"{view}_{what}") for view in values for what in ("nll", "kl")
    ]


def test_a_contradiction_is_found_in_both_directions():
    paper = Published(table=5, dataset="SAMSum", metrics=("F1", "BLEURT"), values={"a": (57.5, 0.4), "b": (37.4, 0.3)})
    turned = dataclasses.replace(paper, values={"a": (37.4, 0.3), "b": (57.5, 0.4)})
    ours = {"a": made("a", 0.2), "b": made("b", 0.5)}
    assert contradictions(paper, ours) == [("a", "b")]
    assert contradictions(turned, ours) == []
    other_way = {"a": made("a", 0.5), "b": made("b", 0.2)}
    assert contradictions(paper, other_way) == []
    assert contradictions(turned, other_way) == [("b", "a")]


def test_what_cannot_be_compared_is_no_contradiction():
    paper = Published(table=5, dataset="SAMSum", metrics=("F1", "BLEURT"), values={"a": (2.0, 0.4), "b": (1.0, 0.5)})
    assert contradictions(paper, {"a": made("a", 0.0), "b": made("b", 1.0)}) == []  # the paper's metrics disagree
    plain = dataclasses.replace(paper, values={"a": (2.0, 2.0), "b": (1.0, 1.0), "c": (3.0, 3.0)})
    assert contradictions(plain, {"a": made("a", float("nan")), "b": made("b", 1.0)}) == []
    assert contradictions(plain, {"a": made("a", 1.0), "b": made("b", 1.0)}) == []


def test_the_report_shows_the_papers_figures_and_where_ours_contradict_them():
    records = of_variant("KL", windowed=0.6, contextless=0.2) + of_variant("hidden", windowed=0.1, contextless=0.3)
    [section] = ablation_sections(records)
    assert [row[0] for row in section.rows] == ["hidden (default)", "KL (default)"]  # made from the default's settings
    assert [dict(zip(section.heads, row, strict=True))["paper's F1"] for row in section.rows] == ["57.5", "37.4"]
    assert "table 5: LLaMA2-7B on SAMSum" in section.sources[0]
    [line] = section.contradictions
    assert line == "Our windowed gap closed contradicts the paper's table 5, which has hidden > KL."
    agreeing = of_variant("KL", windowed=0.1, contextless=0.2) + of_variant("hidden", windowed=0.6, contextless=0.3)
    assert ablation_sections(agreeing)[0].contradictions == []


def test_a_doubtful_contradiction_is_called_so_and_many_are_counted():
    wide = [
        dataclasses.replace(record, ci95_low=record.value - 1, ci95_high=record.value + 1)
        for name, value in (("hidden", 0.2), ("KL", 0.5))
        for record in of_variant(name, windowed=value, contextless=value)
    ]
    assert all("intervals overlap" in line for line in ablation_sections(wide)[0].contradictions)
    worst_first = sorted(TABLES["window"].variants, key=lambda name: -TABLES["window"].published[0].values[name][0])
    turned = [
        record
        for place, name in enumerate(worst_first)
        for record in of_variant(name, windowed=place, contextless=place, table="window")
    ]
    lines = ablation_sections(turned)[0].contradictions
    assert len(lines) == 2
    assert all("and 32 more pairs" in line for line in lines)


def test_settings_are_not_mixed():
    records = of_variant("KL", windowed=0.6, contextless=0.2)
    other = [dataclasses.replace(record, seed=1) for record in records]
    assert len(ablation_sections(records + other)) == 2
    assert ablation_sections([dataclasses.replace(record, task="retention") for record in records]) == []
