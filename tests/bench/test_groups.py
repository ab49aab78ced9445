"""Streams measured in groups: the same figures as in one batch, and a run that was ended goes on after those done."""

import dataclasses

import pytest

from absorber.bench import made_up
from absorber.bench.groups import Unfinished, joined
from absorber.bench.icl import InContext
from absorber.bench.methods import METHODS, LoRA
from absorber.bench.methods.truncation import Truncation
from absorber.bench.quick import smaller
from absorber.bench.reasoning import Reasoning
from absorber.bench.recall import Recall
from absorber.bench.records import read_records
from absorber.bench.retention import Retention
from absorber.bench.runner import Listener, run_task
from absorber.bench.summary import Summary
from absorber.bench.task import Checkpoint, Task
from absorber.errors import ConfigError

SIZES = {"num_rounds": 3, "num_streams": 5, "context_tokens": 60, "sync_tokens": 100}
ASKING = {**SIZES, "num_queries": 2}
TASKS = {
    "retention": Retention(**{**SIZES, "context_tokens": 16, "sync_tokens": 32}, passage_tokens=16),
    "recall": Recall(**{**SIZES, "context_tokens": 100, "sync_tokens": 48}, num_facts=1, ages=(1, 2)),
    "icl": InContext(**ASKING, num_classes=4),
    "reasoning": Reasoning(**ASKING, max_new_tokens=4),
    "summary": Summary(**ASKING, max_new_tokens=4),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return made_up.write(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(model, tokenizer, data_dir, tmp_path):
    def call(task, methods, name="records.jsonl", **options):
        return run_task(task, methods, model, tokenizer, data_dir=data_dir, output=tmp_path / name, **options)

    return call


def strong(name):
    """A method with few steps, and so large ones that streams, seeds and rounds show in the figures."""
    config = smaller(METHODS[name].absorb_config)
    return LoRA(config.replace(rank=4, learning_rate=1e-2, warmup_steps=0, anchor_share=0.3, rollback="nonfinite"))


def figures(records):
    """What was measured, sample by sample; where a method is compared with, its mean."""
    return {
        (record.task, record.method, record.metric, record.round, str(record.config)): record.per_sample
        or [record.value]
        for record in records
    }


def assert_same(one, other):
    one, other = figures(one), figures(other)
    assert one.keys() == other.keys()
    for key, values in one.items():
        assert other[key] == pytest.approx(values, rel=2e-4, abs=2e-4, nan_ok=True), key


@pytest.mark.parametrize("name", TASKS)
def test_groups_measure_what_one_batch_measures(name, run):
    methods = {
        "truncation": METHODS["truncation"],
        **{way: strong(way) for way in ("temp-lora", "absorber")},
    }
    whole, groups = run(TASKS[name], methods, "whole.jsonl"), run(TASKS[name], methods, "groups.jsonl", batch=2)
    assert_same(groups, whole)
    assert {record.num_samples for record in groups} <= {5, 2, 1, 3}  # kinds of facts have fewer


@pytest.mark.parametrize("change", ["streams", "seed"])
def test_other_streams_or_seeds_would_show(run, monkeypatch, change):
    """What the test above would say of a group that is not the same."""
    methods = {way: strong(way) for way in ("temp-lora", "absorber")}
    whole = run(TASKS["retention"], methods, "whole.jsonl")
    measure = Task.measure

    def other(self, method, backbone, texts, **rest):
        task, share = self, texts
        if change == "seed":
            task = dataclasses.replace(self, seed=len(texts.token_ids_BT))
        else:
            share = dataclasses.replace(texts, token_ids_BT=texts.token_ids_BT.flip(0))
        return measure(task, method, backbone, share, **rest)

    monkeypatch.setattr(Task, "measure", other)
    found = run(TASKS["retention"], methods, "groups.jsonl", batch=2)
    for method in methods:
        with pytest.raises(AssertionError):
            assert_same(
                [record for record in found if record.method == method],
                [record for record in whole if record.method == method],
            )


class Counting(Truncation):
    """Counts how many streams it was given, group by group; ends the run when it begins a certain group."""

    def __init__(self, ends_at=None):
        self.begun, self.ends_at = [], ends_at

    def begin(self, setting):
        if len(self.begun) == self.ends_at:
            raise KeyboardInterrupt
        self.begun.append(setting.num_streams)
        return super().begin(setting)


@pytest.mark.parametrize(("name", "batch", "rest"), [("icl", 2, [2, 1]), ("retention", 2, [2, 1]), ("icl", None, [3])])
def test_a_run_goes_on_after_the_groups_that_are_done(name, batch, rest, run, tmp_path):
    """Also with another batch."""
    undisturbed = run(TASKS[name], {"counting": Counting()}, "undisturbed.jsonl", batch=2)
    first, then = Counting(ends_at=1), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(TASKS[name], {"counting": first}, batch=2)
    assert first.begun == [2]
    (part,) = tmp_path.glob("*.part")
    run(dataclasses.replace(TASKS[name], seed=1), {"counting": Counting()}, "records.jsonl", batch=2)
    assert part.exists()  # other settings have another file
    found = run(TASKS[name], {"counting": then}, batch=batch)
    assert then.begun == rest
    (assert_same if batch is None else assert_equal)(found, undisturbed)
    written = [record for record in read_records(tmp_path / "records.jsonl") if record.seed == 0]
    assert_equal(written[-len(found) :], found)
    assert not list(tmp_path.glob("*.part"))


def assert_equal(one, other):
    """All but how long it took."""
    plain = [[repr(dataclasses.replace(record, seconds=0.0)) for record in records] for records in (one, other)]
    assert plain[0] == plain[1]


def test_what_is_recorded_is_not_measured_again_in_another_batch(run):
    run(TASKS["icl"], {"counting": Counting()}, batch=2)
    again, known = Counting(), []
    run(
        TASKS["icl"], {"counting": again}, batch=3, listener=Listener(on_known=lambda name, records: known.append(name))
    )
    assert (again.begun, known) == ([], ["counting"])


def test_a_group_that_fails_keeps_those_before(run):
    class Full(Counting):
        def begin(self, setting):
            if len(self.begun) == 1:
                raise RuntimeError("out of memory")
            return super().begin(setting)

    failed = []
    run(TASKS["icl"], {"m": Full()}, batch=3, listener=Listener(on_failure=lambda name, error: failed.append(name)))
    then = Counting()
    run(TASKS["icl"], {"m": then}, batch=1)
    assert (failed, then.begun) == (["m"], [1, 1])


def test_a_batch_has_a_stream(run):
    with pytest.raises(ConfigError, match="one stream or more"):
        run(TASKS["icl"], {}, batch=0)


def test_two_groups_are_put_together():
    one = [Checkpoint(1, {"nll": [0.1, float("nan")]}, 2.0, 7), Checkpoint(2, {"nll": [3.0, 4.0]}, 4.0, 7)]
    other = [Checkpoint(1, {"nll": [5.0]}, 1.0, 9), Checkpoint(2, {"nll": [6.0]}, 2.0, 5)]
    assert joined([], one) == one
    first, second = joined(one, other)
    assert repr(first) == repr(Checkpoint(1, {"nll": [0.1, float("nan"), 5.0]}, 3.0, 9))
    assert second == Checkpoint(2, {"nll": [3.0, 4.0, 6.0]}, 6.0, 7)


@pytest.mark.parametrize("damaged", ["", '{"num_streams": 2, "checkpo', "[]", '{"num_streams": 2}', "\x00"])
def test_what_is_kept_is_read_as_it_was_and_damage_counts_for_nothing(damaged, tmp_path):
    unfinished = Unfinished.beside(tmp_path / "new" / "records.jsonl", "0" * 64)
    assert unfinished.read() == (0, [])
    kept = [Checkpoint(1, {"nll": [0.1 + 0.2, float("nan")]}, 2.0, 7)]
    unfinished.write(2, kept)
    assert repr(unfinished.read()) == repr((2, kept))
    assert [path.name for path in unfinished.path.parent.iterdir()] == ["records.jsonl.0000000000000000.part"]
    unfinished.path.write_text(damaged)
    assert unfinished.read() == (0, [])
    unfinished.write(3, kept)
    assert unfinished.read()[0] == 3
    unfinished.remove()
    unfinished.remove()
    assert not unfinished.path.exists()
