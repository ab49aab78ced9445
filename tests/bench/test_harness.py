"""Absorber as a model of lm-evaluation-harness, beside the harness's own `hf` on the same model."""

import json
import warnings

import pytest
import torch

import absorber
from absorber.backbone import inspect

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from absorber.bench.harness import AbsorberLM

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness, whose warnings are not ours to mend

CONFIG = absorber.AbsorbConfig(
    rank=4, max_steps=4, learning_rate=1e-2, warmup_steps=1, anchor_texts=2, anchor_tokens=8, rollback="nonfinite"
)
LONG = "the cat sat on the mat, and the dog sat on the log; " * 6


def ask(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number, metadata=("local", number, 1))
        for number, each in enumerate(arguments)
    ]


PAIRS = [("It was the best", " of times"), ("It was the best", " of rhymes"), ("", "Once"), ("a" * 50, "b")]


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "settings.toml"
    values = CONFIG.to_dict()
    names = ("rank", "max_steps", "learning_rate", "warmup_steps", "anchor_texts", "anchor_tokens")
    path.write_text("[absorb]\n" + "".join(f"{name} = {values[name]}\n" for name in names) + 'rollback = "nonfinite"\n')
    return str(path)


@pytest.fixture
def ours(model, tokenizer, settings):
    def make(**changes):
        return AbsorberLM(pretrained=model, tokenizer=tokenizer, config=settings, **changes)

    return make


def test_what_fits_is_what_hf_says(model, tokenizer, ours):
    theirs, own = HFLM(pretrained=model, tokenizer=tokenizer), ours(window=120)
    assert own.loglikelihood(ask("loglikelihood", *PAIRS)) == theirs.loglikelihood(ask("loglikelihood", *PAIRS))
    texts = [("It was the best of times",), ("x" * 120,)]
    rolling = "loglikelihood_rolling"
    assert own.loglikelihood_rolling(ask(rolling, *texts)) == theirs.loglikelihood_rolling(ask(rolling, *texts))
    wishes = [("It was", {"until": ["\n"], "max_gen_toks": 8}), ("Once upon", {"until": ["q"], "max_gen_toks": 5})]
    until = "generate_until"
    assert own.generate_until(ask(until, *wishes)) == theirs.generate_until(ask(until, *wishes))
    assert own.num_absorbed == 0


def test_a_long_context_is_absorbed_and_leaves_nothing_behind(model, tokenizer, ours):
    """As a session that has read it would say it, whatever was asked before."""
    own = ours(window=60)
    pairs = [(LONG, " the cat sat"), PAIRS[0], (LONG, " a dog"), ("z" * 90, "z")]
    found = own.loglikelihood(ask("loglikelihood", *pairs))
    assert own.num_absorbed == (len(LONG) - 1 - 40) // 20 + (90 - 40) // 20  # LONG once, though asked twice
    assert found[1] == HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(ask("loglikelihood", PAIRS[0]))[0]
    stream = absorber.StreamConfig(context_tokens=20, sync_tokens=40)
    for (context, answer), said in zip(pairs, found, strict=True):
        if context is PAIRS[0][0]:
            continue
        with absorber.Session(model, tokenizer, CONFIG, stream) as session:
            # lm-eval gives a blank that ends a context to what follows.
            blank = len(context) - len(context.rstrip())
            session.append(context.rstrip())
            ids = tokenizer(context[len(context) - blank :] + answer)["input_ids"]
            with session.memory.applied_to(model):
                before = [0, *session.window_ids]
                logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        total = sum(float(logits[at, token]) for at, token in enumerate(ids))
        assert said[0] == pytest.approx(total, rel=1e-4)
        assert said[1] == (logits.argmax(-1).tolist() == ids)


