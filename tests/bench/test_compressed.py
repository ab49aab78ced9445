"""Compressed caches: the process that holds them, with a stand-in for kvpress, and with kvpress itself where it is."""

import math
import os
import sys

import pytest
import torch

from absorber.backbone import inspect
from absorber.bench import made_up
from absorber.bench.methods import METHODS, OUTSIDE, Compressed, Setting, compressed, method
from absorber.bench.methods import reader as reader_module
from absorber.bench.methods.compressed import ENVIRONMENT, Worker
from absorber.bench.reasoning import Reasoning
from absorber.bench.recall import Recall
from absorber.bench.retention import Retention
from absorber.bench.runner import Listener, run_task
from absorber.config import StreamConfig
from absorber.errors import BenchmarkError, ConfigError, MissingExtraError

# A press that keeps the first entry and the last ones, or everything.
STAND_IN = """
import contextlib
import sys

class SnapKVPress:
    def __init__(self, compression_ratio, window_size):
        self.ratio = compression_ratio
        print("a library that prints")

    @contextlib.contextmanager
    def __call__(self, model):
        def trim(module, args, kwargs, output):
            cache = kwargs.get("past_key_values") or kwargs.get("cache")
            layer = cache.layers[module.layer_idx]
            keep = {keep} or layer.keys.shape[2]
            keep = min(keep, int(layer.keys.shape[2] * (1 - self.ratio))) if {keep} else keep
            layer.keys, layer.values = (
                states[:, :, [0, *range(states.shape[2] - keep + 1, states.shape[2])]]
                for states in (layer.keys, layer.values)
            )
        hooks = [layer.self_attn.register_forward_hook(trim, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
"""
SIZES = {"num_rounds": 1, "num_streams": 2, "context_tokens": 100, "sync_tokens": 110}
TASKS = [
    Retention(**SIZES, passage_tokens=24),
    Recall(**SIZES, num_facts=1, ages=(1,)),
    Reasoning(**SIZES, max_new_tokens=3),
]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Install a kvpress that keeps so many entries at most; 0 for all of them."""

    def install(keep):
        (tmp_path / "kvpress.py").write_text(STAND_IN.replace("{keep}", str(keep)))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Compressed(press="snapkv", python=sys.executable)

    return install


@pytest.fixture
def data_dir(tmp_path):
    return made_up.write(tmp_path / "data")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_press_that_drops_nothing_is_full_attention(task, model, tokenizer, data_dir, stand_in):
    texts = task.prepare(model, tokenizer, data_dir)
    ((own,), (full,)) = (
        [checkpoint.metrics for checkpoint in task.measure(way, inspect(model), texts, sink_id=0)]
        for way in (stand_in(0), METHODS["full"])
    )
    assert own.keys() == full.keys()
    in_view = [name for name in own if "windowed" in name]
    assert in_view
    for name in in_view:
        assert own[name] == pytest.approx(full[name], abs=2e-4), name


def test_what_follows_sees_what_is_kept_where_it_stood(model, tokenizer, data_dir, stand_in):
    """As one pass in which the later tokens see the first entry, the last ones and each other."""
    task = TASKS[0]
    texts = task.prepare(model, tokenizer, data_dir)
    (found,) = task.measure(stand_in(10**6), inspect(model), texts, sink_id=0)
    num_read, kept = 211, 110  # with the sink; the last token is read after the others are dropped
    ids_BT = torch.cat([torch.zeros(2, 1, dtype=torch.long), texts.token_ids_BT[:, :234]], dim=1)
    sees_TT = torch.ones(len(ids_BT[0]), len(ids_BT[0])).tril().bool()
    sees_TT[num_read - 1 :, 1 : num_read - kept] = False
    mask = torch.zeros(sees_TT.shape).masked_fill(~sees_TT, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        logits = model(ids_BT, attention_mask=mask.expand(2, -1, -1, -1)).logits[:, num_read - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, num_read:].flatten(), reduction="none")
    assert found.metrics["windowed_nll"] == pytest.approx(nll.reshape(2, -1).mean(1).tolist(), abs=1e-4)
    (truncated,) = task.measure(METHODS["truncation"], inspect(model), texts, sink_id=0)
    assert found.metrics["contextless_nll"] == truncated.metrics["contextless_nll"]
    assert found.metrics["windowed_nll"] != truncated.metrics["windowed_nll"]


def test_of_a_text_longer_than_the_positions_the_end_is_read(backbone, stand_in, monkeypatch):
    monkeypatch.setattr(reader_module, "_RESERVED_TOKENS", backbone.max_positions - 30)
    setting = Setting(backbone=backbone, stream=StreamConfig(sync_tokens=8), sink_id=0, num_streams=1, seed=0)
    longer, shorter = (stand_in(0).begin(setting) for _ in range(2))
    try:
        ids_BT = torch.arange(2, 52)[None]
        for start in (0, 25):
            longer.read(ids_BT[:, start : start + 25])
        shorter.read(ids_BT[:, -30:])
        after_BT = torch.tensor([[5, 6, 7]])
        assert torch.equal(longer.reading().fork().read(after_BT), shorter.reading().fork().read(after_BT))
    finally:
        longer.close()
        shorter.close()


def test_a_fork_leaves_a_reading_as_it_was(backbone, stand_in):
    setting = Setting(backbone=backbone, stream=StreamConfig(sync_tokens=8), sink_id=0, num_streams=2, seed=0)
    reader = stand_in(10**6).begin(setting)
    try:
        reader.read(torch.arange(2, 42).reshape(2, 20))
        reading, ids_BT = reader.reading(), torch.tensor([[5, 6, 7], [8, 9, 10]])
        assert reader.kept_entries == [9, 9]  # m and the sink
        at_once = reading.fork().read(ids_BT)
        ahead = reading.fork()
        parts = [ahead.read(ids_BT[:, :1]), ahead.fork().read(ids_BT[:, 2:]), ahead.read(ids_BT[:, 1:])]
        assert torch.allclose(torch.cat([parts[0], parts[2]], dim=1), at_once, atol=1e-5)
        assert torch.equal(reading.fork().read(ids_BT), at_once)
    finally:
        reader.close()


def test_without_an_environment_it_says_how_to_make_one(backbone, monkeypatch, tmp_path):
    setting = Setting(backbone=backbone, stream=StreamConfig(), sink_id=0, num_streams=1, seed=0)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    for way in (method("snapkv"), method("kvzip").replace(python=str(tmp_path / "none"))):
        with pytest.raises(MissingExtraError, match=r"python3 -m venv kvpress .*kvpress==0\.5\.5"):
            way.begin(setting)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"lacks a package .*kvpress.*python3 -m venv"):
        Compressed(press="kvzip", python=sys.executable).begin(setting)
    with pytest.raises(ConfigError, match="press is one of snapkv, kvzip"):
        Compressed(press="flat")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('no such device')", "has ended: no such device"),
        ('print(\'{"error": "IndexError: too long"}\')', "kvpress cannot do this: IndexError: too long"),
        ("print('{\"shape\": [1, 4]}'); print(1)", "ended within a reply"),
    ],
)
def test_a_worker_that_fails_is_an_error_with_its_last_words(program, message, tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(program)
    monkeypatch.setattr(compressed, "WORKER", script)
    worker = Worker(sys.executable)
    with pytest.raises(BenchmarkError, match=message):
        worker.ask("begin")
    worker.close()
    assert not worker.is_running


def test_a_run_goes_on_without_it(model, tokenizer, data_dir, tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    failed = []
    records = run_task(
        TASKS[2],
        {"snapkv": OUTSIDE["snapkv"], "truncation": METHODS["truncation"]},
        model,
        tokenizer,
        data_dir=data_dir,
        output=tmp_path / "records.jsonl",
        listener=Listener(on_failure=lambda name, error: failed.append((name, type(error)))),
    )
    assert failed == [("snapkv", MissingExtraError)]
    assert {record.method for record in records} == {"truncation"}


def test_a_place_is_not_recorded():
    assert Compressed(press="kvzip", python="/somewhere/python").config() == {"press": "kvzip"}


@pytest.mark.skipif(not os.environ.get(ENVIRONMENT), reason=f"kvpress runs in an environment that {ENVIRONMENT} names")
@pytest.mark.parametrize("name", OUTSIDE)
def test_kvpress_itself(name, backbone, tokenizer, model):
    """Whole entries, or those of single heads, as many as the window; what is kept is not only the last of them."""
    from absorber.notes import make_guide

    stream = StreamConfig(context_tokens=8, sync_tokens=32)
    guide = make_guide(tokenizer, model)
    setting = Setting(backbone=backbone, stream=stream, sink_id=0, num_streams=2, seed=0, guide=guide)
    reader = OUTSIDE[name].begin(setting)
    try:
        reader.read(torch.randint(1, 250, (2, 80), generator=torch.Generator().manual_seed(0)))
        reading = reader.reading()
        assert reader.kept_entries == pytest.approx([33, 33], abs=0.5)
        states = reading.predict(torch.tensor([[5, 6], [7, 8]]))
        assert states.shape == (2, 2, 32)
        assert math.isfinite(float(states.sum()))
    finally:
        reader.close()
