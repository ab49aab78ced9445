"""Memories on disk: exact, readable by PEFT, refused if damaged, foreign, or of another base model."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch

import absorber
from absorber import Memory, MemoryFileError, MemoryMismatchError
from absorber.backbone import fingerprint


@pytest.fixture
def memory(model, tokenizer, config, stream, text):
    return absorber.absorb(model, tokenizer, text, config, stream)


@pytest.fixture
def saved(memory, tmp_path):
    memory.save(tmp_path / "memory")
    return tmp_path / "memory"


def same_weights(one, other):
    assert list(one.adapter.down) == list(other.adapter.down)
    return all(map(torch.equal, one.adapter.parameters(), other.adapter.parameters()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha": 2.5},
        {"adapted_layers": (1,), "target_modules": ("down_proj", "q_proj")},
        {"adapter_dtype": "bfloat16"},
    ],
)
def test_saved_and_loaded_it_is_the_same(model, tokenizer, config, stream, text, tmp_path, changes):
    memory = absorber.absorb(model, tokenizer, text, config.replace(**changes), stream)
    memory.save(tmp_path / "memory")
    again = Memory.load(tmp_path / "memory", model)
    assert same_weights(again, memory)
    for field in dataclasses.fields(Memory):
        if field.name != "adapter":
            assert getattr(again, field.name) == getattr(memory, field.name), field.name
    assert again.adapter.alpha == memory.adapter.alpha
    assert again.num_rounds == len(again.ledger) > 0
    ids = torch.arange(1, 20)[None]
    with memory.applied_to(model), torch.no_grad():
        ours = model(ids).logits
    with again.applied_to(model), torch.no_grad():
        assert torch.equal(model(ids).logits, ours)


def test_peft_loads_a_part_of_the_layers(model, tokenizer, config, stream, text, tmp_path):
    from peft import PeftModel

    changes = {"alpha": 2.5, "adapted_layers": (1,), "target_modules": ("down_proj", "q_proj")}
    memory = absorber.absorb(model, tokenizer, text, config.replace(**changes), stream)
    memory.save(tmp_path / "memory")
    ids = torch.arange(1, 20)[None]
    with memory.applied_to(model), torch.no_grad():
        ours = model(ids).logits
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "memory").eval()
    adapted = {name for name, _ in theirs.named_modules() if name.endswith("lora_A")}
    assert adapted == {f"base_model.model.{name}.lora_A" for name in memory.adapter.down}
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_types_are_nearly_the_same(memory, model, tmp_path, dtype):
    memory.save(tmp_path / "float32")
    memory.save(tmp_path / "small", dtype=dtype)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("small", "float32")]
    assert sizes[0] < 0.7 * sizes[1]
    again = Memory.load(tmp_path / "small", model)
    assert not same_weights(again, memory)
    for ours, exact in zip(again.adapter.parameters(), memory.adapter.parameters(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-2, atol=1e-4)


def test_going_on_from_a_loaded_memory(model, tokenizer, config, stream, text, saved, memory):
    rounds = memory.num_rounds
    again = absorber.absorb(model, tokenizer, text, memory=Memory.load(saved, model))
    assert again.config == config
    assert again.num_rounds == 2 * rounds
    assert [line.number for line in again.ledger] == list(range(1, 2 * rounds + 1))
    assert again.num_tokens == 2 * len(text)


def test_provenance_is_read_without_a_model(saved, memory, config):
    content = Memory.provenance(saved)
    assert content["base"] == "tiny"
    assert content["config"] == config.to_dict()
    assert content["num_rounds"] == memory.num_rounds
    assert content["absorber"] == absorber.__version__
    assert content["ledger"][0]["context_tokens"] == memory.ledger[0].context_tokens


def test_a_failed_save_keeps_the_old_memory(memory, model, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    memory.num_rounds += 1
    monkeypatch.setattr(absorber.memory, "write_json", failing)  # after the weights are written
    with pytest.raises(KeyboardInterrupt):
        memory.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["memory"]


def test_another_model_is_refused(memory, model, saved):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(MemoryMismatchError, match="absorbed with tiny"):
        Memory.load(saved, other)
    with pytest.raises(MemoryMismatchError, match="absorbed with tiny"), memory.applied_to(other):
        pass
    norms = copy.deepcopy(model)
    with torch.no_grad():
        norms.model.norm.weight[0] += 0.1
    with pytest.raises(MemoryMismatchError):
        memory.check(norms)


def test_types_and_adapters_do_not_change_the_fingerprint(model, memory):
    own = fingerprint(model)
    small, _ = absorber.load("tiny", dtype="bfloat16", device="cpu")
    assert fingerprint(small) == fingerprint(small.float()) == own
    with memory.applied_to(model):
        assert fingerprint(model) == own
    deeper = copy.deepcopy(model)
    deeper.config.num_hidden_layers += 1
    assert fingerprint(deeper) != own


def damage(folder, name, change):
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "no_provenance": (lambda folder: (folder / "absorber.json").unlink(), "is not a memory of Absorber"),
    "no_folder": (shutil.rmtree, "there is no folder"),
    "no_json": (lambda folder: (folder / "absorber.json").write_text("{"), "absorber.json is damaged"),
    "later": (lambda folder: damage(folder, "absorber.json", lambda it: it.update(format=99)), "Install a newer"),
    "no_format": (lambda folder: damage(folder, "absorber.json", lambda it: it.pop("format")), "has format None"),
    "no_key": (lambda folder: damage(folder, "absorber.json", lambda it: it.pop("ledger")), "damaged: 'ledger'"),
    "bad_value": (
        lambda folder: damage(folder, "absorber.json", lambda it: it["config"].update(rank=0)),
        "damaged: rank must be",
    ),
    "bad_line": (lambda folder: damage(folder, "absorber.json", lambda it: it["ledger"][0].pop("number")), "damaged"),
    "bad_config": (lambda folder: damage(folder, "absorber.json", lambda it: it.update(config=3)), "damaged"),
    "no_weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "is not a memory: adapter_model.safetensors is missing",
    ),
    "cut_weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20),
        "memory is damaged",
    ),
    "no_settings": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "is not a memory: adapter_config.json is missing",
    ),
    "list_settings": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds list"),
    "no_rank": (lambda folder: damage(folder, "adapter_config.json", lambda it: it.pop("r")), "no r or lora_alpha"),
    "other_method": (
        lambda folder: damage(folder, "adapter_config.json", lambda it: it.update(peft_type="IA3")),
        "holds IA3; only plain LoRA",
    ),
    "dora": (
        lambda folder: damage(folder, "adapter_config.json", lambda it: it.update(use_dora=True)),
        "holds use_dora; only plain LoRA",
    ),
    "bias": (
        lambda folder: damage(folder, "adapter_config.json", lambda it: it.update(bias="all")),
        "holds bias; only plain LoRA",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(saved, model, name):
    change, message = DAMAGES[name]
    change(saved)
    with pytest.raises(MemoryFileError, match=message):
        Memory.load(saved, model)


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    change(weights, next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda it, key: it.pop(key), MemoryFileError, "do not pair up"),
        (lambda it, key: it.clear(), MemoryFileError, "do not pair up"),
        (lambda it, key: it.update({key: it[key][:, :-1].clone()}), MemoryMismatchError, "but tiny needs"),
        (
            lambda it, key: it.update({key.replace("layers.0", "layers.7"): it.pop(key)}),
            MemoryMismatchError,
            "layers.7.* does not have",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, model, change, error, message):
    rewrite(saved, change)
    with pytest.raises(error, match=message):
        Memory.load(saved, model)
