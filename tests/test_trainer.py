# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""GatedTrainer takes what Trainer takes (docs/trainer.md), with in-tree Llama under Trainer as control."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fresh import run_fresh
from gated_llama import GatedTrainer, UserError, convert_checkpoint, train_only_gates
from gated_llama.checkpoints.folder import GATES_NAME
from gated_llama.gates import is_gate
from tiny import published, source_model, token_ids


ROWS = [{"input_ids": row, "labels": row} for row in token_ids(8, 12).tolist()]
CHECKPOINTING = "activation_checkpointing"  # its newer name
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
ALL_BUT_GATES = {"gate_lr": 0.0}  # then the gates stay open, and training is that of the Llama


@pytest.fixture
def folders(tmp_path):
    published(tmp_path / "llama", source_model("llama"))
    convert_checkpoint(tmp_path / "llama", tmp_path / "gated", progress=False, verify=False)
    return tmp_path / "llama", tmp_path / "gated"


def arguments(tmp_path, **settings):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    return TrainingArguments(str(tmp_path / "out"), **{**defaults, "disable_tqdm": True, **settings})


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


class Plain(torch.optim.SGD):
    """Given as `optimizer_cls_and_kwargs`."""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"weight_decay": 0.1, "max_grad_norm": 0.5},
        {"gradient_accumulation_steps": 2},
        {CHECKPOINTING: True},
        {"neftune_noise_alpha": 5.0},
        {"bf16": True},
    ],
    ids=str,
)
def test_losses_are_those_of_llama_under_trainer(tmp_path, folders, settings):
    settings = {"logging_steps": 1, "save_strategy": "no", **settings}
    found = []
    for trainer_class, folder, more in ((Trainer, folders[0], {}), (GatedTrainer, folders[1], ALL_BUT_GATES)):
        trainer = trainer_class(
            load(folder), arguments(tmp_path, **settings), train_dataset=ROWS, eval_dataset=ROWS[:2], **more
        )
        found.append(losses(trainer))
    # Open gates add nothing; their gradient has a share in the norm that clips.
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_plain_trainer_smooths_labels_of_the_next_token(tmp_path, folders):
    batch = {"input_ids": token_ids(2), "labels": token_ids(2)}
    found = []
    for folder in folders:
        trainer = Trainer(load(folder), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=ROWS)
        found.append(trainer.compute_loss(trainer.model.eval(), dict(batch)).item())
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_optimizers_of_the_callers(tmp_path, folders, given):
    model = load(folders[1])
    if given == "optimizers":
        optimizer = Plain(model.parameters(), lr=1e-2)
        trainer = GatedTrainer(
            model, arguments(tmp_path, lr_scheduler_type="constant"), train_dataset=ROWS, optimizers=(optimizer, None)
        )
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
    else:
        trainer = GatedTrainer(
            model, arguments(tmp_path), train_dataset=ROWS, optimizer_cls_and_kwargs=(Plain, {"lr": 1e-2})
        )
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, Plain)
        assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.5, 1e-2, 1e-2]
        trainer.create_optimizer()  # and again, as hyperparameter_search does, from the same arguments


def test_an_optimizer_with_groups_of_its_own(tmp_path, folders):
    model = load(folders[1])
    choice = (Plain, {"lr": 1e-2, "params": list(model.parameters())})
    trainer = GatedTrainer(model, arguments(tmp_path), train_dataset=ROWS, optimizer_cls_and_kwargs=choice)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1
    choice = (Plain, {"lr": 1e-2, "params": list(model.parameters())})
    with pytest.raises(UserError, match="Plain forms its parameter groups itself"):
        GatedTrainer(
            model, arguments(tmp_path), train_dataset=ROWS, optimizer_cls_and_kwargs=choice, gate_lr=1.0
        ).train()


def test_model_init_and_no_arguments(tmp_path, folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = GatedTrainer(model_init=lambda: load(folders[1]), args=arguments(tmp_path), train_dataset=ROWS)
    assert trainer.train().global_step == 3
    assert trainer.train().global_step == 3  # another model, as a search makes one for each trial
    assert GatedTrainer(load(folders[1]), train_dataset=ROWS).args.output_dir == "tmp_trainer"
    with pytest.raises((RuntimeError, ValueError)):  # as Trainer
        GatedTrainer(args=arguments(tmp_path))


@pytest.mark.parametrize("trained", ["gates", "all"])
def test_the_best_model_is_loaded_at_the_end(tmp_path, folders, trained):
    model = load(folders[1])
    if trained == "gates":
        train_only_gates(model)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    settings |= {"max_steps": 5, "lr_scheduler_type": "constant", "learning_rate": 0.6}
    trainer = GatedTrainer(
        model, arguments(tmp_path, **settings), train_dataset=ROWS, eval_dataset=ROWS[:2], gate_lr=5.0
    )
    trainer.train()
    measured = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert measured[-1] - min(measured) > 1e-4  # the last step is not the best, or nothing is shown
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(measured), abs=1e-5)


