# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Proof that a converted checkpoint computes what its source does: both are run, one after the other, on the same inputs.

The inputs are random token ids in odd shapes: a batch with left padding, the same without a mask, and token by token
with a cache. Three things are then measured:

1. the result as it is: with gates that are exactly 1 (open, scale 2) every output must be equal to the bit; with gates
   that are 1 to rounding (open, another scale) the difference must stay within `BOUND_ULPS`; gates drawn at random
   are meant to differ;
2. for the latter two, the result with its gates set to exactly 1 in memory: equal to the bit;
3. the negative control, gates moved off open: the outputs must differ, or the comparison proves nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from configuration_gated import GatedLlamaConfig
from gated_llama.errors import VerificationError
from modeling_gated import AttentionGate


BATCH, TOKENS, DECODED = 3, 19, 5  # odd, and DECODED of the tokens go one by one through a cache
# Largest difference allowed to gates that are 1 only to rounding, in units of the dtype's epsilon times the largest
# output: rounding in every layer adds up, and so do its echoes in the layers above.
BOUND_ULPS = 32


@dataclass(frozen=True)
class Verification:
    """What was measured; differences are the largest absolute ones over all outputs."""

    dtype: str
    exact: bool  # equal to the bit as it is
    max_difference: float
    bound: float | None  # None: not held to one, because the gates are not meant to be open
    max_output: float
    control_difference: float  # with gates moved off open

    def __str__(self) -> str:
        control = f"with the gates moved off open they differ by {self.control_difference:.3g}"
        if self.exact:
            return f"outputs equal to the bit in {self.dtype}; {control}"
        held = "random gates, not held to a bound" if self.bound is None else f"bound {self.bound:.3g}"
        return (
            f"outputs differ by {self.max_difference:.3g} of at most {self.max_output:.3g} in {self.dtype} ({held}), "
            f"and by nothing with the gates set to 1; {control}"
        )


def verify_conversion(
    source_folder: Path,
    source_class: type[PreTrainedModel],
    source_config: PreTrainedConfig,
    gated_folder: Path,
    gated_class: type[PreTrainedModel],
    config: GatedLlamaConfig,
    *,
    progress: bool = True,
) -> Verification:
    """
    Compare the gated checkpoint in `gated_folder` with the one it came from (or became: the order is the caller's).
    The folder that is being written need not have a config.json yet.

    Raises:
        VerificationError: they do not compute the same, or the negative control shows no difference.
    """
    with tqdm(total=3, desc="verifying", unit="run", disable=not progress) as bar:
        source = _load(source_class, source_folder, source_config)
        expected = _observe(source)
        dtype = str(source.dtype).removeprefix("torch.")
        eps = torch.finfo(source.dtype).eps
        del source
        bar.update()

        gated = _load(gated_class, gated_folder, config)
        actual = _observe(gated)
        bar.update()
        _set_gates(gated, lambda parameter: parameter.zero_())
        opened = _observe(gated)
        _set_gates(gated, lambda parameter: parameter.fill_(0.5))
        control = _observe(gated)
        bar.update()

    max_output = max(tensor.abs().max().item() for tensor in expected)
    exact = config.gate_init == "open" and config.gate_scale == 2
    bound = 0.0 if exact else BOUND_ULPS * eps * max_output if config.gate_init == "open" else None
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
            f"with every gate at 1 the outputs differ from the source's by "
            f"{_difference(expected, opened):.3g} in {dtype}."
        )
    if bound is not None and not (result.exact or result.max_difference <= bound):
        raise VerificationError(
            f"the outputs differ from the source's by {result.max_difference:.3g} in {dtype}; {bound:.3g} is allowed."
        )
    if not result.control_difference > 0:
        raise VerificationError("moving the gates off open changed no output, so equal outputs prove nothing.")
    return result


def _load(model_class: type[PreTrainedModel], folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    # The generation config is not compared, and looking for it needs a config.json.
    return model_class.from_pretrained(
        folder, config=config, generation_config=GenerationConfig(), local_files_only=True
    ).eval()


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
