"""Tasks tell a method that searches what is asked, and ask each question after what was found for it."""

import pytest
import torch

from absorber.backbone import inspect, sink_token
from absorber.bench import made_up
from absorber.bench.icl import InContext
from absorber.bench.methods import BM25, METHODS, Setting
from absorber.bench.reasoning import Reasoning
from absorber.bench.summary import Summary

SIZES = {"num_rounds": 3, "num_streams": 2, "context_tokens": 120, "sync_tokens": 140, "num_queries": 2}
TASKS = {
    "label_nll": InContext(**SIZES, num_classes=3),
    "answer_nll": Reasoning(**SIZES, max_new_tokens=2),
    "summary_nll": Summary(**SIZES, max_new_tokens=2),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return made_up.write(tmp_path_factory.mktemp("data"))


def reader_of(method, task, texts, model, tokenizer):
    sink = sink_token(model, tokenizer)
    setting = Setting(backbone=inspect(model), stream=task.stream, sink_id=sink, num_streams=2, seed=0)
    reader = method.begin(setting)
    reader.read(texts.token_ids_BT)
    return reader


@pytest.mark.parametrize("metric", TASKS)
@pytest.mark.parametrize("view", ["windowed", "contextless"])
def test_each_question_stands_after_what_was_found_for_it(metric, view, model, tokenizer, data_dir):
    task = TASKS[metric]
    texts = task.prepare(model, tokenizer, data_dir)
    (checkpoint,) = task.measure(BM25(passage_tokens=16), inspect(model), texts, sink_id=0)
    read = getattr(reader_of(BM25(passage_tokens=16), task, texts, model, tokenizer), view)
    prefixes = []
    for place in range(2):
        found_BT = read([own[place].sought for own in texts.queries])
        prefixes.append(found_BT)
        for stream in range(2):
            query = texts.queries[stream][place]
            before = [0, *found_BT[stream].tolist(), *query.prompt]
            answer = texts.language.tokens(f" {query.references[0]}")
            with torch.no_grad():
                logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            total = -sum(float(logits[at, token]) for at, token in enumerate(answer))
            size = len(answer) if metric == "summary_nll" else 1
            assert checkpoint.metrics[f"{metric}/{view}"][2 * stream + place] == pytest.approx(total / size, 1e-3)
    assert not torch.equal(*prefixes)  # it was told which question


def test_what_is_sought_is_the_question_without_the_words_around_it(model, tokenizer, data_dir):
    for metric, absent, present in (("answer_nll", "Emma", "Who built"), ("label_nll", "Category", "number")):
        texts = TASKS[metric].prepare(model, tokenizer, data_dir)
        for own in texts.queries:
            for query in own:
                sought, prompt = tokenizer.decode(query.sought), tokenizer.decode(query.prompt)
                assert absent in prompt
                assert absent not in sought
                assert present in sought
                assert sought in prompt


def test_of_a_method_that_does_not_search_one_reading_serves_all(model, tokenizer, data_dir, monkeypatch):
    task, calls = TASKS["answer_nll"], []
    texts = task.prepare(model, tokenizer, data_dir)
    own = Reasoning.answer
    monkeypatch.setattr(Reasoning, "answer", lambda self, *rest: calls.append(len(rest[1][0])) or own(self, *rest))
    list(task.measure(METHODS["truncation"], inspect(model), texts, sink_id=0))
    assert calls == [2, 2, 2]  # full, windowed, contextless
