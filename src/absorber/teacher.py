"""What the student is synchronized with: the model that still sees the context.

Algorithm 2 as written lets the model with its own memory teach (`memory`), which copies every round's error into
the next; the pristine base model (`base`) keeps the teacher where it was (docs/method.md).

Shapes: B streams, N context tokens, M subsequent tokens, D hidden.
"""

import torch
from torch import Tensor

from absorber.adapter import Adapter
from absorber.backbone import Backbone, States, forward_states, with_sink
from absorber.config import AbsorbConfig
from absorber.graphs import StepGraphs, without_masks
from absorber.synchronization import Target


def hidden_layers(backbone: Backbone, config: AbsorbConfig) -> tuple[int, ...]:
    """Which hidden states are compared, numbered as in `forward_states`; none if they have no weight.

    Raises:
        ConfigError: If `hidden_layers` names a layer that the model does not have.
    """
    num_layers = len(backbone.blocks)
    if config.hidden_weight == 0:
        return ()
    layers = config.hidden_layers or tuple(range(num_layers + config.include_final_norm))
    config.check("hidden_layers", all(0 <= layer <= num_layers for layer in layers), f"between 0 and {num_layers}")
    return ((-1,) if config.include_embedding else ()) + layers


@torch.no_grad()
def teach(
    backbone: Backbone,
    adapter: Adapter,
    context_BN: Tensor,
    subsequent_BM: Tensor,
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    segments: int = 1,
    graphs: StepGraphs | None = None,
) -> Target:
    """Run the teacher over context and subsequent text (line 1 of Algorithm 1, arXiv 2604.20915).

    Args:
        backbone: The model, with `adapter` attached.
        adapter: The memory of the earlier rounds.
        context_BN: X.
        subsequent_BM: Y.
        config: `teacher` chooses among base, memory and mixture.
        sink_id: Token before X, or None.
        segments: Into how many pieces Y is cut, each read as if it alone followed X.
        graphs: Where the pass of the pristine base is recorded and replayed, from `graphs_of`; None to run it as it is.

    Returns:
        Hidden states at the positions of Y. A mixture averages hidden states and log-probabilities.
    """
    pieces_BT = subsequent_BM.reshape(subsequent_BM.shape[0] * segments, -1)
    input_ids_BT = with_sink(sink_id, torch.cat([context_BN.repeat_interleave(segments, dim=0), pieces_BT], dim=1))
    first = input_ids_BT.shape[1] - pieces_BT.shape[1]
    layers = hidden_layers(backbone, config)

    def run(input_ids_BT: Tensor = input_ids_BT) -> States:
        states = forward_states(backbone, input_ids_BT, first=first, layers=layers)
        return states.rejoined(subsequent_BM.shape[0])

    def recorded() -> States | None:
        def final(input_ids_BT: Tensor) -> Tensor:
            with without_masks(backbone):
                return run(input_ids_BT).final_BTD

        if graphs is None or layers:
            return None
        final_BTD = graphs.run(("base", first, subsequent_BM.shape), final, [input_ids_BT], None)
        return None if final_BTD is None else States(layers=(), final_BTD=final_BTD)

    if config.teacher == "memory":
        own = run()
        return Target(layers=own.layers, finals=((1.0, own.final_BTD),))
    with adapter.disabled():
        base = recorded() or run()
    if config.teacher == "base":
        return Target(layers=base.layers, finals=((1.0, base.final_BTD),))
    own = run()
    share = config.teacher_mixture
    mixed = tuple(torch.lerp(b.float(), o.float(), share) for b, o in zip(base.layers, own.layers, strict=True))
    return Target(layers=mixed, finals=((1 - share, base.final_BTD), (share, own.final_BTD)))
