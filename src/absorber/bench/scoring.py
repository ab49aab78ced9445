"""How well a model predicts a passage, given what it reads and what it remembers.

Shapes: B streams, T tokens of the prefix, P of the passage, D hidden.
"""

import torch
from torch import Tensor

from absorber.backbone import Backbone, forward_states, untouched, with_sink
from absorber.synchronization import Target, distribution_loss, next_token_loss


@torch.no_grad()
def predict_passage(backbone: Backbone, prefix_BT: Tensor, passage_BP: Tensor, *, sink_id: int) -> Tensor:
    """Read sink, prefix and passage at once, with whatever memory is attached.

    Args:
        backbone: The model.
        prefix_BT: What is read before the passage; may have no tokens.
        passage_BP: The passage to be scored.
        sink_id: First token of the input.

    Returns:
        The final hidden states [B, P, D] from which each token of the passage is predicted.
    """
    input_ids_BT = with_sink(sink_id, prefix_BT.to(backbone.device), passage_BP.to(backbone.device))
    with untouched(backbone.model):
        states = forward_states(backbone, input_ids_BT, first=prefix_BT.shape[1])
    return states.final_BTD[:, :-1]


@torch.no_grad()
def passage_nll(backbone: Backbone, final_BPD: Tensor, passage_BP: Tensor) -> Tensor:
    """Mean negative log-likelihood of the passage.

    Args:
        backbone: The model.
        final_BPD: From `predict_passage`.
        passage_BP: The passage.

    Returns:
        [B], float32, in nats per token.
    """
    place = backbone.device
    passage_BP = passage_BP.to(place)
    # The next-token loss scores token t + 1 from state t; here state t predicts token t.
    shifted_BT = torch.cat([passage_BP[:, :1], passage_BP], dim=1)
    padded_BTD = torch.cat([final_BPD, final_BPD[:, -1:]], dim=1)
    return next_token_loss(padded_BTD, shifted_BT, backbone.logits)


@torch.no_grad()
def passage_kl(backbone: Backbone, full_BPD: Tensor, other_BPD: Tensor) -> Tensor:
    """Mean KL(full || other) of the predictions of a passage, [B], in nats; states from `predict_passage`."""
    ids_BP = torch.zeros(full_BPD.shape[:2], dtype=torch.long, device=full_BPD.device)
    target = Target(layers=(), finals=((1.0, full_BPD),))
    return distribution_loss(other_BPD, target, ids_BP, backbone.logits, kl_weight=1, next_token_weight=0)


def gap_closed(without: float, with_memory: float, full: float) -> float:
    """(nll without memory - nll with) / (nll without - nll full): 1 is full attention, more is better than that.

    Returns:
        The ratio; not a number if full attention is no better than no memory, for then there is no gap.
    """
    gap = without - full
    return (without - with_memory) / gap if gap > 0 else float("nan")
