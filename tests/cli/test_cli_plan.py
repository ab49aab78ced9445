"""`absorber plan` from flags to settings that another command takes."""

import tomllib

import pytest

from absorber.config import PRESETS, read_toml

RATES = ("--tflops", "1", "--bandwidth", "20")


def test_a_plan_is_a_settings_file(cli, tmp_path):
    done = cli("plan", "--model", "tiny", "--memory", "16GB", "--rate", "20", *RATES)
    assert done.code == 0
    assert set(tomllib.loads(done.out)) == {"absorb", "stream"}
    path = tmp_path / "plan.toml"
    path.write_text(done.out)
    assert read_toml(path, PRESETS["default"]).stream.context_tokens == 512
    assert "estimates" in done.out


def test_a_plan_for_programs(cli):
    done = cli("plan", "--model", "tiny", "--memory", "20MiB", *RATES, "--device", "cpu", "--json")
    (event,) = done.of("plan")
    assert event["total_bytes"] <= 0.9 * 20 * 2**20 == 0.9 * event["memory_bytes"]
    assert event["total_bytes"] == sum(
        event[f"{part}_bytes"]
        for part in ("weights", "adapter", "optimizer", "activations", "logits", "states", "cache")
    )
    assert event["break_even_tokens"] > 0


def test_without_sizes_they_are_measured_here(cli):
    assert cli("plan", "--model", "tiny", "--device", "cpu", "--json").of("plan")[0]["tflops"] > 0


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--memory", "much"), "such as 16GB"),
        (("--memory", "1MB"), "nothing fits"),
        (("--rate", "0"), "above zero"),
        (("--streams", "0"), "1 or more"),
        (("--rate", "1e12"), "tokens a second"),
    ],
)
def test_bad_flags(cli, flags, word):
    done = cli("plan", "--model", "tiny", *RATES, *flags)
    assert done.code == 2
    assert word in done.err


def test_a_model_that_is_not_here(cli):
    done = cli("plan", *RATES)
    assert done.code == 2
    assert "not here yet" in done.err
