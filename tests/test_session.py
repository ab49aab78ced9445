"""A session: append, read, ask, generate, save and resume; the same seed gives the same results, bit for bit."""

import json

import pytest
import torch

import absorber
from absorber import (
    AbsorbConfig,
    ConfigError,
    ContextError,
    DivergedError,
    Memory,
    MemoryFileError,
    MemoryMismatchError,
    ModelError,
    Session,
    SessionNotFoundError,
    StreamConfig,
)
from absorber.cli.opening import open_memory
from absorber.saved_session import is_session, saved_base
from absorber.text import as_turn
from architectures import build


def lines_of(memory):
    """The ledger without times."""
    keys = ("number", "context_tokens", "sync_tokens", "generated_tokens", "num_steps")
    keys += ("loss_before", "loss_after", "outcome")
    return [[getattr(line, key) for key in keys] for line in memory.ledger]


def same(one, other):
    weights = zip(one.adapter.parameters(), other.adapter.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in weights) and lines_of(one) == lines_of(other)


@pytest.fixture
def begin(model, tokenizer, config, stream):
    def begin(**more):
        return Session(model, tokenizer, more.pop("config", config), more.pop("stream", stream), **more)

    return begin


# --- The same seed, the same results


def test_the_same_seed_gives_the_same_bits(model, tokenizer, config, stream, text):
    runs = [absorber.absorb(model, tokenizer, text, config.replace(seed=seed), stream) for seed in (3, 3, 4)]
    assert runs[0].num_rounds > 10
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    first_down = [next(iter(run.adapter.down.values())) for run in runs]
    assert not torch.equal(first_down[0], first_down[2])


def test_sampling_follows_the_seed(begin, config, text):
    answers = []
    for seed in (3, 3, 4):
        session = begin(config=config.replace(seed=seed))
        session.append(text)
        answers.append([session.ask("who?", temperature=1.0, max_new_tokens=20)])
        answers[-1] += ["".join(session.generate(temperature=1.0, max_new_tokens=20))]
        answers[-1] += ["".join(session.generate(temperature=1.0, max_new_tokens=20))]
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][1] != answers[0][2]


# --- Reading


def test_an_interrupted_append_of_a_long_text_loses_nothing(begin, monkeypatch, text):
    """Also of a text of several pieces, each of which is tokenized by itself."""
    monkeypatch.setattr(absorber.text, "_PIECE_CHARACTERS", 16)

    def progress(now):
        if now.num_rounds == 2 and armed:
            raise KeyboardInterrupt

    armed = False
    whole, session = begin(), begin(progress=progress)
    whole.append(text)
    armed = True
    with pytest.raises(KeyboardInterrupt):
        session.append(text)
    assert session.memory.num_rounds == 2
    armed = False
    assert session.append("") == 0
    assert session.window_ids == whole.window_ids
    assert same(session.memory, whole.memory)


def test_reading_goes_on_in_the_middle_of_a_source(begin, monkeypatch, text):
    monkeypatch.setattr(absorber.text, "_PIECE_CHARACTERS", 16)
    whole, session = begin(), begin()
    assert whole.read("book", [text]) == len(text)
    assert session.read("book", [text[:50]]) == 50
    assert session.source_tokens("book") == 50
    assert session.read("other", [text[:5]]) == 5
    assert session.read("book", [text[:20], text[20:]]) == len(text) - 50
    assert session.read("book", [text]) == 0
    assert session.num_tokens == len(text) + 5
    assert whole.num_tokens == len(text)
    assert session.source_tokens("none") == 0


def test_an_interrupted_read_goes_on_where_it_was(begin, monkeypatch, text):
    monkeypatch.setattr(absorber.text, "_PIECE_CHARACTERS", 16)

    def progress(now):
        if now.num_rounds == 3 and armed:
            raise KeyboardInterrupt

    armed = True
    whole, session = begin(), begin(progress=progress)
    whole.read("book", [text])
    with pytest.raises(KeyboardInterrupt):
        session.read("book", [text])
    armed = False
    session.read("book", [text])
    assert session.window_ids == whole.window_ids
    assert same(session.memory, whole.memory)


def test_flush_is_for_those_who_ask_for_it(begin, stream, text):
    for flush, left in (("auto", True), ("keep", True), ("generate", False)):
        session = begin(stream=stream.replace(flush=flush))
        session.append(text)
        session.flush()
        assert bool(session.window_ids) == left
        assert session.num_tokens == len(text)


