"""`absorber eval` with data of one's own: what our tasks ask, what is recorded, and what is not run twice."""

import json
import shutil
import warnings

import pytest

import absorber
from absorber.bench import made_up
from absorber.bench.data_sets import examples, questions
from absorber.bench.records import read_records
from absorber.bench.report import make_report
from absorber.cli import run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval")
    import lm_eval
    import lm_eval.tasks

    from absorber.bench import harness_run
    from absorber.bench.eval_tasks import FOLDER, documents, needles
    from absorber.bench.harness import AbsorberLM

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness, whose warnings are not ours to mend

SMALL = {"rank": 4, "max_steps": 1, "warmup_steps": 1, "anchor_texts": 2, "anchor_tokens": 8}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return made_up.write(tmp_path_factory.mktemp("data"))


@pytest.fixture
def evaluate(tmp_path, data_dir, monkeypatch):
    """The command, with our own tasks alone, for the harness's take long to list."""

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    (tmp_path / "s.toml").write_text("[absorb]\n" + "".join(f"{name} = {value}\n" for name, value in SMALL.items()))
    start = ["eval", "--limit", "4", "--model_args", f"pretrained=tiny,device=cpu,config={tmp_path / 's.toml'}"]

    def call(*arguments, window=4000, memory=None, data=data_dir):
        own = [*start[:-1], f"{start[-1]},window={window}" + (f",memory={memory}" if memory else "")]
        given = [*own, "--records", tmp_path / "r.jsonl", *(["--data-dir", data] if data else []), *arguments]
        return run(list(map(str, given)))

    return call


def tasks_of(records):
    return [record.config["task"]["kind"] for record in records]


def test_records_say_what_the_harness_says(evaluate, tmp_path):
    assert evaluate("--tasks", "absorber_drift,absorber_niah_2048", "--output_path", tmp_path / "out") == 0
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs, own = json.loads(path.read_text()), read_records(tmp_path / "r.jsonl")
    drift = ["absorber_ag_news", "absorber_banking77", "absorber_trec", "absorber_wikitext2"]
    assert list(dict.fromkeys(tasks_of(own))) == [*drift, "absorber_niah_2048"]
    assert theirs["config"]["model"] == "absorber"
    for record in own:
        assert (record.task, record.method, record.model, record.num_samples) == ("eval", "absorber", "tiny", 4)
        assert record.context_length > 20
        assert record.versions["lm_eval"] == lm_eval.__version__
        if record.metric == "absorbed_rounds":
            assert record.value == 0
            continue
        values = theirs["results"][record.config["task"]["kind"]]
        assert record.value == values[f"{record.metric},none"]
        if record.metric == "acc":
            assert record.unit == "ratio"
            ends = harness_run._interval(record.value, values["acc_stderr,none"], share=True)
            assert (record.ci95_low, record.ci95_high) == ends
    assert own[0].config["method"]["memory"] == "none"
    assert str(tmp_path) not in (tmp_path / "r.jsonl").read_text()
    assert "simple_evaluate" not in vars(lm_eval)  # the harness is as it was


def test_what_the_file_has_is_not_run_again(evaluate, tmp_path, monkeypatch, capsys):
    assert evaluate("--tasks", "absorber_ag_news") == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    asked = []
    theirs = AbsorberLM._loglikelihood_tokens
    monkeypatch.setattr(
        AbsorberLM, "_loglikelihood_tokens", lambda self, *args, **more: asked.append(1) or theirs(self, *args, **more)
    )
    assert evaluate("--tasks", "absorber_ag_news") == 0
    assert (tmp_path / "r.jsonl").read_bytes() == before
    assert not asked
    assert "absorber_ag_news: already measured" in capsys.readouterr().err
    assert evaluate("--tasks", "absorber_ag_news,absorber_trec") == 0
    assert set(tasks_of(read_records(tmp_path / "r.jsonl"))) == {"absorber_ag_news", "absorber_trec"}
    for other in (["--limit", "3"], ["--num_fewshot", "1"], ["--metadata", "split=choose"]):
        count = len(read_records(tmp_path / "r.jsonl"))
        assert evaluate("--tasks", "absorber_ag_news", *other) == 0
        assert len(read_records(tmp_path / "r.jsonl")) == count + 2
    assert evaluate("--tasks", "absorber_ag_news", window=3000) == 0
    assert len(asked) == 5  # TREC, and ag_news in four other ways