def test_what_was_absorbed_helps(model, tokenizer, ours):
    """The text goes on as it did; without a memory the same window says less of it."""
    own = ours(window=60)
    ((total, _),) = own.loglikelihood(ask("loglikelihood", (LONG, " the cat sat on the mat, and the dog")))
    window = LONG.rstrip()[-51:]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)
    ((without, _),) = theirs.loglikelihood(ask("loglikelihood", (window, " the cat sat on the mat, and the dog")))
    assert total > without + 10


def test_a_long_text_is_scored_part_by_part(model, tokenizer, ours):
    own = ours(window=60)
    (total,) = own.loglikelihood_rolling(ask("loglikelihood_rolling", (LONG,)))
    ids, expected = tokenizer(LONG)["input_ids"], 0.0
    stream = absorber.StreamConfig(context_tokens=20, sync_tokens=40)
    with absorber.Session(model, tokenizer, CONFIG, stream) as session:
        for start in range(0, len(ids), 20):
            part = ids[start : start + 20]
            with session.memory.applied_to(model), torch.no_grad():
                before = [0, *session.window_ids]
                logits = model(torch.tensor([before + part])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            expected += sum(float(logits[at, token]) for at, token in enumerate(part))
            session.append_ids(part)
    assert total == pytest.approx(expected, rel=1e-4)


def test_an_answer_is_written_after_a_long_context(model, tokenizer, ours):
    own = ours(window=60)
    (written,) = own.generate_until(ask("generate_until", (LONG, {"until": ["\n"], "max_gen_toks": 6})))
    stream = absorber.StreamConfig(context_tokens=20, sync_tokens=40)
    with absorber.Session(model, tokenizer, CONFIG, stream) as session:
        session.append(LONG)
        with session.memory.applied_to(model), torch.no_grad():
            ids = [0, *session.window_ids]
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert written == tokenizer.decode(ids[-6:]).split("\n")[0]


def test_with_a_memory_every_request_is_answered_with_it(model, tokenizer, ours, tmp_path):
    stream = absorber.StreamConfig(context_tokens=20, sync_tokens=40, flush="keep")
    memory = absorber.absorb(model, tokenizer, LONG, CONFIG, stream)
    memory.save(tmp_path / "memory")
    theirs, own = HFLM(pretrained=model, tokenizer=tokenizer), ours(memory=str(tmp_path / "memory"))
    requests = ask("loglikelihood", *PAIRS[:2])
    before, after = theirs.loglikelihood(requests), own.loglikelihood(requests)
    assert before != after  # the drift
    with memory.applied_to(model):
        expected = theirs.loglikelihood(requests)
    assert [total for total, _ in after] == pytest.approx([total for total, _ in expected], rel=1e-5)
    own.loglikelihood(ask("loglikelihood", (LONG, " the")))
    assert own.num_absorbed > 0
    assert own.loglikelihood(requests) == after  # what a context adds to it is forgotten
    assert own._settings.stream.window_tokens == 60


@pytest.mark.parametrize("window", [2, "many", 10**6])
def test_windows_that_cannot_be(ours, window):
    with pytest.raises(absorber.ConfigError, match="window"):
        ours(window=window)


def test_from_the_command_line(tmp_path, settings, capsys, monkeypatch):
    """A task of ours in a file, for there is no hub; the harness's own, which take long to list, are left out."""
    import lm_eval.tasks

    from absorber.cli import run

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    lines = [{"text": LONG, "gold": " the cat"}, {"text": "It was the best", "gold": " of times"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{gold}}'\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n"
    )
    output = tmp_path / "out"
    arguments = ["--tasks", "local", "--include_path", tmp_path, "--output_path", output, "--device", "cpu"]
    model_args = f"pretrained=tiny,window=60,config={settings}"
    assert run(["eval", *map(str, arguments), "--model_args", model_args]) == 0
    (path,) = output.rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["results"]["local"]["perplexity,none"] > 1
    assert results["config"]["model"] == "absorber"
    assert "local" in capsys.readouterr().out
    assert inspect(absorber.load("tiny", device="cpu")[0])
