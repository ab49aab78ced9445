"""Latency and cost on tiny models: every cell has its records, is measured once, and may fail by itself."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from absorber.backbone import inspect
from absorber.bench import latency, speed
from absorber.bench.cost import Cost, step_flops
from absorber.bench.families.trunk import TrunkForCausalLM
from absorber.bench.geometry import GEOMETRIES, build_geometry, geometry_config
from absorber.bench.latency import Latency
from absorber.bench.records import read_records
from absorber.bench.speed import Cell, Figure, Sheet, break_even, milliseconds, speed_rows
from absorber.config import AbsorbConfig
from absorber.errors import BenchmarkError, ConfigError

ABSORB = AbsorbConfig(rank=2, max_steps=2, replay_rounds=2, anchor_texts=2, anchor_tokens=8)
SMALL = {"num_tokens": 4, "context_tokens": 8, "sync_tokens": 16, "absorb": ABSORB, "repeats": 1}


@pytest.fixture(scope="module")
def shape():
    return inspect(build_geometry("tiny", device="cpu", dtype="float32"))


@pytest.fixture
def sheet(tmp_path):
    def new(task="latency", **more):
        place = {"device": torch.device("cpu"), "dtype": torch.float32, "output": tmp_path / "records.jsonl"}
        return Sheet(task=task, model="tiny", seed=0, **place, **more)

    return new


def test_every_cell_of_latency_is_measured_once(shape, sheet):
    task, said = Latency(lengths=(12, 60), batches=(1, 2), **SMALL), []
    first = sheet(say=said.append)
    first.fill(task.cells(shape))
    cells = {(record.method, record.config["batch"], record.context_length) for record in first.records}
    for batch in (1, 2):
        for method in ("absorber", "truncation", "full", "full-eager"):
            assert {(method, batch, 12), (method, batch, 60)} <= cells
        assert {("absorber-round", batch, 24), ("absorber-parts", batch, 24)} <= cells
    assert ("absorber-merged", 1, 60) in cells
    assert ("absorber-merged", 2, 60) not in cells
    metrics = {record.metric for record in first.records if record.method == "absorber"}
    decoding = {"ms_per_token", "first_token_seconds", "window_again_ms"}
    assert metrics == {*decoding, "absorb_ms_per_token", "ms_per_token_with_absorption"}
    assert not first.failures
    assert all(record.value >= 0 and record.config["weights"] == "random" for record in first.records)
    again = sheet()
    again.fill(task.cells(shape))
    assert [record.value for record in again.records] == [record.value for record in first.records]
    assert len(read_records(first.output)) == len(first.records)
    heads, rows = speed_rows(first.records)
    assert all(len(row) == len(heads) for row in rows)


def test_what_absorbing_adds_to_a_token(shape, sheet):
    done = sheet()
    done.fill(Latency(lengths=(60,), batches=(1,), **SMALL).cells(shape, ("absorber-round", "absorber")))
    found = {
        (record.method, record.metric): record.value
        for record in done.records
        if record.config.get("checkpointing") != "always"
    }
    whole = found["absorber", "ms_per_token_with_absorption"]
    assert whole == pytest.approx(found["absorber", "ms_per_token"] + found["absorber", "absorb_ms_per_token"])
    again = found["absorber", "window_again_ms"] / SMALL["context_tokens"]
    rounds = [r.value / SMALL["context_tokens"] for r in done.records if r.metric == "round_ms"]
    assert found["absorber", "absorb_ms_per_token"] == pytest.approx(min(rounds) + again)


def test_windows_do_not_grow():
    task = Latency(**SMALL)
    assert [task.window(length) for length in (5, 19, 20, 24, 1000)] == [5, 19, 20, 20, 20]


@pytest.mark.parametrize("family", ["mamba", "ttt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_has_a_state_has_no_window(sheet, family, dtype):
    backbone = inspect(build_geometry(f"{family}-tiny", device="cpu", dtype=dtype))
    done = sheet()
    done.fill(Latency(lengths=(12,), batches=(1,), **SMALL).cells(backbone))
    assert {(record.method, record.metric) for record in done.records} == {
        (family, "ms_per_token"),
        (family, "recorded"),
    }
    with pytest.raises(BenchmarkError, match="cannot be measured"):
        list(Latency(**SMALL).cells(backbone, ("absorber",)))


@pytest.mark.parametrize(
    ("full", "said"),
    [
        ({1000: 4.0, 2000: 6.0, 3000: 8.0}, "about 1500"),
        ({1000: 4.0, 2000: 4.5, 3000: 4.9}, "not up to 3000"),
        ({1000: 6.0, 2000: 7.0}, "1000 or fewer"),
        ({1000: 4.0, 2000: None, 3000: None}, "2000, where full attention has no room"),
        (
            {2000: 9.0, 4000: 1.0, 3000: 4.0, 5000: 9.0},
            "about 4500",
        ),  # for good; where only one was measured says nothing
    ],
)
def test_where_full_attention_has_lost(full, said, sheet):
    desk = sheet()
    times = {"full": full, "absorber": dict.fromkeys((1000, 2000, 3000, 4000, 5000, 9000), 5.0)}
    for method, metric in (("full", "ms_per_token"), ("absorber", "ms_per_token_with_absorption")):
        for length, value in times[method].items():
            figure = Figure("out_of_memory", (1.0,), "") if value is None else Figure(metric, (value,), "ms")
            desk.fill([Cell(method, length, {"batch": 1}, lambda figure=figure: [figure])])
    assert break_even(desk.records) == [("tiny", "absorber", "1", said)]


def test_cost_against_its_references(shape, sheet):
    before = {name: weight.clone() for name, weight in shape.model.state_dict().items()}
    done = sheet("cost")
    done.fill(Cost(Latency(batches=(1, 2), **SMALL)).cells(shape))
    found = {(record.method, record.config["batch"], record.metric): record.value for record in done.records}
    for batch in (1, 2):
        ours, theirs = (found[method, batch, "absorbed_tokens_per_second"] for method in ("absorber", "peft-lora"))
        assert found["absorber", batch, "times_peft-lora"] == pytest.approx(ours / theirs)
        assert 0 < found["absorber", batch, "mfu"] < 1
    assert ("one-by-one", 1, "round_ms") not in found
    assert ("absorber-ages", 1, "round_ms") not in found
    assert found["absorber-ages", 2, "round_ms"] > 0
    assert found["absorber", 2, "times_one-by-one"] > 0
    assert found["absorber", 2, "times_peft-one-by-one"] > 0
    speeds = [found[method, 2, "absorbed_tokens_per_second"] for method in ("absorber", "peft-one-by-one")]
    assert found["absorber", 2, "times_peft-one-by-one"] == pytest.approx(speeds[0] / speeds[1])
    assert all(torch.equal(weight, before[name]) for name, weight in shape.model.state_dict().items())
    assert not any(weight.requires_grad for weight in shape.model.parameters())


def test_streams_of_a_round_are_of_one_age_or_of_many(shape, monkeypatch):
    seen, usual = [], latency.absorb_context
    monkeypatch.setattr(
        latency, "absorb_context", lambda *args, **more: seen.append(more["earlier"]) or usual(*args, **more)
    )
    desk = latency.Desk(Latency(batches=(3,), **SMALL), shape, 3)
    desk.round("never")
    desk.round("never", of_all_ages=True)
    same, different = seen[0], seen[-1]
    assert same.past[0].context_BN.shape[0] == 3
    assert [one.past[0].context_BN.shape[0] for one in different] == [1, 1, 1]
    assert len({one.round_number for one in different}) == 3


class Operations(TorchDispatchMode):
    """Counts floating-point operations as torch's own counter does, whose tracker of modules stumbles over our loss."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_operations_of_a_step_are_those_that_torch_counts(shape):
    from absorber.adapter import Adapter
    from absorber.lessons import Lesson, Part
    from absorber.student import gradients
    from absorber.teacher import teach

    adapter = Adapter.fresh(shape, ABSORB)
    ids = torch.randint(1, 257, (1, 72), generator=torch.Generator().manual_seed(0))
    lesson = Lesson(ids[:, :8], ids[:, 8:], 0, (1,))
    with adapter.attached(shape), Operations() as counter:
        lesson.target = teach(shape, adapter, lesson.context_BN, lesson.subsequent_BM, ABSORB, sink_id=0)
        counter.total = 0
        gradients(shape, adapter, adapter.snapshot(), [Part(lesson, None, own=True)], ABSORB, sink_id=0, step=0)
    attention = 3.5 * 2 * 65**2 * 32 * 2  # torch does not count that of a CPU
    assert step_flops(shape, ABSORB, num_streams=1, num_tokens=65) - attention == pytest.approx(counter.total, rel=0.05)


