"""Recall on a tiny model: what is planted where, who sees it when asked, and what counts as an answer."""

import pytest
import torch

from absorber.adapter import Adapter
from absorber.backbone import inspect, sink_token
from absorber.bench import recall
from absorber.bench.facts import draw_facts
from absorber.bench.figures import draw_recall, recall_rows
from absorber.bench.methods import METHODS, LoRA, Method, Reader, Setting
from absorber.bench.recall import Recall, ask
from absorber.bench.records import read_records
from absorber.bench.runner import Listener, run_task
from absorber.config import AbsorbConfig
from absorber.errors import AbsorptionError, BenchmarkError

TASK = Recall(num_rounds=3, num_streams=2, context_tokens=160, sync_tokens=64, ages=(1, 3))
CONFIG = AbsorbConfig(rank=4, max_steps=2, anchor_texts=2, anchor_tokens=8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("novels")
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(120)]
        (folder / f"book{book}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def planted(model, tokenizer, data_dir):
    return TASK.prepare(model, tokenizer, data_dir)


def setting(model, tokenizer, num_streams=2):
    return Setting(
        backbone=inspect(model),
        stream=TASK.stream,
        sink_id=sink_token(model, tokenizer),
        num_streams=num_streams,
        seed=0,
    )


def test_each_context_holds_its_facts_and_the_window_after_the_last_none(planted, tokenizer):
    assert planted.token_ids_BT.shape == (2, 64 + 3 * 160)
    for row, facts in zip(planted.token_ids_BT, planted.facts, strict=True):
        parts = [tokenizer.decode(row[160 * number : 160 * (number + 1)]) for number in range(3)]
        for index, fact in enumerate(facts):
            assert [part.count(f"\n{fact.sentence}\n") for part in parts] == [index // 2 == at for at in range(3)]
        tail = tokenizer.decode(row[480:])
        assert not any(fact.prompts["text"] in tail for fact in facts)


def test_streams_are_asked_about_different_kinds(planted):
    assert [[fact.kind for fact in facts[:2]] for facts in planted.facts] == [["passkey", "name"], ["name", "number"]]


def test_a_round_absorbs_the_context_that_its_facts_are_in(planted, model, tokenizer, monkeypatch):
    import absorber.stream

    contexts, real = [], absorber.stream.absorb_context

    def watched(backbone, adapter, context_BN, *args, **kwargs):
        contexts.append(context_BN.clone())
        return real(backbone, adapter, context_BN, *args, **kwargs)

    monkeypatch.setattr(absorber.stream, "absorb_context", watched)
    list(TASK.measure(LoRA(CONFIG), inspect(model), planted, sink_id=sink_token(model, tokenizer)))
    assert len(contexts) == 3
    for number, context_BN in enumerate(contexts):
        assert torch.equal(context_BN, planted.token_ids_BT[:, 160 * number : 160 * (number + 1)])


def test_who_is_asked_what_and_with_what_in_view(planted, model, tokenizer, monkeypatch):
    """Age 1 is the context of the last round, age 3 that of two rounds before; only `full` sees it."""
    asked = []

    def watched(setting, prefix_BT, facts, wording, tokenize):
        asked.append((prefix_BT.clone(), facts, wording))
        return {"recall_exact": [0.0] * 4, "recall_nll": [1.0] * 4}

    monkeypatch.setattr(recall, "ask", watched)
    (checkpoint,) = TASK.measure(METHODS["truncation"], inspect(model), planted, sink_id=0)
    assert checkpoint.round == 3
    ids, found = planted.token_ids_BT, {}
    for prefix_BT, facts, wording in asked:
        place = next(at for at in range(3) if facts[0] == planted.facts[0][2 * at : 2 * at + 2])
        found.setdefault((place, wording), []).append(prefix_BT)
    assert set(found) == {(place, wording) for place in (0, 2) for wording in ("text", "other")}
    for (place, _), (full, contextless, windowed) in found.items():
        assert torch.equal(full, ids[:, 160 * place : 160 * (place + 1)])
        assert contextless.shape == (4, 0)  # two questions a stream
        assert torch.equal(windowed, ids[:, -64:].repeat_interleave(2, dim=0))


def test_a_reader_is_told_each_question_and_asked_that_one_after_it(planted, model, tokenizer, monkeypatch):
    class Echo(Reader):
        def windowed(self, questions=None):
            return torch.tensor([question[:20] for question in questions])

    class Echoing(Method):
        def begin(self, setting):
            return Echo(setting)

    seen = []

    def watched(setting, prefix_QT, asked, wording, tokenize):
        if prefix_QT.shape[1] == 20:
            seen.append([tokenize(fact.prompts[wording])[:20] for own in asked for fact in own])
            assert prefix_QT.tolist() == seen[-1]
        return {"recall_exact": [0.0] * 4, "recall_nll": [1.0] * 4}

    monkeypatch.setattr(recall, "ask", watched)
    list(TASK.measure(Echoing(), inspect(model), planted, sink_id=0))
    assert [len(questions) for questions in seen] == [4] * 4  # two ages in two wordings


def test_each_question_may_have_a_prefix_of_its_own(model, tokenizer, planted):
    where, asked = setting(model, tokenizer), [facts[:2] for facts in planted.facts]
    prefix_QT = torch.randint(40, 90, (4, 7), generator=torch.Generator().manual_seed(0))
    together = ask(where, prefix_QT, asked, "text", planted.guide.tokenize)["recall_nll"]
    for index, nll in enumerate(together):
        own = [[asked[index // 2][index % 2]]]
        alone = ask(where, prefix_QT[index : index + 1], own, "text", planted.guide.tokenize)["recall_nll"]
        assert alone == pytest.approx([nll], rel=1e-4)


def decoded_greedily(model, token_ids, count):
    """The slow twin: one token after another, no cache, no batch."""
    for _ in range(count):
        with torch.no_grad():
            token_ids = [*token_ids, int(model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].argmax())]
    return token_ids[-count:]


def test_an_answer_counts_if_greedy_decoding_gives_it(model, tokenizer):
    """Answers are made from what the model says; some are spoiled at their last token."""
    where, facts = setting(model, tokenizer), draw_facts(4, seed=0)
    prefix_BT = torch.randint(40, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    answers, expected, nlls = {}, [], []

    def tokenize(text):
        return answers.get(text) or tokenizer(text, add_special_tokens=False)["input_ids"]

    for index, fact in enumerate(facts):
        before = [where.sink_id, *prefix_BT[index // 2].tolist(), *tokenize("\n" + fact.prompts["text"])]
        answer = decoded_greedily(model, before, 2 + index)
        if index % 2:
            answer[-1] = (answer[-1] + 1) % 200
        answers[fact.answer] = answer
        expected.append(1.0 - index % 2)
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(dim=-1)
        nlls.append(-sum(float(logits[at, token]) for at, token in enumerate(answer)))
    found = ask(where, prefix_BT, [facts[:2], facts[2:]], "text", tokenize)
    assert found["recall_exact"] == expected
    assert found["recall_nll"] == pytest.approx(nlls, rel=1e-4)


def test_each_stream_answers_with_its_own_memory(model, tokenizer, planted):
    where = setting(model, tokenizer)
    nothing_BT = torch.zeros(2, 0, dtype=torch.long)
    asked = [facts[:2] for facts in planted.facts]
    before = ask(where, nothing_BT, asked, "text", planted.guide.tokenize)["recall_nll"]
    adapter = Adapter.fresh(where.backbone, CONFIG, num_streams=2)
    with torch.no_grad():
        for weight in adapter.up.values():
            weight[1] = 0.3
    with adapter.attached(where.backbone):
        after = ask(where, nothing_BT, asked, "text", planted.guide.tokenize)["recall_nll"]
    assert after[:2] == pytest.approx(before[:2])
    assert all(abs(own - old) > 0.01 for own, old in zip(after[2:], before[2:], strict=True))


def test_records_resume_and_are_shown(model, tokenizer, data_dir, tmp_path, monkeypatch):
    output = tmp_path / "records.jsonl"
    methods = {"truncation": METHODS["truncation"], "absorber": LoRA(CONFIG)}
    first = run_task(TASK, methods, model, tokenizer, data_dir=data_dir, output=output)
    again = []
    listener = Listener(say=again.append)
    found = run_task(TASK, methods, model, tokenizer, data_dir=data_dir, output=output, listener=listener)
    assert [record.key for record in found] == [record.key for record in first]
    assert sum("already measured" in line for line in again) == 2
    records = read_records(output)
    for record in records:
        if record.metric == "recall_exact" and record.config["fact_kind"] == "all":
            same = {
                other.config["fact_kind"]: other
                for other in records
                if (other.metric, other.method, other.round) == ("recall_exact", record.method, record.round)
                and all(other.config[name] == record.config[name] for name in ("age", "wording", "view"))
            }
            kinds = [other for kind, other in same.items() if kind != "all"]
            if kinds:
                total = sum(other.value * other.num_samples for other in kinds)
                assert total / sum(other.num_samples for other in kinds) == pytest.approx(record.value)
    heads, rows = recall_rows(records)
    assert [row[:5] for row in rows] == [
        ("books", "3", method, "0", age) for method in ("truncation", "absorber") for age in ("1", "3")
    ]
    assert all(len(row) == len(heads) for row in rows)
    assert len(set(heads)) == len(heads)  # they name the fields of an event
    draw_recall(records, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 1000

    failed = []
    monkeypatch.setattr(LoRA, "begin", lambda *args: (_ for _ in ()).throw(AbsorptionError("broken")))
    run_task(
        TASK,
        {"dcd": METHODS["dcd"], "sink": METHODS["sink"]},
        model,
        tokenizer,
        data_dir=data_dir,
        output=output,
        listener=Listener(on_failure=lambda name, error: failed.append(name)),
    )
    assert failed == ["dcd"]
    assert {record.method for record in read_records(output)} == {"truncation", "absorber", "sink"}


def test_the_share_is_of_what_full_attention_answers():
    from absorber.bench.task import Checkpoint

    metrics = {
        f"recall_exact/1/text/{view}": values
        for view, values in {"full": [1, 1, 1, 0], "contextless": [1, 0, 1, 0], "windowed": [0, 0, 0, 0]}.items()
    }
    facts = {"model": "m", "device": "cpu", "dtype": "float32", "versions": {}, "git": ""}
    records = TASK.to_records("x", {}, [Checkpoint(3, metrics, 0.0)], [], facts)
    shares = {record.config["view"]: record.value for record in records if record.metric == "recall_share"}
    assert shares == {"contextless": pytest.approx(2 / 3), "windowed": pytest.approx(0.0)}


def test_facts_need_room(model, tokenizer, data_dir):
    with pytest.raises(BenchmarkError, match="larger context_tokens"):
        Recall(num_rounds=1, num_streams=1, context_tokens=40, sync_tokens=8).prepare(model, tokenizer, data_dir)
