# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Train a gated model with Transformers' Trainer: the gates alone, or all of it with the gates at their own rate."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gated_llama.errors import UserError


# Gates that share the rate of the weights hardly move; a published retrofit of Qwen3-0.6B (takuma104/OutliersInLLM)
# trains them at 50 times that rate.
GATE_RATE = 50


def gate_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of every `attn_gate`."""
    return ((name, parameter) for name, parameter in model.named_parameters() if ".attn_gate." in name)


def train_only_gates(model: nn.Module) -> int:
    """
    Freeze everything but the gates.

    Returns:
        The number of parameters left to train.

    Raises:
        UserError: the model has no gates.
    """
    gates = dict(gate_parameters(model))
    if not gates:
        raise UserError(f"{type(model).__name__} has no gates to train: convert the checkpoint first.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in gates
    return sum(parameter.numel() for parameter in gates.values())


def gate_parameter_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict]:
    """
    Parameter groups for any optimizer: the trainable gates at `gate_lr` (50 · `lr` if None) and never decayed, since
    decay would pull every gate to one half of its scale; the rest at `lr`, matrices with `weight_decay`.
    """
    gates = {name for name, _ in gate_parameters(model)}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rest = {name: parameter for name, parameter in trained.items() if name not in gates}
    groups = [
        {
            "params": [parameter for name, parameter in trained.items() if name in gates],
            "lr": GATE_RATE * lr if gate_lr is None else gate_lr,
            "weight_decay": 0.0,
        },
        {"params": [p for p in rest.values() if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest.values() if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """
    The documents in text files: of a `.jsonl` file the `text` of every line, of any other its whole content.

    Raises:
        UserError: a file cannot be read, or a line has no text.
    """
    texts = []
    for path in map(Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text: {error}.") from None
        if path.suffix != ".jsonl":
            texts.append(content)
            continue
        for number, line in enumerate(content.splitlines(), 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise UserError(f'{path}, line {number}: not a JSON object with a "text", such as {{"text": "…"}}.')
            texts.append(text)
    return texts


def token_blocks(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int) -> torch.Tensor:
    """
    All texts, one after the other with an end-of-text token between them, cut into blocks `(blocks, length)`.

    Raises:
        UserError: the texts do not fill one block.
    """
    ids = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    blocks = len(ids) // length
    if blocks == 0:
        raise UserError(f"the text has {len(ids)} tokens, fewer than one block of {length}: give more text.")
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


def train(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    output: str | Path,
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 2e-5,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """
    Train what `requires_grad`, by next-token prediction on `blocks` (blocks, T), and save the model to `output`.

    Returns:
        The mean training loss in nats per token.
    """
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=not progress,
    )
    optimizer = torch.optim.AdamW(gate_parameter_groups(model, lr, gate_lr, weight_decay), betas=(0.9, 0.95))
    dataset = [{"input_ids": block, "labels": block} for block in blocks]
    trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, None))
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(LossBar)
    trainer.pop_callback(PrinterCallback)
    result = trainer.train()
    model.save_pretrained(output)
    return result.training_loss


class LossBar(ProgressCallback):
    """The Trainer's bar, with the loss on it instead of lines on stdout."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Mean loss in nats per predicted token over `blocks` (blocks, T)."""
    model.eval()
    losses = [model(part, labels=part).loss * len(part) for part in blocks.to(model.device).split(batch_size)]
    return (torch.stack(losses).sum() / len(blocks)).item()
