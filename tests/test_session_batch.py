"""Sessions of different length and age that share rounds end as each would alone."""

import operator

import pytest
import torch

import absorber.session_batch
from absorber import AbsorbConfig, ConfigError, ContextError, DivergedError, Session, SessionBatch, StreamConfig
from absorber.absorption import Earlier, absorb_context
from absorber.adapter import Adapter
from absorber.lessons import Anchors, Past
from absorber.optimizer import new_optimizer, take_step
from architectures import build

STREAM = StreamConfig(context_tokens=8, sync_tokens=12)
CONFIG = AbsorbConfig(
    rank=3,
    max_steps=5,
    learning_rate=2e-3,
    warmup_steps=1,
    segments=(1, 2),
    replay_rounds=3,
    replay_share=0.5,
    anchor_share=0.4,
    anchor_texts=4,
    anchor_tokens=6,
    settling_rounds=2,
)
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness"
PARTS = [
    (TEXT[:100], TEXT[::-1][:21], "", TEXT[5:]),  # by call one text for each session
    ("", TEXT[40:90], TEXT[::2], TEXT[10:11]),
    (TEXT[::-1], TEXT[3:40], TEXT[3:60], ""),
]


def begin(model, tokenizer, config=CONFIG, count=4):
    return [Session(model, tokenizer, config, STREAM) for _ in range(count)]


def lines(session):
    return [(line.number, line.context_tokens, line.num_steps, line.outcome) for line in session.memory.ledger]


@pytest.fixture
def rows_read(model):
    """Rows of each pass through the model that is differentiated."""
    rows = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            rows.append(len(kwargs["input_ids"]))

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    handle.remove()


@pytest.mark.parametrize("teacher", ["base", "memory"])
@pytest.mark.parametrize("at_most", [None, 2])
def test_each_learns_what_it_would_learn_alone(model, tokenizer, rows_read, teacher, at_most):
    config = CONFIG.replace(teacher=teacher)
    together, alone = begin(model, tokenizer, config), begin(model, tokenizer, config)
    batch = SessionBatch(together, at_most=at_most)
    for texts in PARTS:
        assert batch.append(texts) == [len(text) for text in texts]
    most = max(rows_read)
    for texts in PARTS:
        for session, text in zip(alone, texts, strict=True):
            session.append(text)
    assert most > 1
    assert len({session.memory.num_rounds for session in alone}) > 2  # of different age
    for ours, own in zip(together, alone, strict=True):
        assert ours.window_ids == own.window_ids
        assert lines(ours) == lines(own)
        for mine, theirs in zip(ours.memory.adapter.parameters(), own.memory.adapter.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)
        assert ours.ask("who?", max_new_tokens=4) == own.ask("who?", max_new_tokens=4)


@pytest.mark.parametrize(
    "changes",
    [{"study": "light", "study_tokens": 4, "study_cue": 1, "study_passages": 1}, {"optimizer_state": "carry"}],
)
def test_what_belongs_to_a_single_stream_is_absorbed_alone(model, tokenizer, changes, rows_read):
    config = CONFIG.replace(anchor_share=0.0, segments=(1,), **changes)
    together, alone = begin(model, tokenizer, config, 2), begin(model, tokenizer, config, 2)
    SessionBatch(together).append([TEXT[:40], TEXT[5:45]])
    for session, text in zip(alone, [TEXT[:40], TEXT[5:45]], strict=True):
        session.append(text)
    for ours, own in zip(together, alone, strict=True):
        assert all(map(torch.equal, ours.memory.adapter.parameters(), own.memory.adapter.parameters()))


def test_a_stream_that_stops_leaves_the_work(backbone, rows_read):
    config = CONFIG.replace(anchor_share=0.0, segments=(1,), replay_rounds=0, threshold=0.0, hidden_weight=1.0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (3, 20), generator=draw)
    texts = (ids[:, :8], ids[:, 8:])
    losses = [r.losses[0] for r in absorb_context(backbone, adapter(backbone, config), *texts, config, sink_id=0)]
    between = config.replace(threshold=sorted(losses)[0] + 1e-6)  # the first one is below it at once
    rows_read.clear()
    results = absorb_context(backbone, adapter(backbone, between), *texts, between, sink_id=0)
    assert [result.num_steps for result in results].count(0) == 1
    assert rows_read == [3, *[2] * (between.max_steps - 1)]


