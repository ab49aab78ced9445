"""What all tests share: a tiny model that reads bytes, small settings, and a home of its own."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

import absorber
from absorber import kernels
from absorber.backbone import inspect
from absorber.models import load

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory):
    """Keep the tests away from the user's cache, and from the network."""
    before = {key: os.environ.get(key) for key in ("ABSORBER_HOME", "HF_HUB_OFFLINE")}
    os.environ["ABSORBER_HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value


@pytest.fixture(scope="session")
def _tiny():
    return load("tiny", dtype="float32", device="cpu")


@pytest.fixture
def tiny(_tiny):
    """The tiny Llama and its tokenizer; a test that leaves the model changed fails."""
    model, tokenizer = _tiny
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield model, tokenizer
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.fixture
def model(tiny):
    return tiny[0]


@pytest.fixture
def tokenizer(tiny):
    return tiny[1]


@pytest.fixture
def backbone(model):
    return inspect(model)


@pytest.fixture
def kernels_run(monkeypatch):
    """Say that kernels can run here, as they can: by interpretation."""
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    monkeypatch.setattr(kernels, "usable_on", lambda kind: True)


@pytest.fixture
def config():
    """A round of few steps at a rate that a tiny model learns with."""
    return absorber.AbsorbConfig(rank=4, max_steps=3, learning_rate=2e-3, warmup_steps=1)


@pytest.fixture
def stream():
    """A window of 8 + 12 tokens."""
    return absorber.StreamConfig(context_tokens=8, sync_tokens=12, max_new_tokens=6, read_tokens=16)


@pytest.fixture
def text():
    """Bytes, which are the tiny model's tokens: 90 of them."""
    return "It was the best of times, it was the worst of times, it was the age of wisdom, it was the"
