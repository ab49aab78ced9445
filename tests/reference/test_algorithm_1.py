"""Algorithm 1 equals its twin over the grid of options: losses, gradients, weights after each of several rounds."""

import copy

import pytest
import torch

from absorber import PRESETS, AbsorbConfig
from absorber.absorption import Earlier, absorb_context
from absorber.adapter import Adapter
from absorber.backbone import inspect
from absorber.lessons import Anchors, Lesson, Lessons, Part, Past, Reservoir
from absorber.notes import Notes, given
from absorber.optimizer import new_optimizer
from absorber.student import synchronization_loss
from absorber.study import rows_of_steps
from absorber.teacher import teach
from reference import algorithms as twin
from reference.lora import PlainLora

SINK = 0
ALONE = {"segments": (1,), "replay_rounds": 0, "anchor_share": 0.0}
"""A round on its own text, read whole."""
LEARNING = {"kl_weight": 1.0, "next_token_weight": 0.1}
HIDDEN = {"hidden_weight": 1.0, "kl_weight": 0.0, "next_token_weight": 0.0}

OPTIONS = {
    "default": {},
    "hidden": HIDDEN,
    "hidden_l2": HIDDEN | {"norm": "l2"},
    "hidden_plain": HIDDEN | {"normalization": "none"},
    "hidden_plain_l2": HIDDEN | {"normalization": "none", "norm": "l2"},
    "subset": HIDDEN | {"hidden_layers": (0,)},
    "final_norm_alone": HIDDEN | {"hidden_layers": (2,)},
    "embedding": HIDDEN | {"include_embedding": True, "normalization": "none"},
    "no_final_norm": HIDDEN | {"include_final_norm": False},
    "kl": {"next_token_weight": 0.0},
    "next_token": {"kl_weight": 0.0, "next_token_weight": 1.0},
    "all_terms": {"hidden_weight": 0.5, "kl_weight": 2.0, "next_token_weight": 0.3},
    "no_sink": {"sink": "none", "hidden_weight": 1.0},
    "teacher_positions": {"positions": "teacher", "hidden_weight": 1.0},
    "teacher_positions_no_sink": {"positions": "teacher", "sink": "none"},
    "own_memory": {"teacher": "memory", "hidden_weight": 1.0},
    "mixture": {"teacher": "mixture", "teacher_mixture": 0.3, "hidden_weight": 1.0},
    "penalty_l1": {"update_penalty": "l1", "update_penalty_weight": 5.0},
    "penalty_l2": {"update_penalty": "l2", "update_penalty_weight": 500.0},
    "carry": {"optimizer_state": "carry", "weight_decay": 0.1},
    "constant": {"schedule": "constant", "warmup_steps": 0, "gradient_clip": None},
    "clipped": {"gradient_clip": 0.01},
    "epsilon": {"adam_epsilon": 1e-3},
    "threshold": {"threshold": 5.36},
    "segments": {"segments": (4, 1, 3)},
    "segments_hidden": HIDDEN | {"segments": (2, 3)},
    "segments_no_sink": {"segments": (3,), "sink": "none", "hidden_weight": 1.0},
    "segments_teacher_positions": {"segments": (4,), "positions": "teacher", "hidden_weight": 1.0},
    "segments_teacher_positions_no_sink": {"segments": (6, 1), "positions": "teacher", "sink": "none"},
    "segments_mixture": {"segments": (3, 2), "teacher": "mixture", "hidden_weight": 1.0},
    "paper": {
        key: value
        for key, value in PRESETS["paper"].absorb.to_dict().items()
        if key not in ("rank", "max_steps", "threshold")
    }
    | {"threshold": 0.1},
}


@pytest.fixture(scope="module")
def double(_tiny):
    """In float64, so that the order of the additions does not matter; the RMS norms have a scale that does."""
    model = copy.deepcopy(_tiny[0]).double()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    return model


def settings(name):
    few = {"rank": 3, "max_steps": 4, "learning_rate": 3e-3, "alpha": 5.0}
    return AbsorbConfig.from_dict(few | ALONE | LEARNING | OPTIONS[name])


def begun(backbone, config, num_streams=1):
    """An adapter with a past, so that base and own teacher differ."""
    adapter = Adapter.fresh(backbone, config, num_streams=num_streams)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in adapter.up.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        for weight in adapter.down.values():  # the part that studies
            weight[:, config.rank :] = torch.randn(weight[:, config.rank :].shape, generator=generator) * 0.1
    return adapter


