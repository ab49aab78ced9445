"""Families on equal footing: parameters, order of data, causality, resumption, and what is measured of them."""

import dataclasses
import time

import pytest
import torch
from torch.nn import functional

from absorber.backbone import inspect
from absorber.bench.families import run as running
from absorber.bench.families.corpus import MARK, SEPARATOR, check_apart, read_corpus
from absorber.bench.families.measuring import measure_family, measure_method, prepare
from absorber.bench.families.run import Place, run_families
from absorber.bench.families.settings import Families
from absorber.bench.families.shapes import FAMILIES, SIZES, build_family, count_parameters
from absorber.bench.families.training import Stopped, learning_rate, train
from absorber.bench.methods import METHODS
from absorber.bench.records import read_records
from absorber.bench.report import make_report
from absorber.bench.report_layout import Gallery
from absorber.bench.runner import Listener
from absorber.errors import BenchmarkError, ConfigError
from family_texts import SMALL, write_books

CPU = torch.device("cpu")
TASK = Families.from_table(SMALL)
READERS = METHODS | {"absorber": METHODS["absorber"].replace(max_steps=2, rank=2, anchor_texts=2, anchor_tokens=8)}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return write_books(tmp_path_factory.mktemp("books"))


@pytest.fixture(scope="module")
def corpus(books):
    return read_corpus(books, books / "kept", vocabulary=TASK.vocabulary, split="report")


@pytest.fixture(scope="module")
def transformer(corpus, books):
    return train(TASK, "transformer", corpus, device=CPU, path=books / "kept" / "transformer.pt").model


def built(family, vocabulary=300):
    return build_family(family, "tiny", vocabulary=vocabulary, positions=128, seed=0).eval()


