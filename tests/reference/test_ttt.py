"""Fast weights learn and are read as their slow twin does it, stream by stream."""

import pytest
import torch

from absorber.backbone import inspect
from absorber.bench.methods import TTT, Setting
from absorber.config import StreamConfig
from architectures import build
from reference import ttt

SINK = 5


@pytest.mark.parametrize(("rate", "batch"), [(1.0, 4), (0.3, 16), (1.7, 1)])
def test_fast_weights_equal_their_twin(rate, batch):
    model = build("llama")
    text_BT = torch.randint(1, 256, (2, 12 + 10 + 10 + 3), generator=torch.Generator().manual_seed(0))
    where = Setting(
        backbone=inspect(model),
        stream=StreamConfig(context_tokens=10, sync_tokens=12),
        sink_id=SINK,
        num_streams=2,
        seed=0,
    )
    reader = TTT(learning_rate=rate, scale=0.4, batch_tokens=batch).begin(where)
    for start, end in ((0, 12), (12, 22), (22, 35)):  # the last reading drops more than a context at once
        reader.read(text_BT[:, start:end])
    asked_BT = torch.cat([torch.full((2, 1), SINK), reader.windowed()], dim=1)
    with torch.no_grad(), reader.speaking():
        spoken = model(asked_BT).logits
        both = model(asked_BT.repeat_interleave(2, dim=0)).logits
    assert torch.allclose(both, spoken.repeat_interleave(2, dim=0), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(asked_BT).logits, spoken, atol=1e-2)
    for row in range(2):
        fast, own = None, text_BT[row].tolist()
        for context in (own[:10], own[10:20], own[20:23]):
            fast = ttt.learn(model, fast, context, sink_id=SINK, learning_rate=rate, batch_tokens=batch)
        for layer, of_layer in enumerate(fast):
            assert torch.allclose(reader.weights[layer][row], torch.stack(of_layer), atol=1e-5)
        assert torch.allclose(spoken[row], ttt.speak(model, fast, asked_BT[row].tolist(), scale=0.4), atol=1e-4)


def test_the_twin_is_the_model_itself_at_scale_zero():
    model, ids = build("llama"), [SINK, 7, 90, 3, 200]
    fast = ttt.learn(model, None, [1, 2, 3], sink_id=SINK, learning_rate=1.0, batch_tokens=2)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert torch.allclose(ttt.speak(model, fast, ids, scale=0.0), expected, atol=1e-5)
