"""A round: what is undone and when, stream by stream; errors leave the adapter as it was; the sink is aligned."""

import copy

import pytest
import torch

import absorber.absorption
import absorber.lessons
from absorber import AbsorbConfig, ConfigError, ContextError, DeviceMemoryError, DivergedError, StreamConfig
from absorber.absorption import absorb_context
from absorber.adapter import Adapter
from absorber.backbone import inspect
from absorber.optimizer import new_optimizer
from absorber.stream import Stream

CONFIG = AbsorbConfig(rank=3, max_steps=3, learning_rate=2e-3, warmup_steps=0, hidden_weight=10.0)
RISING = CONFIG.replace(learning_rate=0.5, schedule="constant", gradient_clip=None)


def tokens(rows, length, seed=0):
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(backbone, adapter, config=CONFIG, **more):
    ids = tokens(adapter.num_streams, 24)
    return absorb_context(backbone, adapter, ids[:, :10], ids[:, 10:], config, sink_id=0, **more)


def same(adapter, snapshot):
    return all(map(torch.equal, adapter.snapshot(), snapshot))


def moments(optimizer):
    return [value.clone() for entry in optimizer.state_dict()["state"].values() for value in entry.values()]


def test_a_worse_round_is_undone_exactly(backbone):
    adapter = Adapter.fresh(backbone, CONFIG)
    run(backbone, adapter)
    before = adapter.snapshot()
    (result,) = run(backbone, adapter, RISING)
    assert result.outcome == "rolled_back_worse"
    assert result.rolled_back
    assert result.losses[-1] > result.losses[0]
    assert result.num_steps == 3
    assert same(adapter, before)


def test_the_papers_rollback_keeps_a_worse_finite_round(backbone):
    adapter = Adapter.fresh(backbone, CONFIG)
    before = adapter.snapshot()
    (result,) = run(backbone, adapter, RISING.replace(rollback="nonfinite"))
    assert result.outcome == "absorbed"
    assert result.losses[-1] > result.losses[0]
    assert not same(adapter, before)


@pytest.mark.parametrize("rollback", ["worse", "nonfinite"])
def test_a_round_that_is_not_finite_is_undone(backbone, rollback):
    adapter = Adapter.fresh(backbone, CONFIG)
    before = adapter.snapshot()
    (result,) = run(backbone, adapter, RISING.replace(learning_rate=1e30, rollback=rollback))
    assert result.outcome == "rolled_back_nonfinite"
    assert same(adapter, before)


@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_one_stream_is_undone_and_the_others_go_on(backbone, monkeypatch, poison):
    """The gradient of stream 1 is spoiled; streams 0 and 2 must end as if it were not there."""
    step = absorber.absorption.take_step

    def spoiled(optimizer, adapter, *rest):
        step(optimizer, adapter, *rest)
        with torch.no_grad():
            for weight in adapter.parameters():
                if poison_stream:
                    weight[1] = poison

    poison_stream = False
    monkeypatch.setattr(absorber.absorption, "take_step", spoiled)
    healthy = Adapter.fresh(backbone, CONFIG, num_streams=3)
    run(backbone, healthy)
    poison_stream = True
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=3)
    before = adapter.snapshot()
    results = run(backbone, adapter)
    assert [result.outcome for result in results][::2] == ["absorbed", "absorbed"]
    assert results[1].rolled_back
    for ours, old, good in zip(adapter.parameters(), before, healthy.parameters(), strict=True):
        assert torch.equal(ours[1], old[1])
        torch.testing.assert_close(ours[::2], good[::2], rtol=1e-4, atol=1e-6)


def test_a_stream_below_the_threshold_stops_alone(backbone):
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=3)
    first = [result.losses[0] for result in run(backbone, Adapter.fresh(backbone, CONFIG, num_streams=3))]
    lowest = min(range(3), key=lambda row: first[row])
    before = adapter.snapshot()
    results = run(backbone, adapter, CONFIG.replace(threshold=first[lowest] + 1e-4, weight_decay=0.1, max_steps=2))
    for row, result in enumerate(results):
        assert result.num_steps == (0 if row == lowest else 2)
        assert result.outcome == ("below_threshold" if row == lowest else "absorbed")
        stayed = all(torch.equal(ours[row], old[row]) for ours, old in zip(adapter.parameters(), before, strict=True))
        assert stayed == (row == lowest)