# --- Equality


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_equal(size):
    vocabulary = 300 if size == "tiny" else 8192
    counts = {
        family: count_parameters(build_family(family, size, vocabulary=vocabulary, positions=128, seed=0))
        for family in FAMILIES
    }
    assert max(counts.values()) < 1.05 * min(counts.values())
    if size != "tiny":
        assert counts["ttt"] == pytest.approx(float(size.removesuffix("m")) * 1e6, rel=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_causal_and_remembers(family):
    model = built(family)
    ids_BT = torch.randint(2, 300, (1, 90), generator=torch.Generator().manual_seed(0))
    other_BT = ids_BT.clone()
    other_BT[0, 40] += 1 if ids_BT[0, 40] < 299 else -1
    with torch.no_grad():
        first, second = (model(ids).logits[0] for ids in (ids_BT, other_BT))
    assert torch.allclose(first[:40], second[:40], atol=1e-5)
    assert not torch.allclose(first[40], second[40], atol=1e-4)
    # Further back than a mini-batch, or the taps of a convolution.
    assert not torch.allclose(first[70:], second[70:], atol=1e-7)


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before():
    first = built("ttt").state_dict()
    torch.rand(3)
    assert all(torch.equal(weight, first[name]) for name, weight in built("ttt").state_dict().items())


def test_unknown_families_and_sizes():
    with pytest.raises(ConfigError, match="a family is one of"):
        build_family("lstm", "tiny", vocabulary=300, positions=128, seed=0)


# --- Data


def rows_of(corpus, step, **changes):
    return corpus.batch(step, **({"rows": 4, "length": 64, "pair_share": 0.0, "seed": 0} | changes))


def test_an_epoch_has_every_row_once_and_the_next_another_order(corpus):
    per_epoch = (len(corpus.token_ids) - 63) // 63
    steps = [rows_of(corpus, step, rows=per_epoch) for step in range(2)]
    for ids_RT in steps:
        assert (ids_RT[:, 0] == SEPARATOR).all()
        assert len({tuple(row) for row in ids_RT.tolist()}) == per_epoch
    assert not torch.equal(*steps)
    assert torch.equal(rows_of(corpus, 5), rows_of(corpus, 5))
    assert not torch.equal(rows_of(corpus, 5), rows_of(corpus, 5, seed=1))
    assert torch.equal(rows_of(corpus, 0, rows=8)[4:], rows_of(corpus, 1))


def test_pairs_say_the_same_wherever_they_stand(corpus):
    ids_RT = rows_of(corpus, 0, rows=8, length=257, pair_share=0.25)
    assert (ids_RT == MARK).any(dim=1).sum() == 2
    for row in ids_RT[(ids_RT == MARK).any(dim=1)]:
        known: dict[int, list[int]] = {}
        for place in (row == MARK).nonzero().flatten().tolist():
            known.setdefault(int(row[place + 1]), []).append(int(row[place + 2]))
        assert len(known) == 4
        assert all(len(values) == 4 and len(set(values)) == 1 for values in known.values())


def test_scored_text_is_kept_out_of_training(books, tmp_path):
    scored = [(path.stem, path.read_text()) for path in (books / "novels").glob("book*.txt")]
    trained = {path.stem: path.read_text() for path in (books / "novels_train").glob("book*.txt")}
    check_apart(trained, scored)
    # An edition with other line ends and capitals is found too.
    hidden = trained | {"other_title": trained["book_0"] + scored[0][1].replace("\n", " ").upper()}
    with pytest.raises(BenchmarkError, match=f"{scored[0][0]} is among the training text, in other_title"):
        check_apart(hidden, scored)
    mixed = write_books(tmp_path / "mixed")
    (mixed / "novels_train" / "new.txt").write_text((mixed / "novels" / "book_1.txt").read_text())
    with pytest.raises(BenchmarkError, match="book_1 is among the training text, in new"):
        read_corpus(mixed, tmp_path, vocabulary=300, split="report")
    with pytest.raises(BenchmarkError, match="no novels_train"):
        read_corpus(tmp_path, tmp_path, vocabulary=300, split="report")


def test_the_tokenizer_never_sees_scored_text(books, corpus, tmp_path):
    other = write_books(tmp_path / "other")
    for path in (other / "novels").glob("book*.txt"):
        path.write_text(path.read_text()[::-1])
    again = read_corpus(other, tmp_path / "kept", vocabulary=TASK.vocabulary, split="report")
    assert again.digest == corpus.digest
    assert (again.token_ids == corpus.token_ids).all()
    assert again.tokenizer.get_vocab() == corpus.tokenizer.get_vocab()


# --- Training


@pytest.mark.parametrize("family", ["transformer", "mamba", "rnn", "ttt"])
def test_an_interrupted_training_ends_as_one_that_was_not(corpus, tmp_path, family):
    whole = train(TASK, family, corpus, device=CPU, path=tmp_path / "whole.pt")
    stops = 0
    while True:
        try:
            parts = train(TASK, family, corpus, device=CPU, path=tmp_path / "parts.pt", deadline=time.monotonic())
            break
        except Stopped:
            stops += 1
    assert stops == TASK.num_steps - 1
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    assert parts.progress.losses == whole.progress.losses
    assert parts.progress.data == whole.progress.data
    assert not (tmp_path / "parts.part").exists()


def test_what_is_trained_is_not_trained_again(corpus, tmp_path):
    path, points = tmp_path / "ttt.pt", []
    first = train(TASK, "ttt", corpus, device=CPU, path=path, on_point=points.append)
    assert points[-1] == TASK.num_steps
    again = train(TASK, "ttt", corpus, device=CPU, path=path, on_point=lambda step: pytest.fail("trained again"))
    assert again.progress == first.progress
    path.write_bytes(b"junk")
    with pytest.raises(BenchmarkError, match="Delete it"):
        train(TASK, "ttt", corpus, device=CPU, path=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(corpus, tmp_path, family):
    task = dataclasses.replace(TASK, tokens=256 * 30, learning_rate=1e-2, pair_share=0.0)
    losses = train(task, family, corpus, device=CPU, path=tmp_path / "checkpoint.pt").progress.losses
    assert losses[-1][1] < losses[0][1] - 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are recorded on CUDA")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_learns_what_a_usual_one_does(corpus, tmp_path, family, monkeypatch):
    task, said, device = dataclasses.replace(TASK, tokens=256 * 12), [], torch.device("cuda")
    recorded = train(task, family, corpus, device=device, path=tmp_path / "recorded.pt", say=said.append)
    assert not any("cannot be recorded" in line for line in said)
    monkeypatch.setattr("absorber.bench.families.training._WARM_UPS", 10**9)
    usual = train(task, family, corpus, device=device, path=tmp_path / "usual.pt")
    for (step, loss), (_, expected) in zip(recorded.progress.losses, usual.progress.losses, strict=True):
        assert loss == pytest.approx(expected, abs=0.02), step


def test_the_learning_rate_rises_and_falls():
    task = dataclasses.replace(TASK, tokens=256 * 100, learning_rate=1.0 - 1e-9)
    rates = [learning_rate(task, step) for step in range(task.num_steps)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


# --- Measuring


def test_nll_is_that_of_each_token_given_all_before_it(corpus, books, transformer):
    texts = prepare(TASK, corpus, books)
    measured = measure_family(TASK, transformer, texts)
    assert list(measured.nll) == list(range(0, 128, 16))
    for row in range(2):
        ids_T = torch.cat([torch.tensor([SEPARATOR]), texts.stream_BT[row, :48]])
        with torch.no_grad():
            logits = transformer(ids_T[None]).logits[0]
        expected = functional.cross_entropy(logits[32:48], ids_T[33:49])
        assert measured.nll[32][row] == pytest.approx(float(expected), abs=1e-4)


def test_a_window_knows_as_much_as_everything_until_it_is_full(corpus, books, transformer):
    texts = prepare(TASK, corpus, books)
    whole = measure_family(TASK, transformer, texts)
    measured = {
        name: measure_method(TASK, READERS[name], transformer, texts, corpus.tokenizer)
        for name in ("truncation", "absorber")
    }
    for name, found in measured.items():
        assert list(found.nll) == [32, 48, 64, 80, 96, 112], name
        assert found.nll[32] == pytest.approx(whole.nll[32], abs=1e-4)
        assert found.nll[112] != pytest.approx(whole.nll[112], abs=1e-4)
    assert measured["absorber"].nll[112] != pytest.approx(measured["truncation"].nll[112], abs=1e-5)


def test_pairs_stand_so_far_back(corpus, books):
    texts = prepare(TASK, corpus, books)
    for asked, distance in zip(texts.recall, TASK.distances, strict=True):
        assert (asked.read_BT.shape[1] - TASK.sync_tokens) % TASK.context_tokens == 0
        for read_T, asked_Q in zip(asked.read_BT, asked.asked_BQ, strict=True):
            places = (read_T == MARK).nonzero().flatten()
            planted = {tuple(read_T[place : place + 3].tolist()) for place in places}
            assert planted == {tuple(pair) for pair in asked_Q.view(-1, 3).tolist()}
            assert len(read_T) - int(places[-1]) >= distance
            assert len(read_T) - int(places[-1]) <= distance + 8
    with pytest.raises(BenchmarkError, match="raise scored_tokens"):
        prepare(dataclasses.replace(TASK, distances=(200,)), corpus, books)


class Copies(torch.nn.Module):
    """Predicts what followed the same two tokens before; it knows every pair that is in its input."""

    def __init__(self, tokenizer_size):
        super().__init__()
        self.head = torch.nn.Linear(tokenizer_size, tokenizer_size, bias=False)
        self.head.weight.data = torch.eye(tokenizer_size)

    def predicted(self, ids_BT):
        found = torch.zeros(*ids_BT.shape, self.head.in_features)
        for row, ids in enumerate(ids_BT.tolist()):
            seen = {}
            for place, token in enumerate(ids[1:], start=1):
                if (ids[place - 1], token) in seen:
                    found[row, place, seen[ids[place - 1], token]] = 1
                if place >= 2:
                    seen[ids[place - 2], ids[place - 1]] = token
        return found


def test_recall_counts_the_values_that_are_known(corpus, books, transformer, monkeypatch):
    copies = Copies(corpus.vocabulary)
    backbone = inspect(transformer)

    class Decoder(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return type("Output", (), {"last_hidden_state": copies.predicted(input_ids)})

    knowing = dataclasses.replace(backbone, decoder=Decoder(), head=copies.head)
    monkeypatch.setattr("absorber.bench.families.measuring.inspect", lambda model: knowing)
    texts = prepare(TASK, corpus, books)
    whole = measure_family(TASK, transformer, texts)
    assert whole.recall == {10: [1.0, 1.0], 60: [1.0, 1.0]}
    windowed = measure_method(TASK, METHODS["truncation"], transformer, texts, corpus.tokenizer)
    assert windowed.recall == {10: [1.0, 1.0], 60: [0.0, 0.0]}


# --- Whole runs


def place_in(books, tmp_path):
    return Place(books, tmp_path / "records.jsonl", tmp_path / "kept")


def test_a_run_and_its_report(books, tmp_path, monkeypatch):
    place, said = place_in(books, tmp_path), []
    listener = Listener(say=said.append)
    found = run_families(TASK, (), place, device=CPU, methods=READERS, listener=listener)
    assert {record.method for record in found} == {"transformer", "mamba", "rnn", "ttt", "truncation", "absorber"}
    for family in ("transformer", "mamba", "rnn", "ttt"):
        own = [record for record in found if record.method == family]
        metrics = {record.metric for record in own}
        assert metrics >= {"nll", "recall_exact", "train_nll", "parameters", "tokens_per_second", "train_seconds"}
        assert [r.round for r in own if r.metric == "train_nll"] == list(range(1, TASK.num_steps + 1))
        assert len({record.config["method"]["data"] for record in own}) == 1
    orders = {r.config["method"]["data"] for r in found if r.method not in READERS}
    assert len(orders) == 1
    assert any("s left" in line for line in said)
    monkeypatch.setattr(running, "train", lambda *args, **more: pytest.fail("trained again"))
    again = run_families(TASK, (), place, device=CPU, methods=READERS)
    assert again == found == read_records(place.output)
    report = make_report(found)
    (section,) = (one for one in report.sections if one.anchor == "task-families")
    galleries = [part for part in section.parts if isinstance(part, Gallery)]
    assert [[panel.title for panel in gallery.panels] for gallery in galleries] == [
        ["train nll"],
        ["nll", "recall exact"],
    ]
    assert [name for name, _, _ in galleries[1].legend] == [*running.DEFAULT]
    text = " ".join(next(one for one in report.sections if one.anchor == "not-run").text)
    assert "stand in, mamba for mamba, rnn for rwkv" in text


def test_a_family_that_fails_does_not_end_a_run(books, tmp_path, monkeypatch):
    failed, real = {}, running.train

    def train_some(task, family, *args, **more):
        if family == "mamba":
            raise torch.OutOfMemoryError("no room\nat all")
        return real(task, family, *args, **more)

    monkeypatch.setattr(running, "train", train_some)
    listener = Listener(on_failure=lambda name, error: failed.setdefault(name, str(error)))
    place = place_in(books, tmp_path)
    found = run_families(TASK, ("mamba", "rnn"), place, device=CPU, listener=listener)
    assert failed == {"mamba": "no room"}
    assert {record.method for record in found} == {"rnn"}


def test_time_that_is_over_ends_a_run_which_can_go_on(books, tmp_path):
    place, said = place_in(books, tmp_path), []
    found = run_families(TASK, ("rnn", "ttt"), place, device=CPU, seconds=0.0, listener=Listener(say=said.append))
    assert found == []
    assert "run it again to go on" in said[-1]
    assert not place.output.exists()
    found = run_families(TASK, ("rnn",), place, device=CPU)
    assert {record.method for record in found} == {"rnn"}


def test_families_that_saw_other_rows_are_told_apart(books, tmp_path):
    place = place_in(books, tmp_path)
    run_families(TASK, ("rnn", "ttt"), place, device=CPU)
    lines = place.output.read_text().splitlines()
    changed = [line.replace('"data": "', '"data": "0') if '"method": "ttt"' in line else line for line in lines]
    place.output.write_text("\n".join(changed) + "\n")
    with pytest.raises(BenchmarkError, match="different rows"):
        run_families(TASK, ("rnn", "ttt"), place, device=CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"size": "900m"},
        {"row_tokens": 16},
        {"pair_share": 2.0},
        {"scored_tokens": 130},
        {"distances": []},
        {"sync_tokens": 112, "scored_tokens": 128},
        {"colour": 1},
        {"tokens": "many"},
        {"seed": -1},
    ],
)
def test_bad_settings(change):
    with pytest.raises(ConfigError):
        Families.from_table(SMALL | change)