def adapter(backbone, config):
    return Adapter.fresh(backbone, config, num_streams=3)


def test_each_stream_has_its_own_rate():
    from absorber.backbone import inspect

    backbone = inspect(build("llama"))
    for name in ("adamw", "sgd", "lion", "muon"):
        config = CONFIG.replace(optimizer=name, weight_decay=0.1)
        ends = []
        for rates in ((0.01, 0.002, 0.005), (0.01,), (0.002,), (0.005,)):
            one = adapter(backbone, config)
            draw = torch.Generator().manual_seed(1)
            for weight in one.parameters():
                weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
                weight.grad = torch.randn(weight.shape, generator=draw)
            take_step(new_optimizer(one.parameters(), config), one, torch.ones(3, dtype=torch.bool), *rates)
            ends.append(one.snapshot())
        for index in range(3):
            for mixed, alone in zip(ends[0], ends[1 + index], strict=True):
                torch.testing.assert_close(mixed[index], alone[index], rtol=1e-5, atol=1e-6)


def test_an_interruption_loses_nothing(model, tokenizer, monkeypatch):
    together, alone = begin(model, tokenizer, count=2), begin(model, tokenizer, count=2)
    batch, calls = SessionBatch(together), []
    usual = absorber.session_batch.absorb_together

    def interrupted(streams, joined):
        calls.append(len(streams))
        if len(calls) == 2:
            raise KeyboardInterrupt
        usual(streams, joined)

    monkeypatch.setattr(absorber.session_batch, "absorb_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.append([TEXT[:60], TEXT[1:61]])
    batch.append(["", ""])
    for ours, own, text in zip(together, alone, [TEXT[:60], TEXT[1:61]], strict=True):
        own.append(text)
        assert ours.window_ids == own.window_ids
        assert lines(ours) == lines(own)


def test_bad_batches(model, tokenizer):
    one, other = begin(model, tokenizer, count=2)
    with pytest.raises(ContextError, match="2 sessions; got 1"):
        SessionBatch([one, other]).append(["a"])
    with pytest.raises(ConfigError, match="twice"):
        SessionBatch([one, one])
    with pytest.raises(ConfigError, match="at_most"):
        SessionBatch([one, other], at_most=0)
    stranger = begin(absorber.load("tiny")[0], tokenizer, count=1)
    with pytest.raises(ConfigError, match="share a model"):
        SessionBatch([one, *stranger])
    SessionBatch([]).append([])


def test_streams_of_one_age_share_every_step(backbone, rows_read):
    """So that it costs what a batch of equal streams costs."""
    config = CONFIG.replace(segments=(1,))
    draw = torch.Generator().manual_seed(0)
    ids, anchors = torch.randint(1, 90, (3, 20), generator=draw), torch.randint(1, 90, (4, 6), generator=draw)
    past = [Past(ids[:1, :8], ids[:1, 8:])]
    absorb_context(
        backbone,
        adapter(backbone, config),
        ids[:, :8],
        ids[:, 8:],
        config,
        sink_id=0,
        earlier=[Earlier(past, Anchors(anchors), 4) for _ in range(3)],
    )
    assert len(rows_read) == config.max_steps
    assert all(rows % 3 == 0 for rows in rows_read)


def test_watching_a_round_changes_nothing_even_where_a_stream_breaks(backbone):
    """The first stream learns so fast that it is soon not finite; the second, much older, at 1e-3."""
    config = CONFIG.replace(segments=(1,), learning_rate=1e15, settling_rounds=1, anchor_share=0.0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (3, 20), generator=draw)
    ages = [Earlier(round_number=1), Earlier(round_number=10**36), Earlier(round_number=10**36)]

    def run(rows, on_step=None):
        one = Adapter.fresh(backbone, config, num_streams=len(rows))
        earlier = [ages[row] for row in rows]
        texts = ids[rows, :8], ids[rows, 8:]
        results = absorb_context(backbone, one, *texts, config, sink_id=0, earlier=earlier, on_step=on_step)
        return results, one

    (broken, *well), ours = run([0, 1, 2])
    watched, theirs = run([0, 1, 2], on_step=lambda step, loss_B: None)
    alone, own = run([1, 2])
    assert broken.outcome == "rolled_back_nonfinite"
    assert 0 < broken.num_steps < config.max_steps
    assert not any(up[0].any() for up in ours.up.values())
    for result, other in zip([broken, *well], watched, strict=True):
        assert (result.num_steps, result.outcome) == (other.num_steps, other.outcome)
        assert str(result.losses) == str(other.losses)  # which may hold nan
    for result, other in zip(well, alone, strict=True):
        assert result.num_steps == other.num_steps == config.max_steps
        assert result.losses == pytest.approx(other.losses, rel=1e-4)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    for mixed, single in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mixed[1:], single, rtol=1e-3, atol=1e-6)


