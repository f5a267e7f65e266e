# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Watch a training run: what the gates do, layer by layer, next to the loss; and the end of a run that went wrong."""

import math
import sys
import time
from collections import deque

import psutil
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from gated_llama.errors import UserError
from gated_llama.gates import gate_modules, gate_values, is_gate


PROBES = 64  # tokens whose gates are followed through the run
UNMOVED = 1e-3  # a mean change of the gates below this is none
BARS = "▁▂▃▄▅▆▇"  # an open gate is the one in the middle


class GateMonitor(TrainerCallback):
    """
    Add to every log of a `Trainer`, beside its loss and learning rate:

    - `gate_mean`, `gate_below_0.1`, `gate_above_1.5` (shares) and `gate_moved` (mean |gate − 1|) over the tokens of the
      last step on this process, and each of them by layer as `…/layer_00`;
    - `gate_drift`, the mean change of the gates of the first tokens seen, held fixed, since the run began;
    - `grad_norm_gates` and `grad_norm_rest`, before clipping;
    - `tokens_per_second` over all processes (with `include_num_input_tokens_seen`), of the time spent in steps, and
      `peak_memory_gb` of this one.

    Only the steps that are logged are measured. Callbacks are told of a log one after the other, so put it before those
    of `report_to`, as [`GateTraining`] does: `trainer.callback_handler.callbacks.insert(0, …)`.
    """

    def __init__(self):
        self.steps: tuple[int, int] = (0, 0)
        self.drift: float | None = None
        self._gates: dict[int, list[nn.Module]] = {}
        self._trained = False
        self._hooks: list = []
        self._sums: dict[int, torch.Tensor] = {}
        self._probes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._drifts: dict[int, torch.Tensor] = {}
        self._norms: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.unhook()
        self.__init__()
        self._gates = gate_modules(model)
        self._trained = any(p.requires_grad for name, p in model.named_parameters() if is_gate(name))
        self.steps = (state.global_step, state.global_step)
        drifts = [log["gate_drift"] for log in state.log_history if "gate_drift" in log]  # of a run that is resumed
        self.drift = drifts[-1] if drifts else None
        self._tokens, self._seconds = state.num_input_tokens_seen, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = time.monotonic()
        step = state.global_step + 1
        if step == self.steps[0] + 1 or step % state.logging_steps == 0 or step == state.max_steps:
            self._sums.clear()
            self._hooks = [
                gate.register_forward_hook(lambda module, inputs, output, layer=layer: self._see(layer, module, inputs))
                for layer, gates in self._gates.items()
                for gate in gates
            ]

    @torch.no_grad()
    def _see(self, layer: int, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if getattr(module, "_is_replica", False):  # of DataParallel, on another device
            return
        states = inputs[0].detach()  # (B, T, E)
        gate = gate_values(module, states).float()  # (B, T, N·G)
        moved = (gate - 1).abs()
        seen = torch.stack([torch.ones_like(gate), gate, gate < 0.1, gate > 1.5, moved]).sum(tuple(range(1, 4)))
        self._sums[layer] = self._sums.get(layer, 0) + seen.cpu().double()
        if layer not in self._probes:
            probe = states.flatten(0, 1)[:PROBES].clone()
            self._probes[layer] = (probe, gate_values(module, probe).float())
        probe, start = self._probes[layer]
        self._drifts[layer] = (gate_values(module, probe).float() - start).abs().mean().cpu()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._hooks:
            grads = [(is_gate(name), p.grad) for name, p in model.named_parameters() if p.grad is not None]
            for group, wanted in (("gates", True), ("rest", False)):
                self._norms[group] = _norm([grad for gate, grad in grads if gate == wanted])

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds += time.monotonic() - self._begun
        self.unhook()
        self.steps = (self.steps[0], state.global_step)
        control.should_log |= state.global_step == state.max_steps  # the end of a run is always told
        if self._drifts:
            self.drift = torch.stack(list(self._drifts.values())).mean().item()

    def unhook(self) -> None:
        """Look no more, until the next step that is logged."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        added = {}
        if self._sums:
            layers = {layer: (sums[1:] / sums[0]).tolist() for layer, sums in sorted(self._sums.items())}
            for number, name in enumerate(("gate_mean", "gate_below_0.1", "gate_above_1.5", "gate_moved")):
                values = {layer: measured[number] for layer, measured in layers.items()}
                added[name] = sum(values.values()) / len(values)
                added |= {f"{name}/layer_{layer:02}": value for layer, value in values.items()}
            added["gate_drift"] = self.drift
        if self._norms:
            # Measured after clipping; what the gradients were before, the Trainer knows of all of them together.
            clipped = math.hypot(*self._norms.values())
            factor = float(logs.get("grad_norm", clipped)) / clipped if clipped else 1.0
            added |= {f"grad_norm_{group}": norm * factor for group, norm in self._norms.items()}
        if state.num_input_tokens_seen > self._tokens:
            added["tokens_per_second"] = (state.num_input_tokens_seen - self._tokens) / self._seconds
        self._tokens, self._seconds = state.num_input_tokens_seen, 0.0
        added["peak_memory_gb"] = _peak_memory() / 1e9
        logs.update(added)
        state.log_history[-1].update(added)

    def verdict(self) -> str:
        """One line that says what the gates did in this run."""
        first, last = self.steps
        steps = f"from step {first} to {last}" if first < last else f"up to step {last}"
        if not self._trained:
            return "The gates were frozen."
        if self.drift is None:
            return "The gates were not looked at."
        if self.drift < UNMOVED:
            return (
                f"The gates did not move: {self.drift:.1g} on average {steps}. Train longer, or with a higher learning "
                "rate for the gates."
            )
        return f"The gates moved by {self.drift:.3f} on average {steps}."


def _norm(grads: list[torch.Tensor]) -> float:
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    # One by one: sharded and whole gradients are not reduced together.
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm().item() if norms else 0.0


def _peak_memory() -> int:
    """Bytes: of the accelerator's memory if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LiveView(ProgressCallback):
    """The Trainer's bar, and for each log one readable line above it, on stderr."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.unit = " steps"
        self._since = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        """Leave the time between two steps (evaluations, checkpoints) out of the bar's rate and ETA."""
        if self.training_bar is not None:
            between = time.monotonic() - self._since
            self.training_bar.start_t += between
            self.training_bar.last_print_t += between

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self._since = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")
            tqdm.write(log_line(state.global_step, logs), file=sys.stderr)
        elif "eval_loss" in logs:
            tqdm.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", file=sys.stderr)


def log_line(step: int, logs: dict) -> str:
    """One line of the live view; the bars are the mean gate of each layer, from 0 to 2."""
    parts = [f"step {step}: loss {logs['loss']:.4f}"]
    if "gate_mean" in logs:
        layers = [value for name, value in logs.items() if name.startswith("gate_mean/")]
        drawn = "".join(BARS[max(0, min(6, round(value * 3)))] for value in layers)
        parts.append(
            f"gates {drawn} mean {logs['gate_mean']:.3f}, |g-1| {logs['gate_moved']:.4f}, "
            f"<0.1 {logs['gate_below_0.1']:.1%}, >1.5 {logs['gate_above_1.5']:.1%}"
        )
    if "grad_norm_gates" in logs:
        parts.append(f"gradient gates {logs['grad_norm_gates']:.2g}, rest {logs['grad_norm_rest']:.2g}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"peak {logs['peak_memory_gb']:.1f} GB")
    return " | ".join(parts)


class LossGuard:
    """
    Told the loss of every step, it ends a run that went wrong: at once if a loss is not finite, and, of losses in nats
    per token, when the mean of the last 10 is 3 nats above the lowest such mean and above the first.
    """

    WINDOW, RISE = 10, 3.0

    def __init__(self, *, in_nats: bool = True):
        self._in_nats = in_nats
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._first: float | None = None
        self._lowest = math.inf

    def check(self, loss: float, step: int, rates: str) -> None:
        """
        Take note of a step's loss, and end the run if it went wrong.

        Args:
            loss: in nats per token, or in what else the loss of the run is.
            step: the number of the step, from 1.
            rates: the learning rates, to name in the error.

        Raises:
            UserError: the run went wrong; it says at which step, and what likely did it.
        """
        if not math.isfinite(loss):
            raise UserError(f"the loss of step {step} is {loss}. {self._cause(rates)}")
        self._recent.append(loss)
        if len(self._recent) < self.WINDOW:
            return
        mean = sum(self._recent) / self.WINDOW
        self._first = mean if self._first is None else self._first
        self._lowest = min(self._lowest, mean)
        if self._in_nats and mean > self._lowest + self.RISE and mean > self._first:
            raise UserError(
                f"the loss has diverged: {mean:.3g} over the {self.WINDOW} steps before step {step}, up from "
                f"{self._lowest:.3g}. {self._cause(rates)}"
            )

    def _cause(self, rates: str) -> str:
        if not self._recent:
            return (
                "No step had been taken, so the likely cause is the checkpoint: weights that are not finite, or too "
                "large for float16 (use float32 or bfloat16)."
            )
        return f"The likely cause is a learning rate that is too high ({rates}): lower it and start again."
