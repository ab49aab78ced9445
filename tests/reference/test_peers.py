"""Our baselines beside other people's implementations of the same: plain PEFT with torch's optimizer, and rank-bm25."""

import copy
import math
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from absorber.bench.methods import BM25, METHODS, Setting
from absorber.config import StreamConfig

N, M, ROUNDS = 24, 40, 3


def setting(backbone, *, num_streams=1):
    stream = StreamConfig(context_tokens=N, sync_tokens=M)
    return Setting(backbone=backbone, stream=stream, sink_id=0, num_streams=num_streams, seed=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "rates"), [("temp-lora", (1.0, 1.0)), ("temp-lora-16", None)])
def test_temp_lora_is_a_plain_training_loop(name, rates, model, backbone):
    """Next-token loss on what stays in the window, AdamW begun anew in each round, after three rounds."""
    method = METHODS[name]
    config = method.absorb_config
    text = torch.randint(1, 257, (1, M + ROUNDS * N), generator=torch.Generator().manual_seed(3))
    reader = method.begin(setting(backbone))
    first = {key: weight.detach().clone() for key, weight in reader.adapter.down.items()}
    reader.read(text)
    assert [line.outcome for lines in reader.rounds for line in lines] == ["absorbed"] * ROUNDS

    twin = copy.deepcopy(model)
    settings = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(twin, settings)
    weights = dict(tuned.named_parameters())
    place = "base_model.model.{}.lora_{}.default.weight"
    for key, down in first.items():
        weights[place.format(key, "A")].data.copy_(down[0])
    trained = [weight for weight in weights.values() if weight.requires_grad]
    for number in range(ROUNDS):
        begin = (number + 1) * N
        inputs = torch.cat([torch.zeros(1, 1, dtype=torch.long), text[:, begin : begin + M]], dim=1)
        labels = inputs.clone()
        labels[:, :2] = -100  # neither the sink nor what stands behind it alone
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
        for step in range(config.max_steps):
            optimizer.param_groups[0]["lr"] = config.learning_rate * _rate(step, config, rates)
            optimizer.zero_grad()
            tuned(input_ids=inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    for key in first:
        for part, own in (("A", reader.adapter.down[key]), ("B", reader.adapter.up[key])):
            theirs = weights[place.format(key, part)].detach()
            start = first[key][0] if part == "A" else torch.zeros_like(theirs)
            size = (theirs - start).abs().mean()
            assert size > 1e-6  # there is something to agree in
            assert (own[0] - theirs).abs().mean() < 0.02 * size, (key, part)


def _rate(step, config, rates):
    """Up to the peak and down to nothing, in straight lines."""
    if rates is not None:
        return rates[step]
    return min(
        (step + 1) / (config.warmup_steps + 1), (config.max_steps - step) / (config.max_steps - config.warmup_steps)
    )


def test_bm25_finds_what_rank_bm25_finds(backbone):
    """Its scores with Lucene's weights of words, which are never negative, over the same passages."""
    rank_bm25 = pytest.importorskip("rank_bm25")

    class Lucene(rank_bm25.BM25Okapi):
        def _calc_idf(self, nd):
            count = self.corpus_size
            self.idf = {word: math.log(1 + (count - held + 0.5) / (held + 0.5)) for word, held in nd.items()}

    dice, size = random.Random(0), 8
    words = [int(1000 / dice.uniform(1, 1000)) for _ in range(M + 20 * N)]  # a few that come often, many that do not
    reader = BM25(passage_tokens=size, share=size / M).begin(setting(backbone))
    reader.read(torch.tensor([words]))
    older = words[: -(M - size)]
    starts = sorted({*range(0, len(older) - size, size // 2), len(older) - size})
    theirs = Lucene([older[start : start + size] for start in starts])
    for _ in range(40):
        query = dice.sample(words, 6)
        scores = theirs.get_scores(query).tolist()
        best = max(range(len(starts)), key=lambda place: (round(scores[place], 4), starts[place]))
        found = reader.windowed([query])[0, :size].tolist()
        assert found == older[starts[best] : starts[best] + size]
