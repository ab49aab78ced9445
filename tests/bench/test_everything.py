"""Everything in one run: resumed, with what failed named, and a page made of it."""

import dataclasses

import pytest

from absorber.bench import made_up
from absorber.bench.ablation import Ablation, cells
from absorber.bench.everything import TASKS, Everything, Failure, Meter
from absorber.bench.methods import METHODS, LoRA, Reader
from absorber.bench.methods.truncation import Truncation
from absorber.bench.quick import smaller, smaller_methods
from absorber.bench.records import read_records
from absorber.bench.report import make_report, read_all
from absorber.bench.report_page import to_html
from absorber.config import AbsorbConfig
from absorber.errors import AbsorptionError, BenchmarkError, ConfigError


class Broken(Truncation):
    """Reads well enough, and then cannot speak."""

    def __init__(self, error):
        self.error = error

    def begin(self, setting):
        broken = self.error

        class Failing(Reader):
            def speaking(self):
                raise broken

        return Failing(setting)


@pytest.fixture
def everything(model, tokenizer, tmp_path):
    folder = made_up.write(tmp_path / "data")
    methods = {name: METHODS[name] for name in ("truncation", "absorber")}
    return Everything(
        model=model,
        tokenizer=tokenizer,
        methods=methods,
        output=tmp_path / "records.jsonl",
        data_dir=folder,
        quick=True,
        device="cpu",
    )


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("ablation", "latency")])
def test_a_task_is_run_once_and_reported(everything, task):
    progress = []
    run = dataclasses.replace(everything, on_progress=lambda *told: progress.append((*told[:2], told[2].done)))
    outcome = run.run([task])
    assert outcome.failures == []
    assert outcome.measured[task] == len(progress) >= 2
    assert [done for *_, done in progress] == list(range(1, len(progress) + 1))
    records = read_records(run.output)
    assert {record.task for record in records} == {task}
    again = everything.run([task])
    assert (again.measured[task], again.known[task]) == (0, len(progress))
    assert read_records(run.output) == records
    assert task in to_html(make_report(read_all([run.output])))


def test_what_fails_is_named_and_ends_nothing(everything):
    failing = {"broken": Broken(AbsorptionError("no more")), "full device": Broken(RuntimeError("out of memory"))}
    run = dataclasses.replace(everything, methods={**failing, "truncation": METHODS["truncation"]})
    outcome = run.run(["reasoning", "summary"])
    assert outcome.failures == [
        Failure(task, what, kind, message)
        for task in ("reasoning", "summary")
        for what, kind, message in (
            ("broken", "AbsorptionError", "no more"),
            ("full device", "RuntimeError", "out of memory"),
        )
    ]
    assert outcome.measured == {"reasoning": 1, "summary": 1}
    assert {record.method for record in read_records(run.output)} == {"truncation"}


def test_a_task_that_cannot_begin_is_named_and_the_next_one_runs(everything, tmp_path):
    run = dataclasses.replace(everything, data_dir=tmp_path / "data" / "none")
    outcome = run.run(["icl", "cost"])
    ((failure),) = outcome.failures
    assert (failure.task, failure.what) == ("icl", "")
    assert "there is no ag_news" in failure.message
    assert outcome.measured["cost"] > 0
    without = dataclasses.replace(everything, data_dir=None).run(["retention"])
    assert "--data-dir" in without.failures[0].message


def test_unknown_names_are_errors(everything):
    with pytest.raises(ConfigError, match="there is no task songs"):
        everything.run(["songs"])
    with pytest.raises(ConfigError, match=r"unknown setting loud in \[icl\]"):
        dataclasses.replace(everything, settings={"icl": {"loud": 1}}).run(["icl"])
    everything.output.write_text("{}\n")
    assert everything.run(["icl"]).failures[0].kind == BenchmarkError.__name__


def test_the_time_left_is_that_of_what_was_measured():
    now = iter([0.0, 8.0, 20.0, 30.0])
    meter = Meter(10, clock=lambda: next(now))
    meter.begin()
    assert meter.seconds_left is None
    for is_new in (False, True, False, True):
        meter.count(is_new=is_new)
    assert meter.seconds_left == pytest.approx(8 / 2 * 6)
    meter.count(is_new=False)
    assert meter.seconds_left == pytest.approx(20 / 2 * 5)


def test_quick_makes_rounds_and_windows_small_and_leaves_none_out():
    assert smaller(AbsorbConfig(max_steps=1)).max_steps == 1
    for name, method in smaller_methods(METHODS).items():
        assert method.config().keys() == METHODS[name].config().keys()
        assert not isinstance(method, LoRA) or method.absorb_config.max_steps <= 2
    task = Ablation(num_tokens=32, context_tokens=32, sync_tokens=48)
    found, usual = cells(task, num_layers=2, quick=True), cells(task, num_layers=2)
    assert [cell.name for cell in found] == [cell.name for cell in usual]
    assert max(cell.task.context_tokens + cell.task.sync_tokens for cell in found) == 64 + 128
    assert max(cell.config.max_steps for cell in found) == 2
