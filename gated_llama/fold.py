# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Fold the first token's massive activations away, in closed form.

Under a causal mask the states of a first token that is always the same depend on nothing: they are constants. Whatever
reads them does so through an RMSNorm, to which x and α·x are the same. So how long they are is a convention, and a
model whose MLPs make them a hundred times as long as other tokens' computes the same with states of common length.
"""

from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gated_llama.diagnose import decoder_layers
from gated_llama.errors import UserError


LONG = 2.0  # times the mean length of the others', from which on a first token's vector is shortened


@torch.no_grad()
def fold_first_token(
    model: PreTrainedModel, windows: torch.Tensor, *, ridge: float = 1e-4, batch_size: int = 8, progress: bool = False
) -> list[float]:
    """
    Edit `model` in place, a layer at a time: its MLP puts out what makes the first token's state α times what it was,
    as long as those of other tokens are on average, by a rank-one edit of `down_proj`; and what `down_proj` reads gets
    their length too, by one of `up_proj`. Queries, keys, values and logits stay what they are, but for what the edits
    do to other tokens. It takes no gradient, no gates, and two forwards of `windows` a layer.

    Args:
        model: a model with Llama's layers, gated or not.
        windows: token ids (B, T) without padding, each beginning with the token that all texts begin with; many more
            tokens than `intermediate_size`.
        ridge: of the regressions, as a share of the other tokens' mean square. The smaller, the less these change, and
            the larger the weights that the edits write.

    Returns:
        α of each layer; 1 where there was nothing to shorten.

    Raises:
        UserError: the windows begin with different tokens.
    """
    if (windows[:, 0] != windows[0, 0]).any():
        raise UserError(
            "the windows begin with different tokens, whose states are not constant: let each begin with the "
            "beginning-of-text token (a model without one cannot be folded)."
        )
    layers = decoder_layers(model)
    wanted = [moments.first for moments in _see(model, windows[:1], 1, *layers)]  # (E) each
    shares = []
    for layer, state in zip(tqdm(layers, desc="folding", unit=" layers", disable=not progress), wanted, strict=True):
        up, down = layer.mlp.up_proj, layer.mlp.down_proj
        output, read, inner = _see(model, windows, batch_size, layer, up, down)
        shares.append(_share(output.length, state))
        if min(shares) == 1:  # where a layer before was edited this one has its part to do, however long its states are
            continue
        share = _share(inner.length, inner.first)
        _add(up, (share - 1) * up(read.first.to(up.weight.dtype)).double(), read.direction(ridge))
        output, inner = _see(model, windows, batch_size, layer, down)
        _add(down, shares[-1] * state - output.first, inner.direction(ridge))
    return shares


def _share(length: float, first: torch.Tensor) -> float:
    share = length / first.norm().item()
    return share if share < 1 / LONG else 1.0


def _add(linear: nn.Linear, change: torch.Tensor, direction: torch.Tensor) -> None:
    linear.weight += torch.outer(change, direction).to(linear.weight.dtype)


class _Moments:
    """Of vectors (B, T, E): the first token's (E), and of the others the mean length and the mean square (E, E)."""

    def __init__(self):
        self.tokens, self.lengths, self.squares = 0, 0.0, 0.0

    def add(self, vectors: torch.Tensor) -> None:
        vectors = vectors.double()
        self.first, rest = vectors[0, 0], vectors[:, 1:].flatten(0, 1)
        self.tokens += len(rest)
        self.lengths += rest.norm(dim=1).sum().item()
        self.squares = self.squares + rest.T @ rest

    @property
    def length(self) -> float:
        return self.lengths / self.tokens

    def direction(self, ridge: float) -> torch.Tensor:
        return separating(self.first, with_ridge(self.squares / self.tokens, ridge))


def with_ridge(second: torch.Tensor, ridge: float) -> torch.Tensor:
    """The mean square `second` (E, E) of some vectors, and on its diagonal that share of its mean."""
    return second + ridge * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype, device=second.device)


def separating(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Of all u (E) with u·first = 1, the one that is smallest on vectors with the mean square `second` (E, E): to add y·uᵀ
    to a weight adds y to what it makes of `first`, and as little as can be to what it makes of the others.
    """
    direction = torch.linalg.solve(second, first)
    return direction / (direction @ first)


def _see(model: PreTrainedModel, windows: torch.Tensor, batch_size: int, *modules: nn.Module) -> list[_Moments]:
    """What linears read, and what layers put out, while `model` reads the windows."""
    seen = [_Moments() for _ in modules]

    def add(moments: _Moments, module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        vectors = inputs[0] if isinstance(module, nn.Linear) else output
        moments.add(vectors if isinstance(vectors, torch.Tensor) else vectors[0])

    with ExitStack() as stack:
        for module, moments in zip(modules, seen, strict=True):
            stack.callback(module.register_forward_hook(partial(add, moments)).remove)
        for rows in windows.split(batch_size):
            model.get_decoder()(rows.to(model.device), use_cache=False)
    return seen
