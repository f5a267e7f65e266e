# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Proof that two checkpoints compute the same: both are run, one after the other, on the same inputs.

The inputs are random token ids in odd shapes: a batch with left padding, the same without a mask, and token by token
with a cache. Then:

1. the outputs are compared as they are. `"equal"`: to the bit, where nothing may differ (gates that are open at scale 2
   are exactly 1). `"rounding"`: within `BOUND_ULPS`, where the mathematics says equal but sums are taken in another
   order. `"reported"`: any difference is measured only (gates drawn at random are meant to differ);
2. where gates were added to a model without, it must be equal to the bit with every gate set to 1 in memory;
3. the negative control: with the gates moved, the outputs must differ, or the comparison proves nothing.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from gated_llama.errors import VerificationError
from modeling_gated import AttentionGate


BATCH, TOKENS, DECODED = 3, 19, 5  # odd, and DECODED of the tokens go one by one through a cache
NEW_TOKENS = 8  # greedy, with and without a cache
# Largest difference allowed to "rounding", in units of the dtype's epsilon times the largest output: rounding in every
# layer adds up, and so do its echoes in the layers above.
BOUND_ULPS = 32


@dataclass(frozen=True)
class Verification:
    """The result of a comparison; differences are the largest absolute ones over all outputs."""

    dtype: str
    exact: bool  # equal to the bit as it is
    max_difference: float
    bound: float | None  # None: not held to one
    max_output: float
    control_difference: float  # with the gates moved

    def __str__(self) -> str:
        control = f"with the gates moved they differ by {self.control_difference:.3g}"
        if self.exact:
            return f"outputs equal to the bit in {self.dtype}; {control}"
        held = "not held to a bound" if self.bound is None else f"bound {self.bound:.3g}"
        return (
            f"outputs differ by {self.max_difference:.3g} in {self.dtype} ({held}; the largest is "
            f"{self.max_output:.3g}); {control}"
        )


def verify(
    load_other: Callable[[], PreTrainedModel],
    load_gated: Callable[[], PreTrainedModel],
    expect: str,
    *,
    gates_added: bool = False,
    greedy: bool = False,
    progress: bool = True,
) -> Verification:
    """
    Compare a gated model with the one it came from or became.

    Args:
        load_other, load_gated: make the models; called one after the other, so that one is in memory at a time.
        expect: `"equal"`, `"rounding"` or `"reported"`.
        gates_added: the other model has no gates, and the gated one with gates of 1 must be equal to the bit.
        greedy: greedy generation must give the same tokens, with and without a cache.

    Raises:
        VerificationError: they do not compute the same, or the negative control shows no difference.
    """
    with no_bars_of_transformers(), tqdm(total=3, desc="verifying", unit="run", disable=not progress) as bar:
        other = load_other().eval()
        expected, tokens = _observe(other), _generate(other) if greedy else None
        dtype = str(other.dtype).removeprefix("torch.")
        eps = torch.finfo(other.dtype).eps
        del other
        bar.update()

        gated = load_gated().eval()
        actual, gated_tokens = _observe(gated), _generate(gated) if greedy else None
        bar.update()
        opened = expected
        if gates_added:
            _set_gates(gated, lambda parameter: parameter.zero_())
            opened = _observe(gated)
        _set_gates(gated, lambda parameter: parameter.fill_(0.5))
        control = _observe(gated)
        bar.update()

    max_output = max(tensor.abs().max().item() for tensor in expected)
    bound = {"equal": 0.0, "rounding": BOUND_ULPS * eps * max_output, "reported": None}[expect]
    result = Verification(
        dtype=dtype,
        exact=all(map(torch.equal, expected, actual)),
        max_difference=_difference(expected, actual),
        bound=bound,
        max_output=max_output,
        control_difference=_difference(expected, control),
    )
    if not all(map(torch.equal, expected, opened)):
        raise VerificationError(
            f"with every gate at 1 the outputs differ by {_difference(expected, opened):.3g} in {dtype}."
        )
    if bound is not None and not (result.exact or result.max_difference <= bound):
        raise VerificationError(
            f"the outputs differ by {result.max_difference:.3g} in {dtype}; {bound:.3g} is allowed."
        )
    if greedy and not torch.equal(tokens, gated_tokens):
        raise VerificationError("greedy generation gives other tokens.")
    if not result.control_difference > 0:
        raise VerificationError("moving the gates changed no output, so equal outputs prove nothing.")
    return result


@contextmanager
def no_bars_of_transformers():
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _generate(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    # Not the checkpoint's own settings: one of the two may lack them.
    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    return torch.cat([model.generate(ids, attention_mask=mask, use_cache=use) for use in (True, False)])


@torch.no_grad()
def _observe(model: PreTrainedModel) -> list[torch.Tensor]:
    """Outputs, on inputs that depend on nothing but the vocabulary's size; float, and only where there is a token."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (BATCH, TOKENS), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    for row in range(1, BATCH):
        mask[row, : 4 * row + 1] = 0  # left padding

    base = model if model.can_generate() else model.base_model  # of the other heads, the states they read

    def run(**inputs):
        outputs = base(**inputs)
        return outputs, outputs.logits if base.can_generate() else outputs.last_hidden_state

    seen = [run(input_ids=ids, attention_mask=mask)[1][mask.bool()], run(input_ids=ids)[1]]
    outputs, states = run(input_ids=ids[:, :-DECODED], use_cache=True)
    seen.append(states)
    for token in range(TOKENS - DECODED, TOKENS):
        outputs, states = run(
            input_ids=ids[:, token : token + 1], past_key_values=outputs.past_key_values, use_cache=True
        )
        seen.append(states)
    if base is not model:
        seen += [value for value in model(ids[:1]).values() if isinstance(value, torch.Tensor)]
    return seen


@torch.no_grad()
def _set_gates(model: nn.Module, change) -> None:
    """Give every gate scale 2, at which zero weights are a gate of exactly 1, and change its parameters."""
    for module in model.modules():
        if isinstance(module, AttentionGate):
            module.scale = 2.0
            for parameter in module.parameters():
                change(parameter)


def _difference(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    # where(): an overflowed fp16 output is infinite in both
    differences = (torch.where(a == b, 0.0, a.double() - b.double()) for a, b in zip(expected, actual, strict=True))
    return max(difference.abs().max().item() for difference in differences)