# --- Answering


def test_asking_leaves_no_trace(begin, text):
    session, twin = begin(), begin()
    for either in (session, twin):
        either.append(text)
    window = session.window_ids
    first = session.ask("who?", temperature=1.0)
    assert session.ask("who?", temperature=1.0) == first
    assert session.ask("who?", temperature=1.0, seed=5) == session.ask("who?", temperature=1.0, seed=5)
    assert session.window_ids == window
    assert "".join(session.generate(temperature=1.0)) == "".join(twin.generate(temperature=1.0))


def test_an_answer_is_what_the_model_says_after_memory_and_window(begin, model, tokenizer, text):
    session = begin()
    session.append(text)
    ids = [0, *session.window_ids, *tokenizer("\n\nQuestion: who?\nAnswer:")["input_ids"]]
    written = []
    with session.memory.applied_to(model), torch.no_grad():
        while len(written) < 6:
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    assert session.ask("who?") == tokenizer.decode(written).strip()


def test_a_chat_template_is_used_inside_the_conversation(tokenizer, monkeypatch):
    template = (
        "{% if messages[0]['role'] != 'system' %}<sys>{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert as_turn(tokenizer, "hi") == "[user]hi;[assistant]"


def test_generating_after_an_interruption_comes_after_what_was_pending(begin, text):
    def progress(now):
        if armed and now.num_rounds == 1:
            raise KeyboardInterrupt

    armed = True
    session, twin = begin(progress=progress), begin()
    with pytest.raises(KeyboardInterrupt):
        session.append(text)
    armed = False
    twin.append(text)
    assert "".join(session.generate()) == "".join(twin.generate())
    assert session.window_ids == twin.window_ids


def test_questions_that_cannot_be_answered(begin, config, stream):
    session = begin()
    for empty in ("", " \n"):
        with pytest.raises(ContextError, match="the question is empty"):
            session.ask(empty)
    with pytest.raises(ContextError, match="more than the model's 8192 positions"):
        session.ask("x" * 9000)
    with pytest.raises(ConfigError, match="max_new_tokens must be 1 or more"):
        session.ask("who?", max_new_tokens=0)
    with pytest.raises(ContextError, match="nothing to continue"):
        list(begin(config=config.replace(sink="none")).generate())


# --- A memory that is gone on from


@pytest.mark.parametrize(
    "change", [{"rank": 5}, {"sink": "none"}, {"alpha": 9.0}, {"adapted_layers": (0,)}, {"adapter_dtype": "bfloat16"}]
)
def test_a_memory_keeps_what_its_weights_were_made_with(begin, model, config, stream, change):
    memory = Memory.fresh(model, sink_id=0, config=config, stream=stream)
    (name,) = change
    with pytest.raises(ConfigError, match=f"the memory has {name} .*; got .* cannot change once it is begun"):
        begin(memory=memory, config=config.replace(**change))
    begin(memory=memory, config=config.replace(learning_rate=0.1))
    assert memory.config.learning_rate == 0.1


# --- On disk


@pytest.mark.parametrize(("optimizer_state", "study"), [("reset", "off"), ("carry", "off"), ("reset", "light")])
def test_saving_and_resuming_in_between_changes_nothing(
    begin, model, tokenizer, config, stream, text, tmp_path, optimizer_state, study
):
    config = config.replace(
        optimizer_state=optimizer_state,
        study=study,
        study_passages=1,
        study_tokens=5,
        study_cue=1,
        study_rank=2,
        study_steps=3,
        study_past=1,
        study_rounds=3,
        weight_decay=0.01,
        max_steps=6,
        replay_rounds=3,
        anchor_texts=3,
        anchor_tokens=4,
    )
    stream = stream.replace(teacher_tokens=9)
    assert config.anchor_share > 0
    assert config.replay_share > 0
    assert max(config.segments) > 1
    whole, session = (begin(config=config, stream=stream) for _ in range(2))
    for place in range(0, len(text), 25):
        part = text[place : place + 25]
        spoken = []
        for either in (whole, session):
            either.read(f"part {place}", [part])
            spoken.append("".join(either.generate(temperature=1.0, max_new_tokens=5)))
        assert spoken[0] == spoken[1]
        session.save(tmp_path / "session")
        session = Session.resume(tmp_path / "session", model, tokenizer)
    assert whole.memory.num_rounds > 8
    assert session.window_ids == whole.window_ids
    assert torch.equal(session._stream.behind_BT, whole._stream.behind_BT)
    assert session._stream.behind_BT.shape == (1, 9)
    assert session.num_tokens == whole.num_tokens
    assert session.source_tokens("part 25") == 25
    assert len(whole._stream.reservoir.items) == 3
    for ours, theirs in zip(session._stream.reservoir.items, whole._stream.reservoir.items, strict=True):
        assert torch.equal(ours.context_BN, theirs.context_BN)
        assert torch.equal(ours.subsequent_BM, theirs.subsequent_BM)
    assert len(session._stream.studied.items) == (0 if study == "off" else 3)
    for ours, theirs in zip(session._stream.studied.items, whole._stream.studied.items, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert torch.equal(session._stream.anchors.texts_QA, whole._stream.anchors.texts_QA)
    assert same(session.memory, whole.memory)


@pytest.mark.parametrize("number", [1, 2])
def test_a_session_of_an_older_format_goes_on(begin, model, tokenizer, config, text, tmp_path, number):
    """In format 2, passages to be studied stood behind X and Y; there were no notes."""
    session = begin(config=config.replace(replay_rounds=3, anchor_texts=2, anchor_tokens=4))
    session.read("book", [text])
    session.save(tmp_path / "session")
    state = tmp_path / "session" / "session.json"
    content = json.loads(state.read_text())
    assert [len(entry) for entry in content["replay"]] == [2, 2, 2]
    del content["notes"]
    content |= {"format": number, "replay": [[*entry, []][: 1 + number] for entry in content["replay"]]}
    state.write_text(json.dumps(content))
    resumed = Session.resume(tmp_path / "session", model, tokenizer)
    for either in (session, resumed):
        either.read("more", [text[:60]])
    assert same(resumed.memory, session.memory)


def test_what_an_interruption_left_is_saved(begin, model, tokenizer, text, tmp_path):
    def progress(now):
        if now.num_rounds == 1:
            raise KeyboardInterrupt

    session, whole = begin(progress=progress), begin()
    with pytest.raises(KeyboardInterrupt):
        session.read("book", [text])
    session.save(tmp_path / "session")
    resumed = Session.resume(tmp_path / "session", model, tokenizer)
    resumed.read("book", [text])
    whole.read("book", [text])
    assert resumed.window_ids == whole.window_ids
    assert same(resumed.memory, whole.memory)


def test_opening_either_folder(begin, model, tokenizer, text, tmp_path):
    session = begin()
    session.append(text)
    session.save(tmp_path / "session")
    session.memory.save(tmp_path / "memory")
    assert is_session(tmp_path / "session")
    assert not is_session(tmp_path / "memory")
    assert open_memory(tmp_path / "session", model, tokenizer).window_ids == session.window_ids
    assert open_memory(tmp_path / "memory", model, tokenizer).window_ids == []
    assert same(Memory.load(tmp_path / "session" / "memory", model), session.memory)
    assert saved_base(tmp_path / "session") == saved_base(tmp_path / "memory") == "tiny"


def test_a_memory_is_not_replaced_by_a_session(begin, text, tmp_path):
    session = begin()
    session.memory.save(tmp_path / "memory")
    with pytest.raises(MemoryFileError, match="not ours to replace"):
        session.save(tmp_path / "memory")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"format": "new"},
        {"window": "none"},
        {"window": [1.5, "x"]},
        {"pending": None},
        {"replay": None},
        {"replay": [[[1, 2]]]},
        {"replay": [[[1, 2], ["x"]]]},
        {"anchors": 3},
        {"anchors": [[1, 2], [3]]},
        {"sources": []},
        {"sources": {"book": "far"}},
        {"random_state": "zz"},
        {"random_state": "00"},
    ],
)
def test_a_damaged_session_is_refused(begin, model, tokenizer, tmp_path, change):
    begin().save(tmp_path / "session")
    path = tmp_path / "session" / "session.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MemoryFileError, match=r"is damaged|has format"):
        Session.resume(tmp_path / "session", model, tokenizer)


