"""Data sets in the form of their authors, and the same from the hub."""

import sys
import types

import pytest

from absorber.bench import hub, made_up
from absorber.bench.data_sets import Example, examples, questions, summarized
from absorber.errors import BenchmarkError, MissingExtraError
from data_readers import ASKED as READERS

SIZES = {"ag_news": 120, "trec": 144, "banking77": 320, "musique": 12, "samsum": 42, "squality": 8}


@pytest.fixture
def folder(tmp_path):
    return made_up.write(tmp_path)


@pytest.mark.parametrize("kind", READERS)
def test_halves_are_disjoint_and_whole(folder, kind):
    choose, report = (READERS[kind](folder, split) for split in ("choose", "report"))
    assert not set(choose) & set(report)
    assert len(choose) + len(report) == SIZES[kind]
    assert sorted([*choose, *report])[::2] == choose


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_or_strange_file(folder, kind):
    with pytest.raises(BenchmarkError, match=rf"there is no {kind}/.*--data-dir"):
        READERS[kind](folder / "elsewhere", "report")
    for path in (folder / kind).iterdir():
        path.write_text('{"other": 1}\n')
    with pytest.raises(BenchmarkError, match="Fetch"):
        READERS[kind](folder, "report")


def test_examples(folder):
    both = [*examples("ag_news", folder, "choose"), *examples("ag_news", folder, "report")]
    assert Example("Title 40. The harbor of topic 4 number 0'x", "Technology") in both
    both = [*examples("trec", folder, "choose"), *examples("trec", folder, "report")]
    assert Example("What is HUM 23 ?", "Person") in both
    both = [*examples("banking77", folder, "choose"), *examples("banking77", folder, "report")]
    assert Example("About 3, case 15, please", "kind of 3") in both


def test_questions_and_documents(folder):
    question = next(one for split in ("choose", "report") for one in questions(folder, split) if "__7" in one.name)
    assert question.answers == ("Builder 7", "B. 7")
    assert question.supporting == ("Part 0 of 7\nParagraph 0 about 7.", "Part 1 of 7\nParagraph 1 about 7.")
    assert len(question.others) == 3
    dialogue = summarized("samsum", folder, "choose")[0]
    assert dialogue.heading == "Dialogue between Ada and Ben:"
    assert dialogue.text == "Ada: Shall we see the harbor?\nBen: Yes, at 0."
    assert dialogue.requests[0].references == ("Ada and Ben will see the harbor.",)
    story = summarized("squality", folder, "report")[0]
    assert (story.heading, story.text[:15]) == ("Story 2:", "Tale 1\n\nIt rain")
    assert story.requests[2].prompt == "Question about story 2: What is asked 2?\nAnswer:"
    assert story.requests[2].references == ("Reply 2 of 0.", "Reply 2 of 1.")


def test_the_halves_of_dialogues_are_those_of_the_streams(folder):
    from absorber.bench.data import documents

    names = [name for name, _ in documents("dialogues", folder, "report")]
    assert [one.name for one in summarized("samsum", folder, "report")] == names


def test_the_hub_gives_the_same_files(monkeypatch, tmp_path):
    rows = {
        "fancyzhx/ag_news": [{"text": f"Text {number}", "label": number % 4} for number in range(8)],
        "SetFit/TREC-QC": [{"text": f"Who is {number} ?", "label_original": "HUM:ind"} for number in range(8)],
        "mteb/banking77": [{"text": f"Case, {number}", "label_text": "card_arrival"} for number in range(8)],
    }
    monkeypatch.setenv("ABSORBER_HOME", str(tmp_path))
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows[name]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert Example("Text 3", "Technology") in examples("ag_news", hub.fetched("ag_news"), "report")
    assert Example("Who is 3 ?", "Person") in examples("trec", hub.fetched("trec"), "report")
    assert Example("Case, 3", "card arrival") in examples("banking77", hub.fetched("banking77"), "report")
    before = len(asked)
    hub.fetched("trec")
    assert len(asked) == before  # not fetched twice
    rows["fancyzhx/ag_news"] = [{"body": "x"}]
    (tmp_path / "data" / "ag_news" / "test.csv").unlink()
    with pytest.raises(BenchmarkError, match="other columns"):
        hub.fetched("ag_news")
    assert not (tmp_path / "data" / "ag_news" / "test.csv").exists()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("ABSORBER_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="--data-dir"):
        hub.fetched("musique")
