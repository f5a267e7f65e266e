# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transformers' Trainer for gated models: a learning rate for the gates, a view of them, whole and sharded resumes."""

import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as distributed_state
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gated_llama.checkpoints.folder import GATES_NAME
from gated_llama.errors import UserError
from gated_llama.gates import gate_parameter_groups, gate_parameters, is_gate
from gated_llama.training.monitor import GateMonitor, LiveView, LossGuard


class GateTraining:
    """
    For any subclass of `Trainer`, placed before it: the gates have a learning rate of their own and no weight decay,
    every log tells what they do, and a run whose loss is no number, or has diverged, ends. For TRL:

        class GatedSFTTrainer(GateTraining, SFTTrainer): ...

    What Trainer takes, it takes too (docs/trainer.md goes through the arguments).

    Args:
        gate_lr: learning rate of the gates; 50 times that of the weights if None.

    Raises:
        UserError: in training, the loss is no number or has diverged; or `gate_lr` was given with an optimizer that
            forms its parameter groups itself (GaLore, LOMO, Muon and their like).
    """

    def __init__(self, *args, gate_lr: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate_lr = gate_lr
        self.gate_monitor = GateMonitor()
        self.callback_handler.callbacks.insert(0, self.gate_monitor)
        if self.pop_callback(ProgressCallback):
            self.add_callback(LiveView)
        self.pop_callback(PrinterCallback)
        self._step_loss = 0.0

    def train(self, *args, **kwargs):
        self._guard, self._step_loss = LossGuard(in_nats=self._loss_is_in_nats()), 0.0
        try:
            return super().train(*args, **kwargs)
        finally:
            self.gate_monitor.unhook()

    def _loss_is_in_nats(self) -> bool:
        """A language model's own loss; that of a regression or of a function of the caller's may be anything."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        by_model = type(self).compute_loss is Trainer.compute_loss and self.compute_loss_func is None
        return by_model and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        given = self.optimizer_cls_and_kwargs
        optimizer_class, settings = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
        if not plain or {"params", "model", "optimizer_dict"} & settings.keys():
            if self.gate_lr is not None:
                raise UserError(
                    f"{optimizer_class.__name__} forms its parameter groups itself, which leaves no place for gate_lr: "
                    "leave it out, or use another optimizer."
                )
            return super().create_optimizer(model)
        lr, decay = settings.get("lr", self.args.learning_rate), settings.get("weight_decay", self.args.weight_decay)
        groups = gate_parameter_groups(model, lr, self.gate_lr, decay)
        if is_sharded(model):  # fused optimizers take no sharded and whole parameters together
            kinds = [lambda p: hasattr(p, "full_tensor"), lambda p: not hasattr(p, "full_tensor")]
            groups = [{**group, "params": list(filter(kind, group["params"]))} for group in groups for kind in kinds]
            groups = [group for group in groups if group["params"]]
        try:  # "params" there take the place of the Trainer's own groups
            self.optimizer_cls_and_kwargs = (optimizer_class, {**settings, "params": groups})
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._step_loss += loss.item()
        last_of_step = self.accelerator.gradient_state.sync_gradients
        if last_of_step or not math.isfinite(self._step_loss):
            rates = ", ".join(f"{group.get('initial_lr', group['lr']):g}" for group in self.optimizer.param_groups)
            self._guard.check(self._step_loss, self.state.global_step + 1, rates)
            self._step_loss = 0.0
        return loss


class GatedTrainer(GateTraining, Trainer):
    """
    Transformers' Trainer with [`GateTraining`]. Where only gates are trained, the checkpoints of a run hold only gates
    (`save_model` and `push_to_hub` write the whole model); and it resumes models that `DistributedConfig` has sharded,
    which the Trainer alone does not.
    """

    _saves_gates = False  # while a checkpoint of the run is written

    def __init__(self, model=None, args: TrainingArguments | None = None, *more, **kwargs):
        sharded = model is not None and is_sharded(model)
        if not sharded:
            super().__init__(model, args, *more, **kwargs)
            return
        args = TrainingArguments("tmp_trainer") if args is None else args
        save_only_model, args.save_only_model = args.save_only_model, True  # or the Trainer would refuse to save at all
        super().__init__(model, args, *more, **kwargs)
        self.args.save_only_model = save_only_model

    def _save_checkpoint(self, *args, **kwargs):
        self._saves_gates = only_gates_are_trained(self.model) and not self.args.push_to_hub
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._saves_gates = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self._saves_gates:
            super()._save(output_dir, state_dict)
            return
        gates = {name: gathered(parameter) for name, parameter in gate_parameters(self.model)}
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            save_file(gates, os.path.join(output_dir, GATES_NAME), metadata={"format": "pt"})

    def _load_best_model(self) -> None:
        if os.path.isfile(os.path.join(self.state.best_model_checkpoint, GATES_NAME)):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if not os.path.isfile(os.path.join(resume_from_checkpoint, GATES_NAME)) and not is_sharded(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = {}
        for path in Path(resume_from_checkpoint).glob("*.safetensors"):
            weights |= load_file(path)
        options = distributed_state.StateDictOptions(full_state_dict=True, strict=False)
        distributed_state.set_model_state_dict(model, weights, options=options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        options = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = distributed_state.get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(os.path.join(checkpoint, "optimizer.pt"), map_location="cpu", weights_only=True)
        options = distributed_state.StateDictOptions(full_state_dict=True)
        distributed_state.set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))


def only_gates_are_trained(model: torch.nn.Module) -> bool:
    return not hasattr(model, "peft_config") and all(
        is_gate(name) for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter on the CPU, gathered if it is sharded (then every process must ask)."""
    tensor = parameter.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()


def is_sharded(model: torch.nn.Module) -> bool:
    return getattr(model, "is_distributed_loading_by_transformers", False)


def has_accelerator() -> bool:
    return torch.accelerator.is_available()


def checkpoint_activations(model: PreTrainedModel, how: str = "enable") -> None:
    """Or `"disable"` that: layers hold no more than what they read, and make the rest anew on the way back."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # Transformers < 5.22
    getattr(model, f"{name}_checkpointing_{how}")()


def training_arguments(output: str | os.PathLike, **settings) -> TrainingArguments:
    """The Trainer's arguments as this project uses them: a short warm-up, then a cosine; Adam with beta2 0.95."""
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "adam_beta2": 0.95,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "prediction_loss_only": True,
        "include_num_input_tokens_seen": "all",
        "report_to": "none",
        "use_cpu": not has_accelerator(),
        "dataloader_pin_memory": has_accelerator(),
    }
    arguments = TrainingArguments(str(output), **{**defaults, **settings})
    if arguments.n_gpu > 1:  # of one process: several take `torchrun`, not replicas in threads
        arguments._n_gpu = 1
    return arguments
