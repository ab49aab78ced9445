"""The window: however the input is cut, the same rounds; nothing lost, doubled or out of order, interrupted or not."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import absorber.stream
from absorber import AbsorbConfig, ConfigError, ContextError, StreamConfig
from absorber.absorption import Earlier, RoundResult, absorb_context
from absorber.adapter import Adapter
from absorber.backbone import inspect
from absorber.optimizer import new_optimizer
from absorber.stream import Stream
from absorber.subsequent import write_from_nothing

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
LENGTHS = st.lists(st.integers(0, 40), max_size=8)
SIZES = st.tuples(st.integers(1, 9), st.integers(2, 9))
CONFIG = AbsorbConfig(
    rank=2, max_steps=2, learning_rate=2e-3, warmup_steps=0, segments=(1,), replay_rounds=0, anchor_share=0.0
)
ALL = CONFIG.replace(
    max_steps=5, segments=(1, 3), replay_rounds=2, replay_share=0.6, anchor_share=0.4, anchor_texts=3, anchor_tokens=4
)
"""With replay and anchors."""
STUDY = ALL.replace(
    study="light",
    study_rank=2,
    study_steps=3,
    study_passages=1,
    study_tokens=4,
    study_cue=1,
    study_past=1,
    study_rounds=3,
)
"""With study as well."""


class Interrupted(BaseException):
    """Like KeyboardInterrupt, no Exception."""


class Absorbed:
    """Stands in for `absorb_context`: writes the rounds down, and fails at those that it is told to."""

    def __init__(self, failing=()):
        self.rounds, self.num_generated, self.given, self.numbers = [], [], [], []
        self.failing, self.calls = set(failing), 0

    def __call__(self, backbone, adapter, context_BN, subsequent_BM, *args, **kwargs):
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise Interrupted
        self.rounds.append((context_BN.tolist(), subsequent_BM.tolist()))
        self.num_generated.append(kwargs["num_generated"])
        earlier = kwargs["earlier"]
        self.given.append((list(earlier.past), earlier.anchors))
        self.numbers.append(earlier.round_number)
        return [RoundResult(losses=[1.0, 0.5]) for _ in range(context_BN.shape[0])]


def make(backbone, sizes, *, num_streams=1, config=CONFIG, **more):
    stream = StreamConfig(context_tokens=sizes[0], sync_tokens=sizes[1], read_tokens=16)
    adapter = Adapter.fresh(backbone, config, num_streams=num_streams)
    return Stream(backbone, adapter, config, stream, sink_id=0, **more)


def tokens(length, num_streams=1):
    """Different tokens, so that order and repetition show."""
    return torch.stack([torch.arange(length) + 1000 * (row + 1) for row in range(num_streams)])


@QUICK
@given(lengths=LENGTHS, sizes=SIZES, num_streams=st.integers(1, 3))
def test_any_way_of_cutting_gives_the_same_rounds(monkeypatch, backbone, lengths, sizes, num_streams):
    size, whole_BT = sum(sizes), tokens(sum(lengths), num_streams)
    absorbed = Absorbed()
    monkeypatch.setattr(absorber.stream, "absorb_context", absorbed)
    stream = make(backbone, sizes, num_streams=num_streams)
    for part_BT in whole_BT.split(lengths, dim=1) if lengths else ():
        stream.append(part_BT)
        assert stream.window_BT.shape[1] < size
        assert stream.pending_BT.shape[1] == 0
    expected, left_BT = [], whole_BT
    while left_BT.shape[1] >= size:
        expected.append((left_BT[:, : sizes[0]].tolist(), left_BT[:, sizes[0] : size].tolist()))
        left_BT = left_BT[:, sizes[0] :]
    assert absorbed.rounds == expected
    assert stream.window_BT.tolist() == left_BT.tolist()
    assert stream.num_rounds == len(expected)


@QUICK
@given(lengths=LENGTHS, sizes=SIZES, failing=st.sets(st.integers(0, 12), max_size=5))
def test_an_interruption_loses_nothing(monkeypatch, backbone, lengths, sizes, failing):
    absorbed = Absorbed(failing)
    monkeypatch.setattr(absorber.stream, "absorb_context", absorbed)
    stream, whole_BT, given_tokens = make(backbone, sizes), tokens(sum(lengths)), 0
    for length in lengths:
        part_BT = whole_BT[:, given_tokens : given_tokens + length]
        given_tokens += length
        try:
            stream.append(part_BT)
        except Interrupted:
            assert stream.window_BT.shape[1] == sum(sizes)
        held = [token for context, _ in absorbed.rounds for token in context[0]]
        held += stream.window_BT[0].tolist() + stream.pending_BT[0].tolist()
        assert held == whole_BT[0, :given_tokens].tolist()
    absorbed.failing = set()
    stream.append(whole_BT[:, :0])
    undisturbed = Absorbed()
    monkeypatch.setattr(absorber.stream, "absorb_context", undisturbed)
    twin = make(backbone, sizes)
    twin.append(whole_BT)
    assert absorbed.rounds == undisturbed.rounds
    assert torch.equal(stream.window_BT, twin.window_BT)


@QUICK
@given(length=st.integers(0, 60), sizes=SIZES)
def test_flush_absorbs_every_token_once_and_no_generated_one(monkeypatch, backbone, length, sizes):
    absorbed, prefixes = Absorbed(), []

    def written(backbone, adapter, prefix_ids, num_tokens, **kwargs):
        prefixes.append(prefix_ids)
        return [7] * num_tokens

    monkeypatch.setattr(absorber.stream, "absorb_context", absorbed)
    monkeypatch.setattr(absorber.stream, "generate_subsequent", written)
    stream, whole_BT = make(backbone, sizes), tokens(length)
    stream.append(whole_BT)
    already = len(absorbed.rounds)
    stream.flush(eos_ids={0}, generator=torch.Generator())
    assert [token for context, _ in absorbed.rounds for token in context[0]] == whole_BT[0].tolist()
    assert stream.window_BT.shape[1] == 0
    for (context, subsequent), prefix in zip(absorbed.rounds[already:], prefixes, strict=True):
        assert len(subsequent[0]) == sizes[1]
        real = [token for token in subsequent[0] if token != 7]
        assert subsequent[0] == real + [7] * (sizes[1] - len(real))
        assert prefix == [0, *context[0], *real]
    told = [subsequent[0].count(7) for _, subsequent in absorbed.rounds]
    assert absorbed.num_generated == told


@pytest.mark.parametrize("optimizer_state", ["reset", "carry"])
def test_one_optimizer_for_the_stream_or_one_per_round(backbone, optimizer_state):
    config = CONFIG.replace(optimizer_state=optimizer_state)
    stream = make(backbone, (6, 9), config=config)
    stream.append(real_tokens(21))
    adapter = Adapter.fresh(backbone, config)
    carried = new_optimizer(adapter.parameters(), config)
    for number in (1, 2):
        ids = real_tokens(21)[:, 6 * number - 6 :][:, :15]
        optimizer = carried if optimizer_state == "carry" else None
        absorb_context(
            backbone,
            adapter,
            ids[:, :6],
            ids[:, 6:],
            config,
            sink_id=0,
            optimizer=optimizer,
            earlier=Earlier(round_number=number),
        )
    assert stream.num_rounds == 2
    assert all(map(torch.equal, stream.adapter.parameters(), adapter.parameters()))


@pytest.mark.parametrize("teacher_tokens", [1, 4, 100])
def test_the_teacher_reads_what_left_the_window_last(monkeypatch, backbone, teacher_tokens):
    absorbed = Absorbed()
    monkeypatch.setattr(absorber.stream, "absorb_context", absorbed)
    monkeypatch.setattr(absorber.stream, "generate_subsequent", lambda *args, **kwargs: [7] * args[3])
    config = StreamConfig(context_tokens=3, sync_tokens=5, teacher_tokens=teacher_tokens)
    stream = Stream(backbone, Adapter.fresh(backbone, CONFIG), CONFIG, config, sink_id=0)
    stream.append(tokens(20))
    stream.flush(eos_ids={0}, generator=torch.Generator())
    whole = tokens(20)[0].tolist()
    for number, (context, _) in enumerate(absorbed.rounds):
        first = 3 * number
        assert context[0] == whole[max(0, first - teacher_tokens) : first + 3]
    assert stream.num_rounds == 7
    assert stream.behind_BT[0].tolist() == whole[max(0, 20 - teacher_tokens) :]


def test_flush_takes_up_what_is_pending(monkeypatch, backbone):
    absorbed = Absorbed(failing={1})
    monkeypatch.setattr(absorber.stream, "absorb_context", absorbed)
    monkeypatch.setattr(absorber.stream, "generate_subsequent", lambda *args, **kwargs: [7, 7, 7])
    stream = make(backbone, (4, 3))
    with pytest.raises(Interrupted):
        stream.append(tokens(30))
    assert stream.pending_BT.shape[1]
    stream.flush(eos_ids={0}, generator=torch.Generator())
    assert [token for context, _ in absorbed.rounds for token in context[0]] == tokens(30)[0].tolist()


def real_tokens(length):
    return torch.randint(1, 257, (1, length), generator=torch.Generator().manual_seed(5))


def products(adapter):
    """What the adapter adds to each projection."""
    return [(adapter.up[name] @ adapter.down[name]).detach() for name in adapter.down]


@pytest.mark.parametrize("base", [CONFIG, ALL, STUDY], ids=["own_text", "replay_and_anchors", "study"])
@pytest.mark.parametrize("optimizer_state", ["reset", "carry"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("failing", [(0, 0), (1, 1), (2, 2), (3, 1)])
def test_continuing_after_an_interruption_ends_bit_for_bit_the_same(backbone, base, optimizer_state, error, failing):
    """Interrupted before step `failing[1]` of round `failing[0]`, in the middle of training."""
    config = base.replace(optimizer_state=optimizer_state)
    undisturbed = make(backbone, (6, 9), config=config)
    undisturbed.append(real_tokens(40))
    assert undisturbed.num_rounds == 5

    armed = True

    def on_step(step, loss_B):
        if armed and (stream.num_rounds, step) == failing:
            raise error

    stream = make(backbone, (6, 9), config=config, on_step=on_step)
    before = []
    stream._on_round = lambda rounds: before.append(products(stream.adapter))
    start = products(stream.adapter)
    with pytest.raises(error):
        stream.append(real_tokens(40))
    assert all(map(torch.equal, products(stream.adapter), before[-1] if before else start))
    armed = False
    stream.append(real_tokens(0))
    assert stream.num_rounds == 5
    assert torch.equal(stream.window_BT, undisturbed.window_BT)
    assert all(map(torch.equal, stream.adapter.parameters(), undisturbed.adapter.parameters()))
    kept, expected = (
        [part for past in each.reservoir.items for part in (past.context_BN, past.subsequent_BM)]
        for each in (stream, undisturbed)
    )
    assert len(kept) == 2 * config.replay_rounds
    assert all(map(torch.equal, kept, expected))
    assert len(stream.studied.items) == (3 if config.study == "light" else 0)
    for ours, theirs in zip(stream.studied.items, undisturbed.studied.items, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("config", [ALL, STUDY], ids=["replay_and_anchors", "study"])
def test_a_batch_of_streams_is_as_many_single_ones(model, config):
    """Over more rounds than the reservoir holds."""
    backbone = inspect(copy.deepcopy(model).double())
    token_ids = torch.randint(1, 257, (3, 60), generator=torch.Generator().manual_seed(6))
    batch = make(backbone, (6, 9), num_streams=3, config=config)
    batch.append(token_ids)
    assert batch.num_rounds == 8
    assert batch.anchors.texts_QA.shape == (3, 4)
    for row in range(3):
        single = make(backbone, (6, 9), config=config)
        single.append(token_ids[row : row + 1])
        assert torch.equal(single.anchors.texts_QA, batch.anchors.texts_QA)
        for ours, alone in zip(batch.reservoir.items, single.reservoir.items, strict=True):
            assert torch.equal(ours.context_BN[row : row + 1], alone.context_BN)
            assert torch.equal(ours.subsequent_BM[row : row + 1], alone.subsequent_BM)
        for ours, alone in zip(batch.adapter.parameters(), single.adapter.parameters(), strict=True):
            torch.testing.assert_close(ours[row], alone[0], rtol=1e-3, atol=1e-5)


def test_what_the_rounds_are_given_to_train_on(monkeypatch, backbone):
    """Earlier rounds of the stream and its anchors; nothing generated is ever replayed."""
    absorbed = Absorbed()
    monkeypatch.setattr(absorber.stream, "absorb_context", absorbed)
    monkeypatch.setattr(absorber.stream, "generate_subsequent", lambda *args, **kwargs: [7] * args[3])
    stream = make(backbone, (6, 9), config=ALL)
    stream.append(tokens(50))
    stream.flush(eos_ids={0}, generator=torch.Generator())
    real = [(x[0], [token for token in y[0] if token != 7]) for x, y in absorbed.rounds]
    for number, (past, anchors) in enumerate(absorbed.given):
        pairs = [(kept.context_BN[0].tolist(), kept.subsequent_BM[0].tolist()) for kept in past]
        assert len(pairs) == min(number, 2)
        assert all(pair in real[:number] for pair in pairs)
        assert torch.equal(anchors.texts_QA, write_from_nothing(backbone, ALL, sink_id=0))
    assert absorbed.numbers == list(range(1, len(real) + 1))
    plain = Absorbed()
    monkeypatch.setattr(absorber.stream, "absorb_context", plain)
    make(backbone, (6, 9)).append(tokens(50))
    assert all(past == [] and anchors is None for past, anchors in plain.given)


@pytest.mark.parametrize("teacher", ["base", "memory"])
def test_flush_lets_the_teacher_write(monkeypatch, backbone, teacher):
    """The text of the pristine base does not depend on the memory; that of the own memory does."""
    texts = []
    for strength in (0.0, 0.3):
        absorbed = Absorbed()
        monkeypatch.setattr(absorber.stream, "absorb_context", absorbed)
        stream = make(backbone, (6, 9), config=CONFIG.replace(teacher=teacher))
        with torch.no_grad():
            for weight in stream.adapter.up.values():
                weight.fill_(strength)
        stream.append(real_tokens(10))
        stream.flush(eos_ids={0}, generator=torch.Generator().manual_seed(0))
        texts.append(absorbed.rounds)
    assert (texts[0] == texts[1]) == (teacher == "base")


def test_bad_input(backbone):
    with pytest.raises(ConfigError, match="larger than the 8192 positions"):
        make(backbone, (4096, 4096))
    make(backbone, (4096, 4096), config=CONFIG.replace(sink="none"))
    stream = make(backbone, (4, 4), num_streams=2)
    with pytest.raises(ContextError, match="2 streams; got tokens for 1"):
        stream.append(tokens(3))
    with pytest.raises(ContextError, match="only a single stream"):
        stream.flush(eos_ids=set(), generator=torch.Generator())
