# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The main job from end to end: on a real model if it is there, else on a small one trained here.

The real one (SmolLM2-135M, from benchmarks/models.py) is converted and verified, its attention sink is moved into the
gates, and what that costs is measured. The small one learns from text that every machine has, its gates are fine-tuned,
and what they do is shown.
"""

import argparse
import json
import random
import shutil
import sys
import sysconfig
import time
from pathlib import Path


PROMPT = "def __init__(self"
BLOCK = 128  # tokens the model sees at once
BATCH = 16
WINDOW = 256  # tokens of a window of the real model
QUESTION = "What is gravity?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("build/models/smollm2-135m"),
        help="a real model's folder (default: build/models/smollm2-135m; a small one is trained if it is not there)",
    )
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens to move its sink by (default: 24)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the base model (default: 300)")
    parser.add_argument("--gate-steps", type=int, default=250, help="training steps of the gates (default: 250)")


def run(args: argparse.Namespace) -> None:
    print("Loading PyTorch and Transformers …", file=sys.stderr)
    (run_real if (args.model / "config.json").is_file() else run_small)(args)


def run_real(args: argparse.Namespace) -> None:
    started = time.monotonic()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_gated  # noqa: F401  (registers the Auto classes)
    from gated_llama import convert_checkpoint
    from gated_llama.conversion.verify import no_bars_of_transformers
    from gated_llama.data import pack
    from gated_llama.sinks.judge import judge
    from gated_llama.sinks.move import move_sinks
    from gated_llama.sinks.picture import draw_sinks

    gated, moved, picture = (args.output / name for name in ("gated", "moved", "sinks.png"))
    for folder in (gated, moved):
        shutil.rmtree(folder, ignore_errors=True)

    heading(1, f"Conversion of {args.model}: gates are added, nothing changes", 4)
    result = convert_checkpoint(args.model, gated, gate_bias=True)
    print(f"{result.gate_parameters:,} gate parameters beside {result.other_parameters:,}; {result.verification}")

    heading(2, "Its attention sink is moved into the gates: no training, one pass over some text", 4)
    with no_bars_of_transformers():
        model = AutoModelForCausalLM.from_pretrained(gated, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gated)
    windows = pack([tokenizer("\n\n".join(python_reference()), verbose=False).input_ids], WINDOW).rows
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    judged, fitted = windows[:12], windows[12 : 12 + args.windows]
    before = judge(model, judged, judged, quantizations=())
    print(move_sinks(model, fitted, progress=True))
    after = judge(model, judged, judged, quantizations=())
    model.to(torch.bfloat16).save_pretrained(moved)
    tokenizer.save_pretrained(moved)

    heading(3, "A chat with the model that has no sink", 4)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(f"> {QUESTION}\n{tokenizer.decode(said, skip_special_tokens=True)}")

    heading(4, f"Done in {time.monotonic() - started:.0f} s", 4)
    draw_sinks(before, after, picture)
    print(
        f"A sink was in {before.sink_rate:.0%} of heads and windows, and is in {after.sink_rate:.1%} now; the loss on "
        f"other text went from {before.loss:.3f} to {after.loss:.3f} ({after.loss / before.loss - 1:+.1%}); to "
        f"read the last 64 tokens only costs {after.short_window:+.2f} nats where it cost {before.short_window:+.2f}.\n"
        f"The picture: {picture}\nThe model:   {moved}"
    )
    print(f"To make it better by training: gated-llama desink {args.model} OUT --text YOUR.jsonl")


def train_small(tokenizer, texts: list[str], steps: int, folder: Path) -> None:
    """A small Llama, from scratch."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from gated_llama import GatedTrainer
    from gated_llama.data import pack, tokenize
    from gated_llama.training.trainer import training_arguments

    rows = pack(tokenize(tokenizer, texts), BLOCK)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * BLOCK,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {rows.tokens:,} tokens of text; {steps} steps of {BATCH * BLOCK}")
    arguments = training_arguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=6e-3,
        weight_decay=0.1,
        logging_steps=0.1,
        save_strategy="no",
    )
    GatedTrainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_small(args: argparse.Namespace) -> None:
    started = time.monotonic()
    from transformers import AutoModelForCausalLM

    import modeling_gated  # noqa: F401  (registers the Auto classes)
    from gated_llama import (
        FinetuneSettings,
        convert_checkpoint,
        finetune_checkpoint,
        measure,
        token_windows,
    )
    from gated_llama.scripts.inspect_model import print_gates, print_models

    base, gated, tuned = (args.output / name for name in ("base", "gated", "gated-tuned"))
    for folder in (base, gated, tuned):
        shutil.rmtree(folder, ignore_errors=True)

    heading(1, "A small Llama learns from the Python standard library")
    texts = standard_library()
    tokenizer = train_tokenizer(texts)
    data, eval_data = args.output / "train.jsonl", args.output / "eval.jsonl"
    write_lines(data, texts[5:])
    write_lines(eval_data, texts[:5])
    train_small(tokenizer, texts[5:], args.steps, base)

    heading(2, "Conversion: gates are added, nothing changes")
    result = convert_checkpoint(base, gated)
    print(f"{result.gate_parameters:,} gate parameters beside {result.other_parameters:,}; {result.verification}")

    heading(3, "The gates are fine-tuned, everything else stays")
    before = sample(AutoModelForCausalLM.from_pretrained(gated), tokenizer)
    settings = FinetuneSettings(
        train="gates",
        steps=args.gate_steps,
        length=BLOCK,
        batch_size=BATCH,
        gate_lr=2e-2,
        eval_data=(str(eval_data),),
        log_steps=max(1, args.gate_steps // 10),
    )
    result = finetune_checkpoint(gated, [data], tuned, settings, announce=print)
    print(result.verdict)

    heading(4, "What the gates do now (1 is open, 0 shut, 2 the most)")
    windows = token_windows(tokenizer, texts[:5], BLOCK)[:24]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tuned)]
    measured = [measure(model, tokenizer, windows, batch_size=8) for model in models]
    print_models(measured)
    print_gates(measured[1])

    heading(5, f"Generation from {PROMPT!r}, before and after")
    for name, text in (("before", before), ("after", sample(models[1], tokenizer))):
        print(f"--- {name}\n{text}")

    heading(6, f"Done in {time.monotonic() - started:.0f} s. The folders, and what to do next")
    print(f"base        {base}\nconverted   {gated}\ngates tuned {tuned}\n")
    print(f"gated-llama inspect {tuned} --text README.md")
    print(f"gated-llama convert {base} {args.output / 'elementwise'} --gate-type elementwise")
    print("gated-llama convert YOUR-LLAMA-OR-QWEN-FOLDER-OR-HUB-ID ./gated")


def heading(number: int, text: str, of: int = 6) -> None:
    print(f"\n[{number}/{of}] {text}", flush=True)


def python_reference() -> list[str]:
    """English prose that comes with Python: its language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def standard_library(files: int = 200) -> list[str]:
    """Sources and docs of the Python standard library, the same choice every time."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path for path in folder.glob("**/*.py") if "site-packages" not in path.parts and "test" not in str(path)
    )
    random.Random(0).shuffle(paths)
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths[:files]]


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text), encoding="utf-8")


def train_tokenizer(texts: list[str]):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=1024, special_tokens=list(special.values()), show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)


def sample(model, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    from gated_llama.scripts.cli import run_alone

    sys.exit(run_alone(sys.modules[__name__]))
