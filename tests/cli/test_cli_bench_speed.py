"""`absorber bench latency` and `absorber bench cost` from flags to records and tables."""

import pytest

SMALL = """
[absorb]
max_steps = 2
rank = 2
anchor_texts = 2
anchor_tokens = 8
[stream]
context_tokens = 8
sync_tokens = 16
"""


@pytest.fixture
def flags(tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text(SMALL)
    return ("--output", tmp_path / "records.jsonl", "--geometry", "tiny", "--config", settings, "--device", "cpu")


def test_latency(cli, flags, tmp_path):
    more = ("--lengths", "12,40", "--batches", "1", "--tokens", "4", "--repeats", "1")
    done = cli("bench", "latency", "absorber", "full", *flags, *more, "--json")
    assert done.code == 0
    assert {event["method"] for event in done.of("record")} == {"absorber", "full"}
    *rows, even = done.of("row")
    assert even["method"] == "absorber"  # from where on it is quicker
    assert [(row["method"], row["tokens"]) for row in rows] == [
        ("absorber", "12"),
        ("absorber", "40"),
        ("full", "12"),
        ("full", "40"),
    ]
    assert done.of("done")[0]["failures"] == []
    assert "ms_per_token" in cli("bench", "table", tmp_path / "records.jsonl").out


def test_cost(cli, flags):
    done = cli("bench", "cost", *flags, "--streams", "2", "--repeats", "1")
    assert done.code == 0
    assert "peft-lora" in done.out
    assert "times_one-by-one" in done.err


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--lengths", "4,x"), "whole numbers"),
        (("--lengths", "0"), "1 or more"),
        (("--geometry", "llama9"), "there is no geometry"),
        (("--dtype", "int3"), "dtype must be"),
    ],
)
def test_bad_flags(cli, flags, more, word):
    done = cli("bench", "latency", *flags, *more)
    assert done.code == 2
    assert word in done.err


def test_a_method_of_another_family(cli, flags):
    done = cli("bench", "latency", "mamba", *flags)
    assert done.code == 2
    assert "it has absorber-round" in done.err


@pytest.mark.parametrize("name", ["latency", "cost"])
def test_at_most_twelve_flags(cli, name):
    text = cli("bench", name, "--help").out
    flags = {word for word in text.split() if word.startswith("--") and word != "--"}
    assert "--geometry" in flags
    assert len({flag for flag in flags if not flag.startswith("--no-")}) <= 12