def test_a_run_survives_what_does_not_fit_and_what_fails(sheet):
    def full():
        raise torch.OutOfMemoryError("no room")

    def broken():
        raise RuntimeError("illegal")

    work = lambda: [Figure("ms_per_token", (1.0, 3.0, 2.0), "ms")]  # noqa: E731
    cells = [Cell(name, 5, {"batch": 1, "name": name}, run) for name, run in (("a", full), ("b", broken), ("c", work))]
    done = sheet()
    done.fill(cells)
    assert [(record.method, record.metric, record.value) for record in done.records] == [
        ("a", "out_of_memory", 1.0),
        ("c", "ms_per_token", 2.0),
    ]
    assert done.failures == ["b, 1 x 5 tokens"]
    _, rows = speed_rows(done.records)
    assert "out of memory" in rows[0]


def test_no_cell_is_begun_after_its_time(sheet, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    said = []
    done = sheet(say=said.append)
    done.fill(
        [Cell(name, 5, {"batch": 1, "name": name}, lambda: [Figure("x", (1.0,), "")]) for name in "abcd"], seconds=35
    )
    assert 0 < len(done.records) < 4
    assert "left out" in said[-1]


def test_warm_ups_are_not_timed():
    calls = []
    taken = milliseconds(torch.device("cpu"), lambda: calls.append(1), repeats=3, warm_ups=2)
    assert (len(taken), len(calls)) == (3, 5)


@pytest.mark.parametrize("change", [{"lengths": ()}, {"batches": (0,)}, {"num_tokens": 0}, {"sync_tokens": 1}])
def test_bad_numbers(change):
    with pytest.raises(ConfigError, match="1 or more"):
        Latency(**change)


def test_geometries():
    sizes = {
        "llama2-7b": 6.738e9,
        "qwen3-4b": 4.022e9,
        "smollm2-135m": 1.345e8,
        "mamba-2.8b": 2.768e9,
        "mamba-130m": 1.29e8,
    }
    for name, size in {"ttt-7b": 6.738e9, "ttt-1.3b": 1.3e9}.items():
        with torch.device("meta"):
            model = TrunkForCausalLM(geometry_config(name))
        assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(size, rel=0.03)
    for name, size in sizes.items():
        with torch.device("meta"):
            model = __import__("transformers").AutoModelForCausalLM.from_config(geometry_config(name))
        assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(size, rel=0.01)
    assert {"tiny", "mamba-tiny"} <= set(GEOMETRIES)
    with pytest.raises(ConfigError, match="there is no geometry"):
        geometry_config("llama9")
    weights = [build_geometry("tiny", device="cpu", dtype="float32").lm_head.weight for _ in range(2)]
    assert torch.equal(*weights)
