"""Retrieval: it finds what was planted, within the window's budget, and looks for nothing that it may not know."""

import builtins
import os
import subprocess
import sys

import pytest
import torch

from absorber.backbone import inspect, sink_token
from absorber.bench.methods import BM25, METHODS, Setting, method
from absorber.bench.retention import Retention
from absorber.config import StreamConfig
from absorber.errors import ConfigError, MissingExtraError

N, M, SIZE = 32, 64, 8


@pytest.fixture
def setting(backbone):
    stream = StreamConfig(context_tokens=N, sync_tokens=M)
    return Setting(backbone=backbone, stream=stream, sink_id=0, num_streams=2, seed=0)


@pytest.fixture
def read(setting):
    """A reader after ten rounds, and what it read: no token comes twice."""
    generator = torch.Generator().manual_seed(0)
    text_BT = torch.stack([first + torch.randperm(M + 10 * N, generator=generator) for first in (1000, 2000)])
    reader = BM25(passage_tokens=SIZE).begin(setting)
    reader.read(text_BT[:, :M])
    for start in range(M, text_BT.shape[1], N):
        reader.read(text_BT[:, start : start + N])
    return reader, text_BT


def holds(row, part):
    row, part = row.tolist(), part.tolist()
    return any(row[start : start + len(part)] == part for start in range(len(row) - len(part) + 1))


@pytest.mark.parametrize("place", [0, 3, 101, 10 * N - SIZE // 2])  # the last is where the window begins
def test_the_passage_asked_for_stands_before_a_shorter_window(read, place):
    reader, text_BT = read
    wanted_BT = text_BT[:, place : place + SIZE // 2]
    found_BT = reader.windowed(wanted_BT.tolist())
    assert found_BT.shape == (2, M)
    assert torch.equal(found_BT[:, M // 2 :], text_BT[:, -M // 2 :])
    for row, wanted in zip(found_BT[:, : M // 2], wanted_BT, strict=True):
        assert holds(row, wanted)
    alone_BT = reader.contextless(wanted_BT.tolist())
    assert alone_BT.shape == (2, M // 2)
    assert all(holds(row, wanted) for row, wanted in zip(alone_BT, wanted_BT, strict=True))


def test_it_logs_nothing(read, caplog):
    """The package has its own logger at DEBUG, which any handler of the root shows."""
    reader, text_BT = read
    reader.windowed(text_BT[:, :4].tolist())
    assert not caplog.records


def test_what_is_found_is_older_text_of_the_own_stream_in_its_order(read):
    reader, text_BT = read
    query_BT = text_BT[:, [200, 90, 10, 150, 10 * N - 1, 10 * N + 5]]
    for found_BT, end in (
        (reader.windowed(query_BT.tolist())[:, : M // 2], -M // 2),
        (reader.contextless(query_BT.tolist()), -M),
    ):
        for row, own in zip(found_BT, text_BT[:, :end].tolist(), strict=True):
            starts = [own.index(int(token)) for token in row[::SIZE]]
            assert starts == sorted(starts)
            assert row.tolist() == [token for start in starts for token in own[start : start + SIZE]]


def test_without_a_question_the_end_of_the_window_is_looked_for(setting):
    text_BT = torch.randint(1000, 9000, (2, M + 4 * N), generator=torch.Generator().manual_seed(1))
    text_BT[:, 40 : 40 + SIZE] = text_BT[:, -SIZE:]
    reader = BM25(passage_tokens=SIZE).begin(setting)
    reader.read(text_BT)
    found_BT = reader.windowed()
    assert found_BT.shape == (2, M)
    for row, wanted in zip(found_BT[:, : M // 2], text_BT[:, -SIZE:], strict=True):
        assert holds(row, wanted)
    assert reader.contextless().shape == (2, 0)


def test_nothing_is_looked_for_before_something_has_left_the_window(setting):
    text_BT = torch.arange(2 * M).reshape(2, M)
    reader = BM25(passage_tokens=SIZE).begin(setting)
    reader.read(text_BT)
    assert torch.equal(reader.windowed([[1], [2]]), text_BT)
    assert reader.contextless([[1], [2]]).shape == (2, 0)
    reader.read(text_BT[:, :2])
    assert reader.windowed([[1], [2]]).shape == (2, M)
    assert reader.contextless([[1], [2]]).tolist() == text_BT[:, :2].tolist()


def test_other_methods_give_the_same_with_and_without_a_question(setting):
    text_BT = torch.arange(2 * M).reshape(2, M)
    for name in ("full", "truncation", "sink"):
        reader = method(name).begin(setting)
        reader.read(text_BT)
        for view in (reader.windowed, reader.contextless):
            assert torch.equal(view(), view([[1], [2]]))


@pytest.fixture
def data_dir(tmp_path):
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(120)]
        (tmp_path / f"book{book}.txt").write_text("".join(lines))
    return tmp_path


def test_retention_lets_it_look_for_the_window_alone(model, tokenizer, data_dir, monkeypatch):
    """The passage to be scored is never part of a query, and alone it stands after nothing."""
    task = Retention(num_rounds=2, num_streams=2, context_tokens=16, sync_tokens=32, passage_tokens=16)
    texts = task.prepare(model, tokenizer, data_dir, drift_kinds=())
    queries, best = [], type(METHODS["bm25"].begin(_setting(task, model, tokenizer)))._best

    def watched(self, text, query):
        queries.append((list(text), list(query)))
        return best(self, text, query)

    monkeypatch.setattr("absorber.bench.methods.bm25._BM25Reader._best", watched)
    sink = sink_token(model, tokenizer)
    own, none = (
        list(task.measure(METHODS[name], inspect(model), texts, sink_id=sink)) for name in ("bm25", "truncation")
    )
    assert len(queries) == 4
    for index, (text, query) in enumerate(queries):
        row, end = texts.token_ids_BT[index % 2].tolist(), 32 + 16 * (1 + index // 2)
        assert (text, query) == (row[: end - 16], row[end - 16 : end])
    for one, other in zip(own, none, strict=True):
        assert one.metrics["contextless_nll"] == other.metrics["contextless_nll"]
        assert one.metrics["windowed_nll"] != other.metrics["windowed_nll"]


def _setting(task, model, tokenizer):
    return Setting(
        backbone=inspect(model), stream=task.stream, sink_id=sink_token(model, tokenizer), num_streams=2, seed=0
    )


@pytest.mark.parametrize("values", [{"passage_tokens": 1}, {"share": 1.0}, {"share": 0.0}, {"query_tokens": 0}])
def test_bad_settings_are_errors(values):
    with pytest.raises(ConfigError, match="passage_tokens is 2 or more"):
        BM25(**values)


def test_without_the_package_the_error_says_what_to_install(setting, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "bm25s":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'absorber\[bench\]'"):
        BM25().begin(setting)


def test_a_search_takes_nothing_of_a_gpu(tmp_path):
    """JAX, which bm25s imports where it finds it, takes most of the device's memory when it is imported."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('JAX was imported')")
    code = "import sys; from absorber.bench.methods.bm25 import _index; _index(); assert 'jax' not in sys.modules"
    place = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": place})
