"""Many-shot classification on a tiny model: what is shown, what is asked, and how a class is chosen."""

import dataclasses
from collections import Counter

import pytest
import torch

from absorber.backbone import inspect, sink_token
from absorber.bench import asking, made_up
from absorber.bench.answer_tables import answer_rows
from absorber.bench.data_sets import examples
from absorber.bench.icl import InContext, calibrated
from absorber.bench.methods import METHODS, LoRA, Setting
from absorber.bench.records import read_records
from absorber.bench.runner import Listener, run_task
from absorber.config import AbsorbConfig
from absorber.errors import BenchmarkError

TASK = InContext(num_rounds=2, num_streams=4, context_tokens=100, sync_tokens=120, num_queries=3)
CONFIG = AbsorbConfig(rank=2, max_steps=1, anchor_texts=2, anchor_tokens=8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return made_up.write(tmp_path_factory.mktemp("data"))


def task(**changes):
    return dataclasses.replace(TASK, **changes)


def shown(texts, tokenizer):
    """The whole examples of each stream; the first is cut."""
    return [tokenizer.decode(row).split("\n\n")[1:-1] for row in texts.token_ids_BT]


def test_calibration_by_hand():
    """After the query .6 and .4, without content .75 and .25 on average: .8 and 1.6, that is 1/3 and 2/3."""
    query_BQC = torch.tensor([[[0.6, 0.4]]]).log() - 5  # names may be unlikely altogether
    blank_BKC = torch.tensor([[[0.9, 0.1], [0.06, 0.04]]]).log()  # .9 and .1; .6 and .4
    assert calibrated(query_BQC, blank_BKC).exp().tolist() == [[pytest.approx([1 / 3, 2 / 3])]]


@pytest.mark.parametrize("kind", ["ag_news", "trec", "banking77"])
def test_no_text_twice_and_classes_in_balance(kind, model, tokenizer, data_dir):
    own = task(kind=kind, num_rounds=8, num_classes=5, num_queries=7)
    texts = own.prepare(model, tokenizer, data_dir)
    known = {example.text: example.label for example in examples(kind, data_dir, "report")}
    assert texts.token_ids_BT.shape == (4, 120 + 8 * 100)
    assert len(texts.labels) == min(5, len(set(known.values())))
    asked = []
    for whole, queries in zip(shown(texts, tokenizer), texts.queries, strict=True):
        pairs = [one.rsplit("\n", 1) for one in whole]
        contents = [text.split(": ", 1)[1] for text, _ in pairs]
        for text, (_, label) in zip(contents, pairs, strict=True):
            assert label.split(": ")[1] == known[text]
        contents += [tokenizer.decode(query.prompt).rsplit("\n", 1)[0].split(": ", 1)[1] for query in queries]
        assert len(set(contents)) == len(contents)
        assert [known[text] for text in contents[-7:]] == [query.references[0] for query in queries]
        counts = Counter(known[text] for text in contents[:-7])
        assert set(counts) == set(texts.labels)
        assert max(counts.values()) - min(counts.values()) <= 1
        asked += contents[-7:]
    counts = Counter(known[text] for text in asked)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_halves_share_no_text(model, tokenizer, data_dir):
    def texts(split):
        prepared = task(split=split).prepare(model, tokenizer, data_dir)
        asked = [tokenizer.decode(query.prompt).rsplit("\n", 1)[0] for own in prepared.queries for query in own]
        return {one.rsplit("\n", 1)[0] for own in shown(prepared, tokenizer) for one in own} | set(asked)

    assert not texts("choose") & texts("report")


def test_seeds_differ_and_repeat(model, tokenizer, data_dir):
    one, again, other = (task(seed=seed).prepare(model, tokenizer, data_dir).token_ids_BT for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_too_few_texts(model, tokenizer, data_dir):
    with pytest.raises(BenchmarkError, match="Use fewer rounds"):
        task(num_rounds=99).prepare(model, tokenizer, data_dir)
    with pytest.raises(BenchmarkError, match="use fewer queries"):
        task(num_queries=80).prepare(model, tokenizer, data_dir)


def chosen_by_hand(model, prefix, prompts, names):
    """The slow twin: log-likelihoods of the names after each prompt, each text read alone."""
    found = []
    for prompt in prompts:
        row = []
        for name in names:
            before = [0, *prefix, *prompt]
            with torch.no_grad():
                log_p = model(torch.tensor([before + name])).logits[0, len(before) - 1 : -1].log_softmax(dim=-1)
            row.append(sum(float(log_p[at, token]) for at, token in enumerate(name)))
        found.append(row)
    return torch.tensor(found)


def test_every_view_is_as_by_hand(model, tokenizer, data_dir, monkeypatch):
    monkeypatch.setattr(asking, "_FULL_STREAMS", 3)
    texts = TASK.prepare(model, tokenizer, data_dir)
    (checkpoint,) = TASK.measure(METHODS["truncation"], inspect(model), texts, sink_id=0)
    assert checkpoint.round == 2
    names = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in texts.labels]
    blank = [tokenizer(text)["input_ids"] for text in ("News: N/A\nCategory:", "News:\nCategory:")]
    blank.append(tokenizer("News: [MASK]\nCategory:")["input_ids"])
    chosen = {}
    for view, kept in {"windowed": 120, "contextless": 0, "full": 320}.items():
        for stream, queries in enumerate(texts.queries):
            prefix = texts.token_ids_BT[stream, 320 - kept :].tolist()
            log_p = chosen_by_hand(model, prefix, [query.prompt for query in queries], names)
            divided = log_p.softmax(-1) / chosen_by_hand(model, prefix, blank, names).softmax(-1).mean(0)
            for place, query in enumerate(queries):
                at, right = 3 * stream + place, texts.labels.index(query.references[0])
                chosen[view, at] = int(divided[place].argmax())
                assert checkpoint.metrics[f"accuracy/{view}"][at] == (chosen[view, at] == right)
                assert checkpoint.metrics[f"label_nll/{view}"][at] == pytest.approx(-float(log_p[place, right]), 1e-3)
    for view in ("windowed", "contextless"):
        same = [float(chosen[view, at] == chosen["full", at]) for at in range(12)]
        assert checkpoint.metrics[f"agreement/{view}"] == same
    assert checkpoint.metrics["chance"] == [0.25] * 4


def test_a_method_is_asked_with_its_memory(model, tokenizer, data_dir):
    """Every stream's memory makes one class's first byte likely; that class is chosen without calibration's help."""
    texts = TASK.prepare(model, tokenizer, data_dir)
    setting = Setting(
        backbone=inspect(model),
        stream=TASK.stream,
        sink_id=sink_token(model, tokenizer),
        num_streams=4,
        seed=0,
        guide=texts.guide,
    )
    reader = LoRA(CONFIG).begin(setting)
    before = TASK.examine(setting, reader, texts, 2)
    with torch.no_grad():
        for weight in reader.adapter.up.values():
            weight[2] = 0.3
    after = TASK.examine(setting, reader, texts, 2)
    moved = [
        abs(a - b) > 1e-3 for a, b in zip(after["label_nll/contextless"], before["label_nll/contextless"], strict=True)
    ]
    assert moved == [False] * 6 + [True] * 3 + [False] * 3
    assert after["label_nll/full"] == before["label_nll/full"]


def test_records_are_complete_resume_and_are_shown(model, tokenizer, data_dir, tmp_path):
    output = tmp_path / "records.jsonl"
    methods = {"full": METHODS["full"], "truncation": METHODS["truncation"], "absorber": LoRA(CONFIG)}
    first = run_task(TASK, methods, model, tokenizer, data_dir=data_dir, output=output)
    said = []
    found = run_task(
        TASK, methods, model, tokenizer, data_dir=data_dir, output=output, listener=Listener(say=said.append)
    )
    assert [record.key for record in found] == [record.key for record in first]
    assert sum("already measured" in line for line in said) == 3
    records = read_records(output)
    assert {(record.method, record.metric, record.config["view"]) for record in records} == {
        (method, metric, view)
        for method in methods
        for metric in ("accuracy", "agreement", "label_nll")
        for view in ("windowed", "contextless", "full")
    } - {(method, "agreement", "full") for method in methods}
    for record in records:
        assert (record.config["chance"], record.context_length, record.num_samples) == (0.25, 320, 4)
        assert record.ci95_low <= record.value <= record.ci95_high
        assert record.value == pytest.approx(sum(record.per_sample) / 4, abs=1e-5)
        assert record.unit == ("nats" if record.metric == "label_nll" else "ratio")
        if record.method == "full" and record.metric == "agreement":
            assert record.value == 1.0
    heads, rows = answer_rows(records, "icl")
    views = ("windowed", "contextless")
    assert [(row[2], row[4]) for row in rows] == [(method, view) for method in methods for view in views]
    for row in rows:
        shown_row = dict(zip(heads, row, strict=True))
        found = {
            record.metric: record for record in records if (record.method, record.config["view"]) == (row[2], row[4])
        }
        assert shown_row["accuracy"].startswith(f"{100 * found['accuracy'].value:.1f} % [")
        assert shown_row["label nll"] == f"{found['label_nll'].value:.3f}"
        assert shown_row["by chance"] == "25.0 %"
        assert shown_row["accuracy of full"] == rows[0][5].split(" [")[0]  # the method full, windowed
    assert answer_rows(records, "reasoning")[1] == []
