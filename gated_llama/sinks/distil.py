# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Train a model to say what its base says (the KL divergence of their next-token distributions), and if asked to have its
states, with a penalty on massive ones: what an edit cost is made good, and what is massive becomes calm.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from gated_llama.gates import is_gate
from gated_llama.inspection.attention import decoder_layers
from gated_llama.inspection.losses import last_states
from gated_llama.sinks.layers import Lengths, lengths_seen
from gated_llama.training.trainer import checkpoint_activations


AT_ONCE = 512  # tokens whose logits are held
KEPT = 2_048  # tokens of a step of which all that layers make is held; of more it is made anew on the way back


@dataclass(frozen=True)
class DistilSettings:
    """
    How to distil.

    Attributes:
        train: `"gates"` and the biases of v and o beside them, or `"layers"`, everything but embeddings and head.
        lr, gate_lr: of weights and of gates, divided by Σ|w| with w the weights of the norm that layers begin with (the
            median layer's), so that a step moves what they make of its output alike in every model. Models differ
            tenfold in these weights. Rates fall to a tenth, along a cosine, after a tenth of the steps in which they
            rise.
        bias_lr: of the biases of v and o, bias_lr · the RMS of the base's residual states (a median).
        states: weight of how far states are from the base's (see [`distance`]).
        penalty, times: weight of the penalty on long states, and from how many medians on they are long (see
            [`long_states`]).
        frozen: parts of names of weights that stay as they are.
    """

    train: str = "gates"
    lr: float = 0.0175  # 1e-4 for SmolLM2-135M, 9.5e-6 for Qwen2.5-0.5B; at twice as much SmolLM2 goes astray (LOG.md)
    gate_lr: float = 0.175
    bias_lr: float = 1.6e-4
    states: float = 40.0  # the more, the less long texts pay, and the less calm becomes what is massive (LOG.md)
    penalty: float = 0.04
    times: float = 2.5
    frozen: tuple[str, ...] = ()


def choose_trained(model: PreTrainedModel, lengths: Lengths, settings: DistilSettings) -> list[dict]:
    """Let only what is to be trained require gradients, and give it in groups: gates, the biases of v and o, others."""
    gates, biases, others = [], [], []
    for name, parameter in model.named_parameters():
        is_bias = name.endswith(("v_proj.bias", "o_proj.bias"))
        group = gates if is_gate(name) else biases if is_bias else others
        chosen = group is not others or (settings.train == "layers" and ".layers." in name)
        parameter.requires_grad = chosen and not any(part in name for part in settings.frozen)
        if parameter.requires_grad:
            group.append(parameter)
    norms = [layer.input_layernorm.weight.detach().abs().sum() for layer in decoder_layers(model)]
    norm = torch.stack(norms).median().item()
    rms = lengths.limits(1)[0].median().item() / model.config.hidden_size**0.5
    rates = (settings.gate_lr / norm, settings.bias_lr * rms, settings.lr / norm)
    groups = zip((gates, biases, others), rates, strict=True)
    return [{"params": parameters, "lr": lr} for parameters, lr in groups if parameters]