def rounds(number):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 257, (1, 21), generator=generator).split([9, 12], dim=1) for _ in range(number)]


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient(double, name):
    config, backbone = settings(name), inspect(double)
    adapter = begun(backbone, config)
    ((context_BN, subsequent_BM),) = rounds(1)
    sink = SINK if config.sink == "shared" else None
    before, past = adapter.snapshot(), PlainLora(adapter)
    with adapter.attached(backbone):
        lesson = Lesson(context_BN, subsequent_BM, 4, config.segments)
        lesson.target = teach(backbone, adapter, context_BN, subsequent_BM, config, sink_id=sink)
        with torch.no_grad():
            for weight in adapter.parameters():  # as after some steps, so that the update penalty is not zero
                weight += 0.01
        part = Part(lesson, None, own=True)
        loss_B = synchronization_loss(backbone, adapter, before, part, config, sink_id=sink, step=0)
    pieces = lesson.pieces(0)
    assert pieces == config.segments[0]
    gradients = torch.autograd.grad(loss_B.sum(), adapter.parameters(), materialize_grads=True)

    lora, sinks = PlainLora(adapter), [] if sink is None else [sink]
    context, subsequent = context_BN[0].tolist(), subsequent_BM[0].tolist()
    products = [product.detach() for product in past.products()]
    theirs = twin.student_loss(
        double,
        lora,
        len(context),
        subsequent,
        twin.teacher_pass(double, past, context, subsequent, config, sinks),
        products,
        config,
        sinks,
        4,
        pieces=pieces,
    )
    torch.testing.assert_close(loss_B[0].double(), theirs.double(), rtol=1e-5, atol=1e-7)
    for ours, gradient in zip(
        gradients, torch.autograd.grad(theirs, lora.leaves(), materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(ours[0], gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_three_rounds(double, name):
    config, backbone = settings(name), inspect(double)
    adapter = begun(backbone, config)
    lora = PlainLora(adapter)
    carry = config.optimizer_state == "carry"
    ours_optimizer = new_optimizer(adapter.parameters(), config) if carry else None
    twin_optimizer = twin.new_optimizer(lora, config) if carry else None
    stops = []
    for context_BN, subsequent_BM in rounds(3):
        (result,) = absorb_context(
            backbone,
            adapter,
            context_BN,
            subsequent_BM,
            config,
            sink_id=SINK,
            num_generated=3,
            optimizer=ours_optimizer,
        )
        losses, undone = twin.absorb_context(
            double,
            lora,
            context_BN[0].tolist(),
            subsequent_BM[0].tolist(),
            config,
            sink_id=SINK,
            num_generated=3,
            optimizer=twin_optimizer,
        )
        assert result.losses == pytest.approx(losses, rel=1e-4)
        assert result.rolled_back == undone
        stops.append(result.num_steps)
        # The slope of |x| jumps at zero, where rounding decides on which side a change is.
        tolerance = 2e-4 if name == "penalty_l1" else 2e-5
        for ours, theirs in zip(adapter.parameters(), lora.leaves(), strict=True):
            torch.testing.assert_close(ours[0].detach(), theirs.detach(), rtol=1e-3, atol=tolerance)
    assert (min(stops) < config.max_steps) == (name == "threshold")


def test_a_batch_equals_single_streams(double):
    config, backbone = settings("all_terms"), inspect(double)
    adapter = begun(backbone, config, num_streams=3)
    loras = [PlainLora(adapter, b) for b in range(3)]
    for contexts, subsequents in [tuple(torch.cat(parts) for parts in zip(*rounds(3), strict=True))] * 2:
        results = absorb_context(backbone, adapter, contexts, subsequents, config, sink_id=SINK)
        for b, lora in enumerate(loras):
            losses, _ = twin.absorb_context(
                double, lora, contexts[b].tolist(), subsequents[b].tolist(), config, sink_id=SINK
            )
            assert results[b].losses == pytest.approx(losses, rel=1e-4)
            for ours, theirs in zip(adapter.parameters(), lora.leaves(), strict=True):
                torch.testing.assert_close(ours[b].detach(), theirs.detach(), rtol=1e-3, atol=2e-5)


LESSONS = {
    "max_steps": 8,
    "segments": (1, 1, 3),
    "replay_rounds": 2,
    "replay_share": 0.6,
    "anchor_share": 0.4,
    "anchor_texts": 3,
    "anchor_tokens": 5,
    "settling_rounds": 2.0,
    "adam_epsilon": 1e-4,  # or Adam makes a whole step of a gradient that is nothing but rounding errors
}
STUDY = {
    "study": "light",
    "study_rank": 2,
    "study_steps": 5,
    "study_tokens": 4,
    "study_cue": 2,
    "study_past": 1,
    "study_learning_rate": 3e-3,
    "alpha": None,
}
WITH_LESSONS = {
    "losses_of_the_default": {"kl_weight": 0.3, "next_token_weight": 1.0},
    "hidden": HIDDEN,
    "next_token_alone": {"kl_weight": 0.0, "next_token_weight": 1.0},
    "no_sink": {"sink": "none", "hidden_weight": 1.0},
    "teacher_positions": {"positions": "teacher", "hidden_weight": 1.0},
    "own_memory": {"teacher": "memory", "hidden_weight": 1.0},
    "mixture": {"teacher": "mixture"},
    "carry": {"optimizer_state": "carry", "update_penalty": "l2", "update_penalty_weight": 500.0},
    "replay_alone": {"anchor_share": 0.0},
    "anchors_alone": {"replay_rounds": 0},
    "shorter_anchors": {"anchor_tokens": 2},
    "longer_anchors": {"anchor_tokens": 17},
    "study": STUDY,
    "study_without_replay": STUDY | {"replay_rounds": 0, "study_cue": 1, "study_past": 0, "warmup_steps": 0},
    "study_full": STUDY | {"study": "full", "study_written_tokens": 5, "hidden_weight": 1.0, "positions": "teacher"},
    "study_no_sink": STUDY | {"sink": "none", "hidden_weight": 1.0, "gradient_clip": 0.05},
}


def plan_of(own, past, anchors, config, round_number):
    """What the library draws: (for each step "own", "anchor" or the number of a past round; the anchors' texts)."""
    lessons = Lessons(own, past=past, anchors=Anchors(anchors), config=config, round_number=round_number)
    plan, texts = [], []
    for step in range(config.max_steps):
        lesson = lessons.of_step(step)
        if lesson is own:
            plan.append("own")
        elif lesson.is_anchor:
            plan.append("anchor")
            texts = lesson.subsequent_BM[0].reshape(-1, config.anchor_tokens).tolist()
        else:
            plan.append(next(place for place, kept in enumerate(past) if kept is lesson.source))
    return plan, texts


def notes_in(context_BN, subsequent_BM, config):
    """Two passages of a context, the second a token shorter, and if study is full four questions."""
    size = config.study_tokens
    passages_BPS = context_BN[:, : 2 * size].reshape(-1, 2, size).clone()
    passages_BPS[:, 1, -1] = -1
    passages_BPS[:, :, : config.study_cue] = given(passages_BPS[:, :, : config.study_cue])
    count, size = 4 * (config.study == "full"), config.study_written_tokens
    questions_BQT = (
        subsequent_BM.flip(1).repeat(1, 3)[:, : count * size].reshape(len(subsequent_BM), count, size).clone()
    )
    questions_BQT[:, :, :2] = given(questions_BQT[:, :, :2])
    return Notes(passages_BPS, questions_BQT)


@pytest.mark.parametrize(
    ("name", "num_streams"), [*((name, 1) for name in WITH_LESSONS), ("losses_of_the_default", 3), ("hidden", 3)]
)
def test_rounds_with_replay_and_anchors(double, name, num_streams):
    """Five rounds: each stream of a batch is the twin, which sees the lessons as one list of pairs and of texts."""
    config, backbone = settings("default").replace(**LESSONS | WITH_LESSONS[name]), inspect(double)
    adapter, seen = begun(backbone, config, num_streams=num_streams), set()
    loras = [PlainLora(adapter, b) for b in range(num_streams)]
    carry = config.optimizer_state == "carry"
    ours_optimizer = new_optimizer(adapter.parameters(), config) if carry else None
    twin_optimizers = [twin.new_optimizer(lora, config) if carry else None for lora in loras]
    generator = torch.Generator().manual_seed(4)
    anchors = torch.randint(1, 257, (config.anchor_texts, config.anchor_tokens), generator=generator)
    kept = Anchors(anchors)  # with what the base says of them, and of each round
    reservoir, studied = Reservoir(config.replay_rounds, seed=config.seed), []
    all_rounds = rounds(5 * num_streams)
    for number in range(1, 6):
        of_streams = all_rounds[(number - 1) * num_streams : number * num_streams]
        context_BN, subsequent_BM = (torch.cat(parts) for parts in zip(*of_streams, strict=True))
        past, own = list(reservoir.items), Past(context_BN, subsequent_BM)
        plan, texts = plan_of(Lesson(context_BN, subsequent_BM, 3, config.segments), past, anchors, config, number)
        notes, studies = None, []
        if config.study != "off":
            notes = notes_in(context_BN, subsequent_BM, config)
            studies = list(rows_of_steps(notes, studied, subsequent_BM, config, round_number=number))
        seen |= set(plan)
        results = absorb_context(
            backbone,
            adapter,
            context_BN,
            subsequent_BM,
            config,
            sink_id=SINK,
            num_generated=3,
            notes=notes,
            studied=studied,
            earlier=Earlier(past, kept, number, own),
            optimizer=ours_optimizer,
        )
        for b, lora in enumerate(loras):
            losses, undone = twin.absorb_context(
                double,
                lora,
                context_BN[b].tolist(),
                subsequent_BM[b].tolist(),
                config,
                sink_id=SINK,
                num_generated=3,
                optimizer=twin_optimizers[b],
                replayed=[(kept.context_BN[b].tolist(), kept.subsequent_BM[b].tolist()) for kept in past],
                anchor_texts=texts,
                studies=[rows[b].tolist() for rows in studies],
                plan=plan,
                number=number,
            )
            assert results[b].losses == pytest.approx(losses, rel=1e-4)
            assert (results[b].rolled_back, results[b].num_steps) == (undone, config.max_steps)
            assert len(losses) == plan.count("own") + 1 + bool(studies)
            for ours, theirs in zip(adapter.parameters(), lora.leaves(), strict=True):
                torch.testing.assert_close(ours[b].detach(), theirs.detach(), rtol=1e-3, atol=2e-5)
        reservoir.add(own, round_number=number)
        studied += [] if notes is None else [notes]
    assert ("anchor" in seen) == (name not in ("replay_alone", "next_token_alone"))
    assert ({0, 1} <= seen) == (config.replay_rounds > 0)


@pytest.mark.parametrize("sink", ["shared", "none"])
def test_held_out_text_decides_how_much_is_kept(double, sink):
    """Rounds of small and of far too large steps, so that all of it, a part and nothing is kept."""
    backbone, outcomes = inspect(double), set()
    for rate in (1e-3, 3e-3, 1e-2, 3e-2):
        config = settings("default").replace(
            held_out_tokens=5, learning_rate=rate, rollback="nonfinite", next_token_weight=1.0, sink=sink
        )
        adapter = begun(backbone, config, num_streams=3)
        loras = [PlainLora(adapter, b) for b in range(3)]
        for number in range(3):
            of_streams = rounds(9)[3 * number : 3 * number + 3]
            context_BN, subsequent_BM = (torch.cat(parts) for parts in zip(*of_streams, strict=True))
            results = absorb_context(backbone, adapter, context_BN, subsequent_BM, config, sink_id=SINK)
            for b, lora in enumerate(loras):
                losses, undone = twin.absorb_context(
                    double, lora, context_BN[b].tolist(), subsequent_BM[b].tolist(), config, sink_id=SINK
                )
                assert results[b].losses == pytest.approx(losses, rel=1e-4)
                assert results[b].rolled_back == undone
                for ours, theirs in zip(adapter.parameters(), lora.leaves(), strict=True):
                    torch.testing.assert_close(ours[b].detach(), theirs.detach(), rtol=1e-3, atol=2e-5)
                outcomes.add(results[b].outcome)
    assert outcomes == {"absorbed", "shrunk", "rolled_back_held_out"}


def test_text_that_a_model_wrote_and_a_short_text_judge_nothing(double):
    backbone = inspect(double)
    ((context_BN, subsequent_BM),) = rounds(1)
    for changes, generated in (({"held_out_tokens": 11}, 0), ({"held_out_tokens": 3}, 2)):
        adapters = []
        for config in (settings("default").replace(**changes), settings("default")):
            adapters.append(begun(backbone, config))
            absorb_context(
                backbone, adapters[-1], context_BN, subsequent_BM, config, sink_id=SINK, num_generated=generated
            )
        assert all(map(torch.equal, adapters[0].parameters(), adapters[1].parameters()))
