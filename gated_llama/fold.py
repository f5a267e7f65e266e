# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Fold the first token's massive activations away, in closed form.

Under a causal mask the states of a first token that is always the same depend on nothing: they are constants. Attention
and MLPs read them through an RMSNorm, which makes the same of x and of α·x. So how long they are is a convention, and a
model that makes them a hundred times as long as other tokens' computes the same with states of common length, if what
its MLPs add to them keeps the sum at α times what it was.
"""

from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gated_llama.diagnose import decoder_layers
from gated_llama.errors import UserError
from gated_llama.rank_one import add, check, separating, with_ridge


LONG = 2.0  # times the mean length of the others', from which on a first token's vector is shortened
LEAST_SQUARE = 1e4  # times the norms' epsilon: a state with a smaller mean square would feel it


@torch.no_grad()
def fold_first_token(
    model: PreTrainedModel, windows: torch.Tensor, *, ridge: float = 1e-4, batch_size: int = 8, progress: bool = False
) -> list[float]:
    """
    Edit `model` in place, a layer at a time: its MLP puts out what makes the first token's state α times what it was,
    as long as those of other tokens are on average, by a rank-one edit of `down_proj`; and what `down_proj` reads gets
    between half and the whole of their length, by one of `up_proj`. For texts that begin with this token queries, keys,
    values and logits stay what they are, but for what the edits do to other tokens. It takes no training, no gates, and
    two forwards of `windows` a layer. Interrupted, it leaves a model that is neither: load it again.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3, or a gated one.
        windows: token ids (B, T) without padding, each beginning with the token that all texts begin with; many more
            tokens than `intermediate_size`.
        ridge: of the regressions, as a share of the other tokens' mean square. The smaller, the less these change, and
            the larger the weights that the edits write.

    Returns:
        α of each layer; 1 where there was nothing to shorten.

    Raises:
        UserError: the windows begin with different tokens, or the model's layers cannot be edited.
    """
    check(model, windows, ("mlp.up_proj", "mlp.down_proj"), model.config.intermediate_size)
    if (windows[:, 0] != windows[0, 0]).any():
        raise UserError(
            "the windows begin with different tokens, whose states are not constant: let each begin with the "
            "beginning-of-text token (a model without one cannot be folded)."
        )
    model.eval()
    layers = decoder_layers(model)
    least = (LEAST_SQUARE * model.config.rms_norm_eps * model.config.hidden_size) ** 0.5
    states = [seen.first for seen in _see(model, windows[:1, :2], 1, *layers)]  # (E) each, as they were
    shares, edited = [], False
    for layer, state in zip(tqdm(layers, desc="folding", unit=" layers", disable=not progress), states, strict=True):
        up, down = layer.mlp.up_proj, layer.mlp.down_proj
        output, read, inner = _see(model, windows, batch_size, layer, up, down, squares=up)
        length = max(output.length, least)
        long = state.norm().item() > LONG * length
        shares.append(length / state.norm().item() if long else 1.0)
        edited |= long
        if not edited:
            continue
        # A longer vector than the others would be an outlier; to build on a shorter one takes large weights.
        size = inner.first.norm().item()
        share = min(max(size, inner.length / LONG), inner.length) / size
        add(up, (share - 1) * up(read.first.to(up.weight)).double(), read.direction(ridge))
        output, inner = _see(model, windows, batch_size, layer, down, squares=down)
        add(down, shares[-1] * state - output.first, inner.direction(ridge))
    return shares


class _Seen:
    """Of vectors (B, T, E): the first token's (E), the others' mean length, and if wanted their mean square (E, E)."""

    def __init__(self, squared: bool):
        self.squared, self.squares = squared, 0.0
        self.tokens, self.lengths = 0, 0.0
        self.first: torch.Tensor | None = None

    def add(self, vectors: torch.Tensor) -> None:
        vectors = vectors.double()
        self.first, rest = vectors[0, 0], vectors[:, 1:].flatten(0, 1)
        self.tokens += len(rest)
        self.lengths += rest.norm(dim=1).sum().item()
        if self.squared:
            self.squares = self.squares + rest.T @ rest

    @property
    def length(self) -> float:
        return self.lengths / self.tokens

    def direction(self, ridge: float) -> torch.Tensor:
        return separating(self.first, with_ridge(self.squares / self.tokens, ridge))


def _see(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: int,
    *modules: nn.Module,
    squares: nn.Module | None = None,
) -> list[_Seen]:
    """What linears read and layers put out while `model` reads the windows; the mean squares of one of them."""
    found = [_Seen(squared=module is squares) for module in modules]

    def see(seen: _Seen, module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        vectors = inputs[0] if isinstance(module, nn.Linear) else output
        seen.add(vectors if isinstance(vectors, torch.Tensor) else vectors[0])

    with ExitStack() as stack:
        for module, seen in zip(modules, found, strict=True):
            stack.callback(module.register_forward_hook(partial(see, seen)).remove)
        for rows in windows.split(batch_size):
            model.get_decoder()(rows.to(model.device), use_cache=False)
    return found
