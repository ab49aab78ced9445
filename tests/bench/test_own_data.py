"""Data of one's own in the forms of the benchmarks: what is broken is named, and nothing is lost or shared silently."""

import codecs
import json
import shutil

import pytest

from absorber.bench import made_up
from absorber.bench.data import documents, once, streams
from absorber.bench.data_sets import Example, questions, summarized
from absorber.bench.icl import InContext
from absorber.bench.reasoning import Reasoning
from absorber.bench.records import read_records
from absorber.bench.runner import Listener, run_task
from absorber.bench.summary import Summary
from absorber.errors import BenchmarkError
from data_readers import ASKED, READ

SPLITS = ("choose", "report")
READERS = READ | ASKED
SIZES = {"num_rounds": 2, "num_streams": 3, "context_tokens": 120, "sync_tokens": 140, "num_queries": 2}


@pytest.fixture
def folder(tmp_path):
    return made_up.write(tmp_path / "data")


def files(folder, name):
    return sorted((folder / ("samsum" if name == "talks" else name)).iterdir())


def rewrite(path, change):
    """Change each JSON line, or each entry of a JSON list."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        entries = [json.loads(line) for line in text.splitlines()]
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in change(entries)))
    else:
        path.write_text(json.dumps(change(json.loads(text))))


def first(**values):
    """A change of the first entry."""
    return lambda entries: [entries[0] | values, *entries[1:]]


@pytest.mark.parametrize("begin", ["", "A line.\n"])
@pytest.mark.parametrize("blank", [" ", ""])
def test_streams_of_a_book_without_lines_are_of_different_places(tokenizer, begin, blank):
    text = begin + "".join(f"word{number}{blank}" for number in range(4000))
    rows = streams(tokenizer, [("one", text)], kind="books", num_streams=4, num_tokens=64, seed=0).tolist()
    places = [text.index(tokenizer.decode(row)) for row in rows]
    assert len({place // (len(text) // 4) for place in places}) == 4
    if blank:
        assert all(text[place - 1] in " \n" for place in places)


def test_dialogues_of_one_id_are_told_apart(model, tokenizer, folder):
    rewrite(files(folder, "samsum")[0], lambda entries: [entry | {"id": "7"} for entry in entries])
    by_prompt = {one.requests[0].prompt: one for one in summarized("samsum", folder, "report")}
    texts = Summary(**SIZES).prepare(model, tokenizer, folder)
    for row, queries in zip(texts.token_ids_BT, texts.queries, strict=True):
        for query in queries:
            document = by_prompt[tokenizer.decode(query.prompt)]
            assert f"{document.heading}\n{document.text}" in tokenizer.decode(row)
    asked = [tuple(query.prompt) for own in texts.queries for query in own]
    assert len(set(asked)) == len(asked)


def test_a_first_one_is_kept():
    assert once(["a b", "c", "A  b\n", "c"], lambda text: text) == ["a b", "c"]


@pytest.mark.parametrize("name", READERS)
def test_what_is_there_twice_is_in_one_half(folder, name):
    before = [READERS[name](folder, split) for split in SPLITS]
    for path in files(folder, name):
        again = path.with_stem(f"{path.stem}z")  # which is read later
        if name in ("trec", "ag_news", "banking77", "squality"):  # whose files have fixed names
            path.write_text(path.read_text() * 2)
        elif name in ("samsum", "talks"):
            again.write_text(path.read_text().replace('"id": "1', '"id": "2'))
        else:
            shutil.copy(path, again)
    after = [READERS[name](folder, split) for split in SPLITS]
    if name == "squality":  # its stories are numbered by their place in the file
        before, after = ([[one.text for one in half] for half in found] for found in (before, after))
    assert after == before


def test_questions_that_are_asked_again_are_told(model, tokenizer, folder, tmp_path):
    said = []
    for task in (Reasoning(**SIZES), Reasoning(**SIZES | {"num_streams": 4}), Summary(**SIZES)):
        where = {"data_dir": folder, "output": tmp_path / "records.jsonl"}
        run_task(task, {}, model, tokenizer, **where, listener=Listener(say=said.append))
    notes = [line for line in said if line.startswith("note: ")]
    assert len(notes) == 1
    assert "only 6 of the 8 questions differ" in notes[0]
    texts = InContext(num_rounds=2, num_streams=40, context_tokens=100, sync_tokens=120, num_queries=3)
    assert "of the 120 questions differ" in texts.remark(texts.prepare(model, tokenizer, folder))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("talks", lambda entries: {"a": 1}, "form"),
        ("talks", lambda entries: [{"id": "1"}], "'dialogue'"),
        ("talks", first(dialogue=None), "dialogue is None"),
        ("samsum", first(dialogue=None), "dialogue is None"),
        ("samsum", first(summary=["x" * 9000]), "summary is "),
        ("musique", first(answer=None), "question 2hop__0 of musique has no answer"),
        ("musique", first(answer=" "), "question 2hop__0 of musique has no answer"),
        ("musique", first(paragraphs=[]), "question 2hop__0 of musique has no supporting paragraph"),
        ("musique", first(question=7), "question is 7"),
        ("musique", first(answer_aliases=None), "form"),
        ("squality", first(questions=[{"question_text": "x", "responses": []}]), "story 500 of squality has no"),
    ],
)
def test_a_broken_entry_is_named(folder, name, change, words):
    rewrite(files(folder, name)[0], change)
    with pytest.raises(BenchmarkError, match=words) as caught:
        READERS[name](folder, "report")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("talks", "hello"),
        ("talks", '{"id": "1", "dialogue": "A: b"}\n{"id": "2", "dialogue": "A: c"}\n'),
        ("ag_news", '"1","a","text ' + "x y " * 50000 + "\n"),
        ("ag_news", '"1","a","text\n"2","b","more"\n'),
        ("trec", "x" * 90000 + "\n"),
    ],
)
def test_a_broken_file_is_named(folder, name, content):
    files(folder, name)[0].write_text(content)
    with pytest.raises(BenchmarkError, match=r"of (the form|trec)") as caught:
        READERS[name](folder, "report")
    assert len(str(caught.value)) < 400


def test_ids_may_be_numbers_and_one_alias_a_text(folder):
    rewrite(files(folder, "musique")[0], first(id=7, answer_aliases="Paris"))
    found = [one for split in SPLITS for one in questions(folder, split)]
    assert next(one for one in found if one.name == "7").answers == ("Builder 0", "Paris")


@pytest.mark.parametrize("sign", ["\u2028", "\u0085", "\x0c"])
def test_a_sign_that_ends_lines_elsewhere_is_text(folder, tmp_path, sign):
    rewrite(files(folder, "musique")[0], first(question=f"one{sign}two" if sign != "\x0c" else "one\ftwo"))
    found = [one.question for split in SPLITS for one in questions(folder, split)]
    assert f"one{sign}two" in found
    (tmp_path / "records.jsonl").write_text(f'{{"task": "one{sign}two"}}\n'.replace("\x0c", "\\f"), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="missing 13 required"):  # it is one line of JSON
        read_records(tmp_path / "records.jsonl")


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_no_text(folder, name):
    before = [READERS[name](folder, split) for split in SPLITS]
    for path in files(folder, name):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert [READERS[name](folder, split) for split in SPLITS] == before


@pytest.mark.parametrize("name", READERS)
def test_text_that_is_not_utf_8_is_refused_in_few_words(folder, name):
    path = files(folder, name)[0]
    path.write_bytes(path.read_bytes() + "caf\u00e9".encode("latin-1") + b" x" * 5000)
    with pytest.raises(BenchmarkError, match=f"cannot read .*{path.name}: it is not UTF-8 text: byte 0xe9") as caught:
        READERS[name](folder, "report")
    assert len(str(caught.value)) < 400


def test_blank_lines_and_a_header_in_capitals(folder):
    before = {name: READERS[name](folder, "choose") for name in ("trec", "ag_news", "banking77")}
    for name in before:
        for path in files(folder, name):
            path.write_text(path.read_text().replace('"text","category"', "Text, Category ") + "\n \n")
    assert before == {name: READERS[name](folder, "choose") for name in before}
    assert Example("Text", "category") not in before["banking77"]


def test_too_few_documents(tmp_path):
    with pytest.raises(BenchmarkError, match=f"there is no folder {tmp_path / 'none'}; give"):
        documents("books", tmp_path / "none", "choose")
    with pytest.raises(BenchmarkError, match="has no books"):
        documents("books", tmp_path, "choose")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("The same.\n")
        assert documents("books", tmp_path, "choose") == [("a", "The same.\n")]
        with pytest.raises(BenchmarkError, match=r"of books there is 1 in .*, and the report half needs 2"):
            documents("books", tmp_path, "report")
