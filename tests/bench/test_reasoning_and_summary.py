"""Questions and summaries at the end of long contexts, on a tiny model."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from absorber.backbone import inspect
from absorber.bench import asking, made_up
from absorber.bench.answer_tables import answer_rows
from absorber.bench.asking import Language, fill
from absorber.bench.data_sets import questions, summarized
from absorber.bench.methods import METHODS, LoRA
from absorber.bench.reasoning import Reasoning
from absorber.bench.records import read_records
from absorber.bench.runner import Listener, run_task
from absorber.bench.summary import Summary
from absorber.config import AbsorbConfig
from absorber.errors import BenchmarkError

SIZES = {"num_rounds": 2, "num_streams": 3, "context_tokens": 120, "sync_tokens": 140, "num_queries": 2}
TASKS = {
    "musique": Reasoning(**SIZES, max_new_tokens=3),
    "samsum": Summary(**SIZES, max_new_tokens=3),
    "squality": Summary(**SIZES, kind="squality", max_new_tokens=3),
}
CONFIG = AbsorbConfig(rank=2, max_steps=1, anchor_texts=2, anchor_tokens=8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return made_up.write(tmp_path_factory.mktemp("data"))


def test_a_context_of_pieces():
    needed, others = [[1] * 4, [2] * 3], [[number] * 5 for number in range(10, 20)]
    row = fill(needed, others, 19, random.Random(0), what="pieces")
    assert row[:2] == [12, 12]  # the last one taken, cut at its beginning
    pieces = Counter(row)
    assert pieces == {1: 4, 2: 3, 10: 5, 11: 5, 12: 2}
    assert sum(a != b for a, b in pairwise(row)) == 4  # no piece is torn
    assert fill([[1] * 4], [], 4, random.Random(0), what="pieces") == [1] * 4
    orders = {tuple(fill(needed, others, 19, random.Random(seed), what="pieces")) for seed in range(20)}
    assert len(orders) > 5
    with pytest.raises(BenchmarkError, match="use more rounds"):
        fill(needed, others, 6, random.Random(0), what="pieces")
    with pytest.raises(BenchmarkError, match="Use fewer rounds"):
        fill(needed, others, 58, random.Random(0), what="pieces")


def test_the_first_line_of_an_answer(tokenizer):
    language = Language(tokenizer, {0})

    def ids(text):
        return language.tokens(text)

    assert language.first_line(ids(" Rome")) == ("Rome", False)
    assert language.first_line(ids(" Rome\nQ")) == ("Rome", True)
    assert language.first_line([*ids(" Rome"), 0, *ids("x")]) == ("Rome", True)
    assert language.first_line([]) == ("", False)
    assert language.first_line(ids("\n\n")) == ("", False)
    assert language.first_line(ids("\n Rome\n")) == ("Rome", True)


@pytest.mark.parametrize("split", ["choose", "report"])
def test_a_context_holds_what_its_questions_need(split, model, tokenizer, data_dir):
    task = Reasoning(**SIZES, split=split)
    texts = task.prepare(model, tokenizer, data_dir)
    own_half = {one.question: one for one in questions(data_dir, split)}
    for row, queries in zip(texts.token_ids_BT, texts.queries, strict=True):
        parts = [part.strip() for part in tokenizer.decode(row).split("\n\n")]
        assert len(row) == 380
        assert len(set(parts[1:])) == len(parts[1:])  # the first is cut
        asked = [own_half[tokenizer.decode(query.prompt).rsplit("Question: ")[-1][:-8]] for query in queries]
        needed = {text for one in asked for text in one.supporting}
        assert needed <= set(parts)
        others = {text for one in own_half.values() if one not in asked for text in one.supporting + one.others}
        assert set(parts[1:-1]) <= needed | others
        assert [query.references for query in queries] == [one.answers for one in asked]
    prompts = [tokenizer.decode(query.prompt) for own in texts.queries for query in own]
    assert len(set(prompts)) == 6  # all six questions of the half, before one is asked again


def test_one_dialogue_has_the_heading_that_is_asked_for(model, tokenizer, data_dir):
    for seed in range(5):
        task = Summary(**SIZES, seed=seed)
        texts = task.prepare(model, tokenizer, data_dir)
        half = {one.requests[0].prompt: one for one in summarized("samsum", data_dir, "report")}
        for row, queries in zip(texts.token_ids_BT, texts.queries, strict=True):
            text = tokenizer.decode(row)
            for query in queries:
                document = half[tokenizer.decode(query.prompt)]
                assert text.count(document.heading) == 1
                assert f"{document.heading}\n{text.split(document.heading)[1].split(chr(10) * 2)[0].strip()}" in text
            headings = [part.split("\n")[0] for part in text.split("\n\n")[1:-1]]
            assert len(set(headings)) == len(headings)


def test_stories_that_do_not_fit_are_not_asked_for(model, tokenizer, data_dir):
    task = TASKS["squality"]
    texts = task.prepare(model, tokenizer, data_dir)
    stories = summarized("squality", data_dir, "report")
    for row, queries in zip(texts.token_ids_BT, texts.queries, strict=True):
        text, prompts = tokenizer.decode(row), [tokenizer.decode(query.prompt) for query in queries]
        assert len(set(prompts)) == 2
        (story,) = (one for one in stories if prompts[0] in {request.prompt for request in one.requests})
        assert prompts[1] in {request.prompt for request in story.requests}  # both about the same
        assert f"{story.heading}\n{story.text}" in text
    with pytest.raises(BenchmarkError, match="Use more rounds"):
        Summary(num_rounds=1, num_streams=1, context_tokens=10, sync_tokens=10).prepare(model, tokenizer, data_dir)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", TASKS)
def test_answers_are_those_of_each_stream_alone(kind, model, tokenizer, data_dir, monkeypatch, wide):
    """What is judged was written greedily after the window, and the reference is as likely as in one reading."""
    if not wide:
        monkeypatch.setattr("absorber.bench.reading._WIDE_BYTES", 0)
    task = TASKS[kind]
    texts, judged = task.prepare(model, tokenizer, data_dir), []
    own = type(task).judge
    monkeypatch.setattr(type(task), "judge", lambda self, *pair: judged.append(pair) or own(self, *pair))
    (checkpoint,) = task.measure(METHODS["truncation"], inspect(model), texts, sink_id=0)
    windows = texts.token_ids_BT[:, -140:].tolist()
    views = {"full": texts.token_ids_BT.tolist(), "windowed": windows, "contextless": [[]] * 3}
    expected = []
    for view, prefixes in views.items():
        for stream, queries in enumerate(texts.queries):
            for place, query in enumerate(queries):
                before = [0, *prefixes[stream], *query.prompt]
                written = []
                for _ in range(3):
                    with torch.no_grad():
                        written.append(int(model(torch.tensor([before + written])).logits[0, -1].argmax()))
                expected.append((texts.language.first_line(written)[0], query.references))
                answer = texts.language.tokens(f" {query.references[0]}")
                with torch.no_grad():
                    logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
                total = -sum(float(logits[at, token]) for at, token in enumerate(answer))
                metric, size = ("answer_nll", 1) if kind == "musique" else ("summary_nll", len(answer))
                assert checkpoint.metrics[f"{metric}/{view}"][2 * stream + place] == pytest.approx(total / size, 1e-3)
    assert judged == expected


def test_a_right_answer_counts(model, tokenizer, data_dir, monkeypatch):
    """The answer to the first question of the second stream is planted."""
    task = TASKS["musique"]
    texts = task.prepare(model, tokenizer, data_dir)
    turns = iter([["x", "x", " Builder 1", "x", "x", "x"]] * 3)
    texts.queries[1][0] = replace(texts.queries[1][0], references=("The builder, 1!", "One"))
    monkeypatch.setattr(
        asking, "write_greedily", lambda *args, **kwargs: [texts.language.tokens(one) for one in next(turns)]
    )
    (checkpoint,) = task.measure(METHODS["truncation"], inspect(model), texts, sink_id=0)
    for view in ("windowed", "contextless"):
        assert checkpoint.metrics[f"exact_match/{view}"] == [0, 0, 1, 0, 0, 0]
        assert checkpoint.metrics[f"f1/{view}"] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", TASKS)
def test_records_are_complete_resume_and_are_shown(kind, model, tokenizer, data_dir, tmp_path):
    task, output = TASKS[kind], tmp_path / "records.jsonl"
    methods = {"truncation": METHODS["truncation"], "absorber": LoRA(CONFIG)}
    run_task(task, methods, model, tokenizer, data_dir=data_dir, output=output)
    said = []
    run_task(task, methods, model, tokenizer, data_dir=data_dir, output=output, listener=Listener(say=said.append))
    assert sum("already measured" in line for line in said) == 2
    records = read_records(output)
    assert {(record.method, record.metric, record.config["view"]) for record in records} == {
        (method, metric, view)
        for method in methods
        for metric in set(task.units) - {"similarity"}  # which needs an embedder
        for view in ("windowed", "contextless", "full")
    }
    assert len(records) == len({(record.method, record.metric, record.config["view"]) for record in records})
    for record in records:
        assert (record.task, record.context_length, record.num_samples) == (task.name, 380, 3)
        assert record.ci95_low <= record.value <= record.ci95_high
    heads, rows = answer_rows(records, task.name)
    assert len(rows) == 4
    assert all(len(row) == len(heads) for row in rows)
    assert {row[heads.index("by chance")] for row in rows} == {""}
    assert rows[0][:2] == (kind, "380")