def test_a_session_that_is_at_fault_does_not_keep_others(model, tokenizer):
    together, alone = begin(model, tokenizer, count=3), begin(model, tokenizer, count=3)
    with torch.no_grad():
        list(together[1].memory.adapter.up.values())[-1].fill_(float("nan"))
    texts = [TEXT[:60], TEXT[1:61], TEXT[2:70]]
    with pytest.raises(DivergedError, match="before the first step"):
        SessionBatch(together).append(texts)
    assert together[1].memory.num_rounds == 0
    for place in (0, 2):
        alone[place].append(texts[place])
        assert together[place].window_ids == alone[place].window_ids
        assert lines(together[place]) == lines(alone[place])


def test_memories_of_another_rank_are_absorbed_beside(model, tokenizer):
    """One was begun with study, and goes on without; its adapter has more ranks than that of a fresh one."""
    studied = CONFIG.replace(study="light", study_tokens=4, study_cue=1, study_passages=1, study_rank=2)
    first = Session(model, tokenizer, studied, STREAM)
    first.append(TEXT[:21])
    first = Session(model, tokenizer, studied.replace(study="off"), STREAM, memory=first.memory)
    others = begin(model, tokenizer, studied.replace(study="off"), 2)
    SessionBatch([first, *others]).append([TEXT[:40]] * 3)
    assert [session.memory.num_rounds for session in (first, *others)] == [1 + 3, 3, 3]


def test_weights_for_a_batch_are_kept_while_kinds_take_turns(model, tokenizer):
    sessions = [*begin(model, tokenizer, count=2), *begin(model, tokenizer, CONFIG.replace(max_steps=4), 2)]
    batch = SessionBatch(sessions)
    batch.append([TEXT[:30]] * 4)
    kept = list(batch._joined.values())
    batch.append([TEXT[:30]] * 4)
    assert len(kept) == 2
    assert all(map(operator.is_, batch._joined.values(), kept))


@pytest.mark.parametrize("name", ["lion", "muon", "sgd"])
def test_the_carried_moments_of_a_stopped_stream_stay(backbone, name):
    config = CONFIG.replace(optimizer=name, weight_decay=0.1)
    one = adapter(backbone, config)
    optimizer, draw = new_optimizer(one.parameters(), config), torch.Generator().manual_seed(1)

    def step(running):
        for weight in one.parameters():
            weight.grad = torch.randn(weight.shape, generator=draw)
        take_step(optimizer, one, torch.tensor(running), 0.01)
        return [value.clone() for state in optimizer.state.values() for value in state.values() if value.dim() == 3]

    before, weights = step([True, True, True]), one.snapshot()
    after = step([True, False, True])
    for old, new in (*zip(before, after, strict=True), *zip(weights, one.parameters(), strict=True)):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