@pytest.mark.parametrize("bad", [RISING, RISING.replace(learning_rate=1e30)])
def test_the_carried_optimizer_is_undone_too(backbone, bad):
    adapter = Adapter.fresh(backbone, CONFIG)
    optimizer = new_optimizer(adapter.parameters(), CONFIG)
    for _ in range(2):  # at first without a state, then with one
        before, state = adapter.snapshot(), moments(optimizer)
        (result,) = run(backbone, adapter, bad, optimizer=optimizer)
        assert result.rolled_back
        assert same(adapter, before)
        assert len(state) == len(moments(optimizer))
        assert all(map(torch.equal, state, moments(optimizer)))
        run(backbone, adapter, optimizer=optimizer)


def test_one_streams_carried_moments_are_undone_alone(backbone, monkeypatch):
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=2)
    optimizer = new_optimizer(adapter.parameters(), CONFIG)
    run(backbone, adapter, optimizer=optimizer)
    before = {weight: optimizer.state[weight]["exp_avg"].clone() for weight in adapter.parameters()}
    note = absorber.absorption._roll_back

    def worse(results, *args):
        results[0].losses[-1] = results[0].losses[0] + 1
        note(results, *args)

    monkeypatch.setattr(absorber.absorption, "_roll_back", worse)
    results = run(backbone, adapter, optimizer=optimizer)
    assert [result.rolled_back for result in results] == [True, False]
    for weight, old in before.items():
        assert torch.equal(optimizer.state[weight]["exp_avg"][0], old[0])
    assert any(not torch.equal(optimizer.state[weight]["exp_avg"][1], old[1]) for weight, old in before.items())


