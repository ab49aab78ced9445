"""Asking streams that were read once, against a model that reads each row alone, without a cache."""

import importlib

import pytest
import torch

from absorber.adapter import Adapter
from absorber.backbone import inspect
from absorber.bench.reading import Reading, choice_nll, continuation_nll, write_greedily
from absorber.config import AbsorbConfig
from architectures import ARCHITECTURES, build

PREFIX_BT = torch.randint(1, 200, (3, 9), generator=torch.Generator().manual_seed(3))
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def logits_alone(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float()


def written_alone(model, token_ids, count):
    token_ids = list(token_ids)
    for _ in range(count):
        token_ids.append(int(logits_alone(model, token_ids)[-1].argmax()))
    return token_ids[-count:]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_write_what_each_writes_alone(name):
    model = build(name)
    reading = Reading.of(inspect(model), PREFIX_BT, sink_id=0)
    for _ in range(2):  # the reading stays as it was
        written = write_greedily(reading, PROMPTS, max_new_tokens=7, is_done=lambda ids: False)
        expected = [
            written_alone(model, [0, *prefix, *prompt], 7)
            for prefix, prompt in zip(PREFIX_BT.tolist(), PROMPTS, strict=True)
        ]
        assert written == expected


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_row_may_stand_several_times(name):
    """What each then writes is what it writes alone, with its own memory; the reading stays as it was."""
    backbone = inspect(build(name))
    adapter = Adapter.fresh(backbone, AbsorbConfig(rank=2), num_streams=3)
    with torch.no_grad():
        for weight in adapter.up.values():
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    with adapter.attached(backbone):
        reading = Reading.of(backbone, PREFIX_BT, sink_id=0)
        turns = [PROMPTS, PROMPTS[::-1]]
        alone = [write_greedily(reading, turn, max_new_tokens=5, is_done=lambda ids: False) for turn in turns]
        both = [prompt for pair in zip(*turns, strict=True) for prompt in pair]
        wide = write_greedily(reading.widened(2), both, max_new_tokens=5, is_done=lambda ids: False)
        assert wide[::2] == alone[0]
        assert wide[1::2] == alone[1]
        assert write_greedily(reading, PROMPTS, max_new_tokens=5, is_done=lambda ids: False) == alone[0]


def test_a_wide_copy_stays_small(model, monkeypatch):
    module = importlib.import_module("absorber.bench.reading")
    reading = Reading.of(inspect(model), PREFIX_BT, sink_id=0)
    assert reading.width > 100
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in reading._cache.layers)
    for times in (1, 3):
        monkeypatch.setattr(module, "_WIDE_BYTES", times * held + 1)
        assert reading.width == times
    monkeypatch.setattr(module, "_WIDE_BYTES", 0)
    assert reading.width == 1
    assert Reading(inspect(model)).width == 1
    assert Reading.of(inspect(build("mamba")), PREFIX_BT, sink_id=0).width == 1  # its cache cannot be repeated


def test_a_row_stops_when_it_is_done(model):
    reading = Reading.of(inspect(model), PREFIX_BT, sink_id=0)
    long = write_greedily(reading, PROMPTS, max_new_tokens=6, is_done=lambda ids: False)
    stop = long[1][2]
    short = write_greedily(reading, PROMPTS, max_new_tokens=6, is_done=lambda ids: ids[-1] == stop)
    for own, whole in zip(short, long, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 6
        assert own == whole[:end]
    assert len(short[1]) <= 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "mamba"])
def test_a_continuation_is_as_likely_as_alone(name):
    model = build(name)
    reading = Reading.of(inspect(model), PREFIX_BT, sink_id=0)
    rows = list(zip(PROMPTS, [[20, 21], [22, 23, 24, 25], [26]], strict=True))
    for _ in range(2):
        found = continuation_nll(reading, rows)
        for prefix, (prompt, answer), value in zip(PREFIX_BT.tolist(), rows, found, strict=True):
            before = [0, *prefix, *prompt]
            log_p = logits_alone(model, before + answer).log_softmax(dim=-1)
            expected = -sum(float(log_p[len(before) - 1 + at, token]) for at, token in enumerate(answer))
            assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_choices_are_as_likely_as_continuations(name, monkeypatch):
    reading = Reading.of(inspect(build(name)), PREFIX_BT, sink_id=0)
    choices = [[20], [21, 22, 23], [24], [21, 22, 25], [21, 26]]
    passes, real = [], Reading.fork
    monkeypatch.setattr(Reading, "fork", lambda self: passes.append(1) or real(self))
    found = choice_nll(reading, PROMPTS, choices)
    assert len(passes) == 3
    for index, choice in enumerate(choices):
        expected = continuation_nll(reading, [(prompt, choice) for prompt in PROMPTS])
        assert [row[index] for row in found] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba"])
def test_a_long_prefix_is_read_in_pieces(name, monkeypatch):
    from absorber.bench import reading as module

    model = build(name)
    whole = continuation_nll(Reading.of(inspect(model), PREFIX_BT, sink_id=0), [(p, [7]) for p in PROMPTS])
    monkeypatch.setattr(module, "_PIECE_TOKENS", 4)
    pieces = continuation_nll(Reading.of(inspect(model), PREFIX_BT, sink_id=0), [(p, [7]) for p in PROMPTS])
    assert pieces == pytest.approx(whole, rel=1e-4)


def test_each_row_answers_with_its_own_memory(model):
    backbone = inspect(model)
    adapter = Adapter.fresh(backbone, AbsorbConfig(rank=2), num_streams=3)
    with torch.no_grad():
        for weight in adapter.up.values():
            weight[1] = 0.3
    rows = [(prompt, [30, 31]) for prompt in PROMPTS]
    before = continuation_nll(Reading.of(backbone, PREFIX_BT, sink_id=0), rows)
    with adapter.attached(backbone):
        after = continuation_nll(Reading.of(backbone, PREFIX_BT, sink_id=0), rows)
    assert [after[0], after[2]] == pytest.approx([before[0], before[2]], rel=1e-4)
    assert abs(after[1] - before[1]) > 0.01