@contextmanager
def long_states(model: PreTrainedModel, limits: tuple[torch.Tensor, torch.Tensor]) -> Iterator[Callable]:
    """
    In the block, `seen(forward)` is what `forward` returns, and of what it passed Σ ReLU(ln(|x| / τ))² over tokens and
    layers, a mean over rows: of the states after layers and of what `down_proj` reads, whose τ are the `limits`, (L)
    and (L).
    """
    limits = dict(zip(("states", "inner"), (values.tolist() for values in limits), strict=True))
    terms: list[torch.Tensor] | None = None  # but in a forward: a layer made anew on the way back counts once

    def see(what: str, layer: int, lengths: torch.Tensor) -> None:
        term = (lengths / limits[what][layer]).clamp_min(1).log().square().sum(1).mean()
        if terms is not None:
            terms.append(term)

    def seen(forward: Callable[[], tuple]) -> tuple[tuple, torch.Tensor]:
        nonlocal terms
        terms = []
        states, penalty = forward(), torch.stack(terms).sum()
        terms = None
        return states, penalty

    with lengths_seen(model, see):
        yield seen


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) in nats a token, of logits (…, V)."""
    teacher, student = (logits.flatten(0, -2).float().log_softmax(-1) for logits in (teacher, student))
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def states_of(model: PreTrainedModel, ids: torch.Tensor, *, every: bool) -> tuple[torch.Tensor, ...]:
    """After `every` layer, (B, T, E), or after the last alone, which are normalised."""
    if not every:
        return (last_states(model, ids),)
    return model.get_decoder()(ids, use_cache=False, output_hidden_states=True).hidden_states[1:]


def distance(states: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], longest: Sequence[float]) -> torch.Tensor:
    """
    Mean of |x − x₀|² / |x₀|² over tokens, then rows and layers, of states (B, T, E) whose x₀ is no longer than
    `longest`: row by row, so that a step is the same however many processes share its rows.
    """
    found = []
    for x, x0, most in zip(states, wanted, longest, strict=True):
        length = x0.norm(dim=2)
        counted = length <= most
        off = (x - x0).square().sum(2) / length.square() * counted  # (B, T)
        found.append((off.sum(1) / counted.sum(1).clamp_min(1)).mean())
    return torch.stack(found).mean()


def loss_of(
    model: PreTrainedModel, states: torch.Tensor, base: PreTrainedModel | None, wanted: torch.Tensor
) -> torch.Tensor:
    """
    In nats a token, of last states (B, T, E): the divergence from what `base` makes of those that are `wanted`; if
    None, the loss of token ids (B, T). Logits are of some tokens at a time, and made anew on the way back: those of a
    long row may outgrow the model.
    """
    if base is None:
        states, wanted = states[:, :-1], wanted[:, 1:]

    def loss(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = model.get_output_embeddings()(states)
        if base is None:
            return nn.functional.cross_entropy(logits.float(), wanted)
        with torch.no_grad():
            teacher = base.get_output_embeddings()(wanted)
        return divergence(teacher, logits)

    states, wanted = states.flatten(0, 1), wanted.flatten(0, 1)
    parts = zip(states.split(AT_ONCE), wanted.split(AT_ONCE), strict=True)
    sums = [len(own) * checkpoint(loss, own, other, use_reentrant=False) for own, other in parts]
    return torch.stack(sums).sum() / len(states)


def distil(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    batches: Sequence[torch.Tensor],
    lengths: Lengths,
    settings: DistilSettings | None = None,
    *,
    state: Path | None = None,
    progress: bool = False,
) -> list[tuple[float, float]]:
    """
    Train `model` in place, a step for each of `batches`. Of several processes each takes its part of every step's rows,
    and all make the same step.

    Args:
        base: whose predictions, and states, are learned; if None, the text itself.
        batches: token ids (B, T), of other lengths from step to step if need be; B at least the number of processes,
            and a multiple of it for rows to count the same.
        lengths: of the base's states, as [`gated_llama.sinks.layers.state_lengths`] gives them.
        state: a file in which training is kept at every quarter; what is there already is gone on from.

    Returns:
        Divergence and penalty of each step, on the rows of this process.
    """
    settings = settings or DistilSettings()
    groups = choose_trained(model, lengths, settings)
    trained, highest = [each for group in groups for each in group["params"]], [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rank, processes = process_of()
    found = _restore(state, model, optimizer) if state and state.exists() else []
    limits = lengths.limits(settings.times)
    longest = limits[0].tolist()[:-1]  # the last states are normalised
    done, total = (sum(ids.numel() for ids in part) for part in (batches[: len(found)], batches))
    desc = f"distilling ({settings.train})"
    bar = tqdm(desc=desc, initial=done, total=total, unit=" tokens", disable=not progress)
    model.train()
    with bar, long_states(model, limits) as seen:
        for batch in batches[len(found) :]:
            for group, lr in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = lr * _rate(len(found), len(batches))
            ids = batch[rank::processes].to(model.device)
            optimizer.zero_grad()
            found.append(_backward(model, base, ids, seen, settings, longest))
            _mean_gradients(trained, processes)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            bar.update(batch.numel())
            bar.set_postfix(loss=f"{found[-1][0]:.3f}", penalty=f"{found[-1][1]:.2f}")
            if state and rank == 0 and len(found) % max(1, len(batches) // 4) == 0:
                _keep(state, model, optimizer, found)
    optimizer.zero_grad()  # gradients of the last step would stay as long as the model
    model.eval()
    return found


def _backward(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    ids: torch.Tensor,
    seen: Callable,
    settings: DistilSettings,
    longest: list[float],
) -> tuple[float, float]:
    """Add to the gradients those of the loss, the distance of states, and the penalty; return loss and penalty."""
    device, every = model.device, base is not None and settings.states > 0
    with made_anew(model) if ids.numel() > KEPT else nullcontext():
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device)):
            states, penalty = seen(lambda: states_of(model, ids, every=every))
            with torch.no_grad():
                wanted = (ids,) if base is None else states_of(base, ids, every=every)
            loss = loss_of(model, states[-1], base, wanted[-1])
            off = distance(states[:-1], wanted[:-1], longest) if every else 0.0
        (loss + settings.states * off + settings.penalty * penalty).backward()
    return loss.item(), penalty.item()


@contextmanager
def made_anew(model: PreTrainedModel) -> Iterator[None]:
    """Context manager: of what layers make, no more is held than what they read; the rest is made anew backwards."""
    checkpoint_activations(model)
    try:
        yield
    finally:
        checkpoint_activations(model, "disable")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for it: where it has none, bf16 is slower than fp32."""
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return device.type == "cuda"


def _rate(step: int, steps: int) -> float:
    """The share of the highest rate: it rises for a tenth of the steps and falls to a tenth, along a cosine."""
    warm = max(1, steps // 10)
    done = (step - warm) / max(1, steps - warm)
    return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def process_of() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _mean_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    if processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= processes


MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter, beside the number of the step


def _keep(file: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, found: list) -> None:
    tensors = {"found": torch.tensor(found, dtype=torch.float64)}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            tensors[name] = parameter.detach()
            tensors |= {f"{name} {moment}": optimizer.state[parameter][moment] for moment in MOMENTS}
    write_whole(file, tensors)


def _restore(file: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    tensors = load_file(file)
    found = tensors.pop("found")
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data.copy_(tensors[name])
            moments = {moment: tensors[f"{name} {moment}"].to(parameter.device) for moment in MOMENTS}
            step = torch.tensor(float(len(found)), device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
    return [tuple(pair) for pair in found.tolist()]


def write_whole(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write safetensors so that what stands under the name is always whole."""
    part = file.with_name(f"{file.name}.part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(file)