def test_gates_alone_checkpoints_hold_gates_and_save_model_the_whole(tmp_path, folders):
    model = load(folders[1])
    train_only_gates(model)
    trainer = GatedTrainer(model, arguments(tmp_path, save_steps=2), train_dataset=ROWS, gate_lr=1e-2)
    trainer.train()
    assert [path.name for path in (tmp_path / "out" / "checkpoint-2").glob("*.safetensors")] == [GATES_NAME]
    trainer.save_model(str(tmp_path / "final"))
    assert torch.equal(load(tmp_path / "final")(token_ids()).logits, model.eval()(token_ids()).logits)
    resumed = load(folders[1])
    train_only_gates(resumed)
    again = GatedTrainer(resumed, arguments(tmp_path, save_steps=2), train_dataset=ROWS, gate_lr=1e-2)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.eval()(token_ids()).logits, model(token_ids()).logits)


def test_a_regression_is_not_judged_in_nats(tmp_path, folders):
    generator = torch.Generator().manual_seed(3)
    targets = (torch.randn(80, generator=generator) * 10).tolist()
    rows = [
        {"input_ids": row, "labels": target} for row, target in zip(token_ids(80, 12).tolist(), targets, strict=True)
    ]
    found = []
    for trainer_class, folder in zip((Trainer, GatedTrainer), folders, strict=True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, problem_type="regression")
        settings = {"max_steps": 40, "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no"}
        found.append(losses(trainer_class(model, arguments(tmp_path, **settings), train_dataset=rows)))
    assert max(found[0]) - min(found[0]) > 6  # what would be a divergence of a language model
    assert len(found[1]) == 40 and sum(found[1]) == pytest.approx(sum(found[0]), rel=0.1)


def test_a_loss_of_the_callers_is_not_judged_in_nats_and_receives_its_arguments(tmp_path, folders):
    def large(outputs, labels, num_items_in_batch=None):
        large.calls += 1
        return outputs.logits.square().mean() * (1 + 100 * large.calls)

    for trainer_class, folder in zip((Trainer, GatedTrainer), folders, strict=True):
        large.calls = 0
        settings = arguments(tmp_path, max_steps=15, learning_rate=0.0)
        trainer_class(load(folder), settings, train_dataset=ROWS, compute_loss_func=large).train()
        assert large.calls == 15


def test_metrics_callbacks_and_preprocessed_logits(tmp_path, folders):
    seen = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    for trainer_class, folder in zip((Trainer, GatedTrainer), folders, strict=True):
        settings = arguments(tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=4)
        settings.load_best_model_at_end, settings.metric_for_best_model = True, "constant"
        trainer = trainer_class(
            load(folder),
            settings,
            train_dataset=ROWS,
            eval_dataset={"one": ROWS[:2]},
            compute_metrics=lambda prediction: {"shape": float(prediction.predictions.ndim), "constant": 1.0},
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            callbacks=[Counts],
        )
        settings.metric_for_best_model = "one_constant"
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        trainer.train()
        assert trainer.state.global_step == 3  # stopped early
        assert trainer.evaluate(ROWS[:2])["eval_shape"] == 2.0
    assert seen == [1, 2, 3] * 2


def test_gates_are_trained_at_their_rate_and_the_rest_at_its(tmp_path, folders):
    model = load(folders[1])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    GatedTrainer(model, arguments(tmp_path, learning_rate=0.0), train_dataset=ROWS, gate_lr=1e-2).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if is_gate(name)}


def test_training_can_be_imported_where_there_is_no_resource_module():
    """As on Windows."""
    code = "import sys, torch.distributed.checkpoint.state_dict; sys.modules['resource'] = None; "
    code += "import gated_llama.training.trainer, gated_llama.training.finetune; print('imported')"
    done = run_fresh(code)
    assert done.stdout.strip() == "imported", done.stderr
