"""LoRA of one stream, by putting W + s B A in the place of W."""

import torch
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D


class PlainLora:
    """The matrices of one stream of an adapter, copied from it, as leaves."""

    def __init__(self, adapter, stream=0, dtype=torch.float32):
        self.down = {name: self._leaf(weight[stream], dtype) for name, weight in adapter.down.items()}
        self.up = {name: self._leaf(weight[stream], dtype) for name, weight in adapter.up.items()}
        self.scale = adapter.alpha / next(iter(self.down.values())).shape[0]

    @staticmethod
    def _leaf(weight, dtype):
        return weight.detach().clone().to(dtype).requires_grad_()

    def leaves(self):
        return [weight for name in self.down for weight in (self.down[name], self.up[name])]

    def products(self):
        return [self.scale * self.up[name] @ self.down[name] for name in self.down]

    def run(self, model, **inputs):
        """Call the model with the merged weights."""
        merged = {}
        for name, product in zip(self.down, self.products(), strict=True):
            projection = model.get_submodule(name)
            weight = projection.weight.detach()
            merged[f"{name}.weight"] = weight + (product.T if isinstance(projection, Conv1D) else product).to(weight)
        return functional_call(model, merged, kwargs=inputs)
