"""The settings: every field's range, unknown names, TOML files, presets, the way to JSON and back, a quick import."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from absorber import PRESETS, AbsorbConfig, ConfigError, StreamConfig, preset
from absorber.config import read_toml

ABOVE_ZERO = (0, 0.0, -1.0, math.inf, math.nan, "1")
COUNT = (0, -1, 1.5, True, "1", None)
FROM_ZERO = (-1, 1.5, True, "0", None)
WEIGHT = (-0.1, math.inf, math.nan, "1", None)
SHARE = (-0.1, 1.1, math.nan, "1", None)
CHOICE = ("neither", 1, None)
FLAG = (0, "yes", None)
NAMES = ((), ("q_proj", 1), "q_proj", 3)
LAYERS = ((), (0, 1.0), (True,), 3)

BAD_ABSORB = {
    "max_steps": COUNT,
    "threshold": (-1.0, math.nan, "2"),
    "optimizer": CHOICE,
    "learning_rate": (*ABOVE_ZERO, None),
    "warmup_steps": FROM_ZERO,
    "schedule": CHOICE,
    "settling_rounds": ABOVE_ZERO,
    "weight_decay": WEIGHT,
    "adam_epsilon": (*ABOVE_ZERO, None),
    "gradient_clip": (0.0, -1.0, math.nan, "1"),
    "optimizer_state": CHOICE,
    "rank": COUNT,
    "alpha": ABOVE_ZERO,
    "target_modules": NAMES,
    "adapted_layers": LAYERS,
    "cuda_graphs": FLAG,
    "checkpointing": FLAG,
    "adapter_dtype": CHOICE,
    "hidden_weight": WEIGHT,
    "kl_weight": WEIGHT,
    "next_token_weight": WEIGHT,
    "norm": CHOICE,
    "normalization": CHOICE,
    "hidden_layers": LAYERS,
    "include_embedding": FLAG,
    "include_final_norm": FLAG,
    "update_penalty": CHOICE,
    "update_penalty_weight": WEIGHT,
    "segments": ((), (0,), (1, -1), (1.5,), (True,), 4, None),
    "replay_rounds": FROM_ZERO,
    "replay_share": SHARE,
    "study": CHOICE,
    "study_rank": COUNT,
    "study_floor": (*ABOVE_ZERO, None),
    "study_steps": COUNT,
    "study_learning_rate": (*ABOVE_ZERO, None),
    "study_passages": COUNT,
    "study_tokens": (*COUNT, 1),
    "study_cue": (*COUNT, 24),
    "study_written_tokens": (*COUNT, 1),
    "study_past": FROM_ZERO,
    "study_rounds": FROM_ZERO,
    "anchor_share": SHARE,
    "anchor_texts": COUNT,
    "anchor_tokens": (*COUNT, 1),
    "sink": CHOICE,
    "positions": CHOICE,
    "teacher": CHOICE,
    "teacher_mixture": SHARE,
    "rollback": CHOICE,
    "held_out_tokens": FROM_ZERO,
    "seed": FROM_ZERO,
}
BAD_STREAM = {
    "context_tokens": COUNT,
    "sync_tokens": (*COUNT, 1),
    "teacher_tokens": FROM_ZERO,
    "flush": CHOICE,
    "flush_temperature": WEIGHT,
    "read_tokens": COUNT,
    "max_new_tokens": COUNT,
    "temperature": WEIGHT,
    "top_p": (0.0, 1.1, math.nan, "1", None),
    "gate": CHOICE,
}


@pytest.mark.parametrize(("kind", "bad"), [(AbsorbConfig, BAD_ABSORB), (StreamConfig, BAD_STREAM)])
def test_the_tables_have_every_field(kind, bad):
    assert [field.name for field in dataclasses.fields(kind)] == list(bad)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kind, bad in ((AbsorbConfig, BAD_ABSORB), (StreamConfig, BAD_STREAM))
        for name, values in bad.items()
        for value in values
    ],
)
def test_a_bad_value_is_refused_by_name(kind, name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be .*; got "):
        kind(**{name: value})


def test_something_must_be_learned():
    with pytest.raises(ConfigError, match="nothing to learn"):
        AbsorbConfig(hidden_weight=0, kl_weight=0, next_token_weight=0)


def test_values_at_the_edge_are_taken():
    AbsorbConfig(threshold=0, teacher_mixture=1, warmup_steps=0, seed=0, max_steps=1, rank=1, alpha=0.5)
    AbsorbConfig(segments=(1,), replay_rounds=0, replay_share=1, anchor_share=0, anchor_texts=1, anchor_tokens=2)
    StreamConfig(context_tokens=1, sync_tokens=2, top_p=1, temperature=0)


@pytest.mark.parametrize("settings", [part for pair in PRESETS.values() for part in (pair.absorb, pair.stream)])
def test_to_json_and_back(settings):
    assert type(settings).from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_lists_become_tuples_and_back():
    config = AbsorbConfig(target_modules=("q_proj",), adapted_layers=(0, 1), hidden_layers=(2,))
    assert config.to_dict()["target_modules"] == ["q_proj"]
    assert AbsorbConfig.from_dict(config.to_dict()) == config


def test_settings_do_not_change_and_replace_checks():
    config = AbsorbConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3
    assert config.replace(rank=3) == AbsorbConfig(rank=3)
    with pytest.raises(ConfigError, match="rank must be 1 or more; got 0"):
        config.replace(rank=0)
    with pytest.raises(ConfigError, match="unknown setting speed, turbo for AbsorbConfig; known are adam_epsilon, "):
        config.replace(turbo=1, speed=2)
    with pytest.raises(ConfigError, match="unknown setting self"):
        config.replace(self=1)


def test_the_window_is_context_and_subsequent_text():
    assert StreamConfig(context_tokens=3, sync_tokens=4).window_tokens == 7


def test_presets():
    assert list(PRESETS) == ["default", "paper"]
    assert preset("default").absorb == AbsorbConfig()
    assert preset("default").stream == StreamConfig()
    assert preset("paper") is PRESETS["paper"]
    with pytest.raises(ConfigError, match="no preset 'fast'; there are default, paper"):
        preset("fast")


def write(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_toml_file_changes_what_it_names(tmp_path):
    path = write(
        tmp_path, '[absorb]\nrank = 3\nlearning_rate = 1\ntarget_modules = ["q_proj"]\n[stream]\nsync_tokens = 9'
    )
    read = read_toml(path, PRESETS["paper"])
    assert read.absorb == PRESETS["paper"].absorb.replace(rank=3, learning_rate=1, target_modules=("q_proj",))
    assert read.stream == PRESETS["paper"].stream.replace(sync_tokens=9)
    assert read_toml(write(tmp_path, ""), PRESETS["paper"]) == PRESETS["paper"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[absorb]\nturbo = 1", "unknown setting turbo"),
        ("[absorb]\nself = 1", "unknown setting self"),
        ("[absorb]\nrank = 0", "rank must be 1 or more; got 0"),
        ("[absorb]\nrank = 'big'", "rank must be int; got 'big'"),
        ("[absorb]\nhidden_layers = [[1]]", "hidden_layers must be a list of int or nothing"),
        ("[absorb]\nrank = {a = 1}", "rank must be int"),
        ("[training]\nrank = 1", "has training; its tables may be"),
        ("rank = 1", "has rank; its tables may be"),
        ("absorb = 3", "has absorb; its tables may be"),
        ("[[stream]]\nsync_tokens = 4", "has stream; its tables may be"),
        ("[absorb", "cannot read the settings file"),
        (b"\xff\xfe", "cannot read the settings file"),
    ],
)
def test_a_bad_toml_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_toml(write(tmp_path, text), PRESETS["default"])


def test_a_missing_toml_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        read_toml(tmp_path / "none.toml", PRESETS["default"])


@pytest.mark.parametrize("module", ["absorber", "absorber.config", "absorber.errors"])
def test_the_settings_are_imported_without_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