def test_sessions_that_are_not_there(model, tokenizer, tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(SessionNotFoundError, match="there is no session in"):
            Session.resume(place, model, tokenizer)


def test_a_session_of_another_model_is_refused(begin, tokenizer, tmp_path):
    begin().save(tmp_path / "session")
    with pytest.raises(MemoryMismatchError):
        Session.resume(tmp_path / "session", build("llama"), tokenizer)


# --- absorb


def test_absorb_takes_all_of_the_text(model, tokenizer, config, stream, text):
    memory = absorber.absorb(model, tokenizer, text, config, stream)
    assert memory.num_tokens == len(text)
    assert [line.number for line in memory.ledger] == list(range(1, -(-len(text) // 8) + 1))
    assert sum(line.context_tokens for line in memory.ledger) == len(text)
    assert memory.ledger[0].generated_tokens == 0
    last = memory.ledger[-1]
    assert last.generated_tokens == last.sync_tokens
    kept = absorber.absorb(model, tokenizer, iter([text[:7], text[7:]]), config, stream.replace(flush="keep"))
    assert kept.num_tokens == 8 * ((len(text) - 12) // 8)


@pytest.mark.parametrize("empty", ["", [], ["", ""]])
def test_an_empty_text_is_refused(model, tokenizer, config, stream, empty):
    with pytest.raises(ContextError, match="the text is empty"):
        absorber.absorb(model, tokenizer, empty, config, stream)


def test_a_text_that_never_leaves_the_window_is_refused(model, tokenizer, config, stream):
    with pytest.raises(ContextError, match="5 tokens and the window 20, so nothing left it"):
        absorber.absorb(model, tokenizer, "short", config, stream.replace(flush="keep"))
    assert absorber.absorb(model, tokenizer, "short", config, stream).num_rounds == 1


def test_a_memory_of_nothing_but_undone_rounds_is_refused(model, tokenizer, config, stream, text):
    with pytest.raises(DivergedError, match=r"all .* rounds were rolled back"):
        absorber.absorb(model, tokenizer, text, config.replace(learning_rate=1e30), stream)


def test_progress_tells_steps_and_rounds(model, tokenizer, config, stream, text):
    told = []
    memory = absorber.absorb(model, tokenizer, text, config, stream, progress=told.append)
    finished = [now.finished for now in told if now.finished]
    assert finished == memory.ledger
    rounds = [now for now in told if now.work == "synchronizing"]
    steps = [now.step for now in rounds if not now.finished]
    assert steps == list(range(config.max_steps + 1)) * memory.num_rounds
    assert all(now.max_steps == config.max_steps for now in rounds)
    assert [now.num_tokens for now in told] == sorted(now.num_tokens for now in told)


def test_a_window_that_is_too_large_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="larger than the 8192 positions"):
        Session(model, tokenizer, AbsorbConfig(rank=2), StreamConfig(context_tokens=8000, sync_tokens=192))
    for name in ("target_modules", "adapted_layers"):
        with pytest.raises(ConfigError, match=f"{name} has"):
            Session(model, tokenizer, AbsorbConfig(rank=2, **{name: ("nose",) if name == "target_modules" else (2,)}))


def test_a_model_without_a_first_token_is_refused(model, monkeypatch):
    class Bare:
        bos_token_id = eos_token_id = None

        def get_vocab(self):
            return {}

    monkeypatch.setattr(model.config, "eos_token_id", None)
    with pytest.raises(ModelError, match="set bos_token"):
        Session(model, Bare())


def test_all_work_is_told(model, tokenizer, config, stream, text):
    """Texts to be held to are written once, and studied is in each round; nothing that takes long is silent."""
    told = []
    settings = config.replace(
        study="full", study_rank=2, study_steps=2, study_passages=2, anchor_texts=2, anchor_tokens=3, anchor_share=0.5
    )
    with absorber.Session(model, tokenizer, settings, stream, progress=told.append) as session:
        session.append(text[:40])
    works = [standing.work for standing in told]
    num_rounds = session.memory.num_rounds
    assert num_rounds > 1
    assert works.count("writing anchors") == 3
    assert works.index("writing anchors") == 0
    assert works.count("studying") % (2 * num_rounds) == 0
    assert {"asking", "studying", "synchronizing"} <= set(works)
    assert all(standing.loss != standing.loss for standing in told if standing.work != "synchronizing")
    assert all(standing.step <= standing.max_steps for standing in told)