def test_a_model_that_gives_nan_is_refused_before_the_first_step(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    backbone = inspect(broken)
    adapter = Adapter.fresh(backbone, CONFIG)
    before = adapter.snapshot()
    with pytest.raises(DivergedError, match="before the first step"):
        run(backbone, adapter)
    assert same(adapter, before)


@pytest.mark.parametrize("at_step", [0, 2])
def test_no_room_on_the_device(backbone, monkeypatch, at_step):
    adapter = Adapter.fresh(backbone, CONFIG)
    optimizer = new_optimizer(adapter.parameters(), CONFIG)
    run(backbone, adapter, optimizer=optimizer)
    before, state = adapter.snapshot(), moments(optimizer)
    step, calls = absorber.absorption.take_step, []

    def full(*args):
        calls.append(1)
        if len(calls) > at_step:
            raise torch.OutOfMemoryError("no room")
        step(*args)

    monkeypatch.setattr(absorber.absorption, "take_step", full)
    with pytest.raises(DeviceMemoryError, match="Make sync_tokens, context_tokens or rank smaller"):
        run(backbone, adapter, optimizer=optimizer)
    assert same(adapter, before)
    assert all(map(torch.equal, state, moments(optimizer)))
    assert all(weight.grad is None for weight in adapter.parameters())


@pytest.mark.parametrize(("teacher", "asked_again"), [("base", False), ("memory", True)])
def test_the_base_is_asked_once_of_each_text(backbone, monkeypatch, teacher, asked_again):
    """A round's own text is asked for in its own time; later rounds that train on it know the answer."""
    config = AbsorbConfig(rank=2, max_steps=8, anchor_texts=2, anchor_tokens=6, teacher=teacher)
    stream = Stream(
        backbone, Adapter.fresh(backbone, config), config, StreamConfig(context_tokens=8, sync_tokens=12), sink_id=0
    )
    asked, teach = [], absorber.absorption.teach

    def counted(backbone, adapter, context_BN, subsequent_BM, *args, **more):
        asked.append((context_BN.tolist(), subsequent_BM.tolist()))
        return teach(backbone, adapter, context_BN, subsequent_BM, *args, **more)

    monkeypatch.setattr(absorber.absorption, "teach", counted)
    stream.append(torch.randint(1, 90, (1, 20 + 8 * 12), generator=torch.Generator().manual_seed(0)))
    rounds = [texts for texts in asked if texts[0][0]]
    assert stream.num_rounds == 13
    assert len({str(texts) for texts in rounds}) == 13
    assert (len(rounds) > 13) == asked_again
    anchors = [texts for texts in asked if not texts[0][0]]
    assert len(anchors) == 1  # both texts, in one order or the other


@pytest.mark.parametrize("num_streams", [1, 3])
def test_what_was_kept_is_what_would_be_said(backbone, monkeypatch, num_streams):
    """Rounds whose teacher is always asked end with the same weights."""
    config = AbsorbConfig(rank=2, max_steps=8, anchor_texts=3, anchor_tokens=6, learning_rate=2e-3)
    sizes = StreamConfig(context_tokens=8, sync_tokens=12)
    ends = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(absorber.lessons.Lesson, "taught", lambda lesson, target, **more: _say(lesson, target))
        adapter = Adapter.fresh(backbone, config, num_streams=num_streams)
        stream = Stream(backbone, adapter, config, sizes, sink_id=0)
        stream.append(torch.randint(1, 90, (num_streams, 20 + 8 * 9), generator=torch.Generator().manual_seed(0)))
        ends.append(adapter.snapshot())
    for kept, asked in zip(*ends, strict=True):
        torch.testing.assert_close(kept, asked, rtol=1e-4, atol=1e-6)


def _say(lesson, target):
    lesson.target = target


def test_the_sink_is_never_scored_and_stands_before_both(backbone):
    """With the context empty of information, teacher and student read the same: their distance is zero."""
    seen = []
    hook = backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    ids = tokens(1, 24)
    for sink in ("shared", "none"):
        config = CONFIG.replace(sink=sink, max_steps=1)
        absorb_context(backbone, Adapter.fresh(backbone, config), ids[:, :10], ids[:, 10:], config, sink_id=77)
    hook.remove()
    teacher, student, last, *plain = seen
    assert teacher == [77, *ids[0].tolist()]
    assert student == last == [77, *ids[0, 10:].tolist()]
    assert plain == [sequence[1:] for sequence in (teacher, student, last)]


def test_steps_are_reported_before_they_are_taken(backbone):
    adapter, told = Adapter.fresh(backbone, CONFIG, num_streams=2), []
    results = run(backbone, adapter, on_step=lambda step, loss_B: told.append((step, loss_B.tolist())))
    assert [step for step, _ in told] == [0, 1, 2, 3]
    for row, result in enumerate(results):
        assert [losses[row] for _, losses in told] == result.losses
        assert result.seconds > 0


@pytest.mark.parametrize(("context", "subsequent"), [(0, 10), (10, 0), (10, 1)])
def test_an_empty_part_is_refused(backbone, context, subsequent):
    with pytest.raises(ContextError, match="a round needs a context and two subsequent tokens"):
        absorb_context(
            backbone,
            Adapter.fresh(backbone, CONFIG),
            tokens(1, context),
            tokens(1, subsequent),
            CONFIG,
            sink_id=0,
        )


def test_sizes_that_do_not_fit_are_refused(backbone):
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=2)
    with pytest.raises(ContextError, match="2 streams; got a batch of 1"):
        absorb_context(backbone, adapter, tokens(1, 5), tokens(1, 5), CONFIG, sink_id=0)
    with pytest.raises(ConfigError, match="larger than the 8192 positions"):
        absorb_context(backbone, adapter, tokens(2, 8000), tokens(2, 192), CONFIG, sink_id=0)
    with pytest.raises(ConfigError, match="hidden_layers must be between 0 and 2"):
        run(backbone, adapter, CONFIG.replace(hidden_layers=(3,), hidden_weight=1.0))