def test_with_a_memory_and_a_window_that_is_too_small(evaluate, tmp_path, model, tokenizer):
    """The table parts what was measured with it from what was measured without, by a name that is no path."""
    pytest.importorskip("matplotlib")
    config = absorber.AbsorbConfig(**SMALL)
    stream = absorber.StreamConfig(context_tokens=20, sync_tokens=40)
    absorber.absorb(model, tokenizer, "A cat sat on a mat. " * 9, config, stream).save(tmp_path / "a" / "cats")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert evaluate("--tasks", "absorber_niah_1024", window=600) == 0
    assert evaluate("--tasks", "absorber_niah_1024", window=600, memory=tmp_path / "a" / "cats") == 0
    own = read_records(tmp_path / "r.jsonl")
    assert evaluate("--tasks", "absorber_niah_1024", window=600, memory=tmp_path / "b" / "cats") == 0
    assert read_records(tmp_path / "r.jsonl") == own  # the same memory elsewhere
    absorbed = [record for record in own if record.metric == "absorbed_rounds"]
    assert absorbed[0].value >= 4  # of 4 texts
    assert absorbed[0].round == 0 < absorbed[1].round
    assert own[-1].config["method"]["memory"].startswith("cats ")
    assert str(tmp_path) not in (tmp_path / "r.jsonl").read_text()
    (section,) = (section for section in make_report(own).sections if section.anchor == "task-eval")
    (table,) = section.parts
    names = [row[0].text for row in table.rows]
    assert len(names) == 2
    assert "memory none" in names[0]
    assert "memory cats" in names[1]


def test_data_that_is_not_there(evaluate, tmp_path, capsys):
    assert evaluate("--tasks", "absorber_ag_news", data=None) == 2
    assert "--data-dir" in capsys.readouterr().err
    assert evaluate("--tasks", "absorber_ag_news", data=tmp_path) == 2
    assert "ag_news" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()


def test_rulers_lengths_and_filters():
    values = {"alias": "x", "4096,none": 0.5, "4096_stderr,none": "N/A", "8192,none": -1, "name": 3}
    values |= {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1}
    assert list(harness_run._figures(values)) == [("4096", 0.5, None), ("exact_match strict-match", 0.25, 0.1)]


def test_intervals():
    assert harness_run._interval(0.5, 0.1, share=True) == (pytest.approx(0.304), pytest.approx(0.696))
    assert harness_run._interval(0.75, 0.25, share=True) == (pytest.approx(0.26), 1.0)
    assert harness_run._interval(12.0, 1.0, share=False) == (pytest.approx(10.04), pytest.approx(13.96))
    assert harness_run._interval(1.0, 0.0, share=True) == harness_run._interval(9.0, None, share=False) == (None, None)


@pytest.mark.parametrize("length", [1024, 4096])
def test_a_needle_stands_once_somewhere(length, data_dir, tokenizer):
    rows = needles.haystacks(length=length, data_dir=data_dir, num_samples=12, pretrained="tiny")["test"]
    for row in rows:
        assert row["input"].count(row["value"]) == 1
        assert row["value"] not in row["gen_prefix"]
        tokens = len(tokenizer(f"{row['input']} {row['gen_prefix']}")["input_ids"]) + 32
        assert length - 300 < tokens <= length
    assert max(rows["depth"]) - min(rows["depth"]) > 0.4
    assert len(set(rows["value"])) == 12
    again = needles.haystacks(length=length, data_dir=data_dir, num_samples=12, pretrained="tiny")["test"]
    other = needles.haystacks(length=length, data_dir=data_dir, num_samples=12, pretrained="tiny", seed=1)["test"]
    assert again.to_list() == rows.to_list()
    assert other["value"] != rows["value"]
    assert needles.found(rows[0], [f" {rows[0]['value']}."]) == {"acc": 1.0}
    assert needles.found(rows[0], [f" {rows[1]['value']}."]) == {"acc": 0.0}


def test_a_length_that_holds_nothing(data_dir):
    with pytest.raises(absorber.AbsorberError, match="hold no text"):
        needles.haystacks(length=200, data_dir=data_dir, pretrained="tiny")


@pytest.mark.parametrize("kind", ["ag_news", "trec", "banking77"])
def test_labels_are_those_of_the_half_that_is_for_reporting(kind, data_dir):
    made = documents.labelled(kind=kind, data_dir=data_dir)
    for name, split in (("test", "report"), ("train", "choose")):
        right = {example.text: example.label for example in examples(kind, data_dir, split)}
        assert {row["text"]: row["choices"][row["gold"]] for row in made[name]} == right
    assert len(set(made["test"]["gold"][:20])) > 2


def test_all_paragraphs_stand_before_their_question(data_dir):
    asked = questions(data_dir, "report")
    for row, question in zip(documents.paragraphs(data_dir=data_dir)["test"], asked, strict=True):
        assert all(part in row["context"] for part in (*question.supporting, *question.others))
        assert documents.answered(row, [row["answers"][0]]) == {"f1": 1.0, "exact_match": 1.0}
        assert documents.answered(row, ["something else"])["exact_match"] == 0


def test_every_length_has_a_task():
    lengths = [2**power for power in range(9, 18)]
    files = {path.stem: path.read_text() for path in FOLDER.glob("absorber_niah_*.yaml")}
    assert set(files) == {f"absorber_niah_{length}" for length in lengths}
    assert all(f"length: {name.split('_')[-1]}\n" in text for name, text in files.items())
