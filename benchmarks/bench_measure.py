# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What measuring costs: `measure` against the plain forward of the same windows, interleaved in one process, once its
numbers have proved to be those of the eager attention maps; and the peak memory of a process that measures one long
window beside one that runs it. Layers are Llama-3.2-1B's, fewer of them; or models are real ones, plain or gated, and
all that `inspect` does by default is done, on as many tokens. Writes a table for people and JSON lines to
benchmarks/results/.

    python benchmarks/bench_measure.py [--widths 1B] [--layers 4] [--lengths 512 2048] [--pairs 5] [--long 32768]
    python benchmarks/bench_measure.py --models build/models/smollm2-135m OUT --text FILE.jsonl [--pairs 1]
        [--device cuda --dtype bfloat16]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig

from configuration_gated import GatedLlamaConfig
from gated_llama import measure, token_windows
from gated_llama.data import read_documents
from gated_llama.inspection import SENTENCE
from gated_llama.loading import load
from measured import RESULTS, append_record, circumstances, keep_record, run_measured, seconds_of, summary
from modeling_gated import GatedLlamaForCausalLM


INSPECTED = 20_000  # tokens of a real model's text


class Tokenizer:
    """As much of one as `measure` asks for."""

    bos_token_id = None

    def decode(self, ids: list[int]) -> str:
        return f"t{ids[0]}"


WIDTHS = {  # hidden and intermediate size, size of a head
    "1B": (2048, 8192, 64),
    "8B": (4096, 14336, 128),
}


def make_model(widths: str, layers: int) -> GatedLlamaForCausalLM:
    torch.manual_seed(0)
    hidden, intermediate, head = WIDTHS[widths]
    config = GatedLlamaConfig(
        **{
            **LlamaConfig(
                hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=hidden // head
            ).to_diff_dict(),
            "num_key_value_heads": 8,
            "head_dim": head,
            "num_hidden_layers": layers,
            "vocab_size": 32000,
            "max_position_embeddings": 2**17,
        }
    )
    return GatedLlamaForCausalLM(config).eval()


@torch.no_grad()
def check(model: GatedLlamaForCausalLM) -> None:
    """The gate before any number."""
    ids = torch.randint(3, 32000, (2, 200))
    report = measure(model, Tokenizer(), ids, compared_windows=1)
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True, labels=ids)
    model.set_attn_implementation("sdpa")
    heads = torch.stack(outputs.attentions)[..., 0].mean((1, 3))
    torch.testing.assert_close(torch.tensor(report.attention.heads), heads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(report.loss), outputs.loss, rtol=1e-5, atol=0)


@torch.no_grad()
def plain(model: GatedLlamaForCausalLM, ids: torch.Tensor) -> None:
    for window in ids:
        states = model.get_decoder()(window[None].to(model.device), use_cache=False).last_hidden_state
        for part in states.split(1024, dim=1):
            model.lm_head(part)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def measure_real(args: argparse.Namespace) -> None:
    """`measure` as `inspect` calls it against the forward, of each model, one after the other on the same text."""
    for folder in args.models:
        model, tokenizer = load(folder, dtype=args.dtype)
        model.eval().to(args.device)
        for length in args.lengths:
            count = max(1, (args.tokens or INSPECTED) // length)
            windows = token_windows(tokenizer, read_documents([args.text]), length)[:count]
            plain(model, windows[:1])  # to get warm
            pairs = []
            for _ in tqdm(range(args.pairs), desc=f"{folder}, {length} tokens"):
                forward = seconds_of(plain, model, windows)
                pairs.append(seconds_of(measure, model, tokenizer, windows, sentence=SENTENCE) / forward)
            print(
                f"{folder}, {windows.numel()} tokens in windows of {length}: {sum(pairs) / len(pairs):.2f}", flush=True
            )
            record = {"model": Path(folder).name, "length": length, "tokens": windows.numel(), "ratio": summary(pairs)}
            record |= {"dtype": args.dtype, "threads": torch.get_num_threads(), **circumstances()}
            keep_record(args.records, record, "model", "length", "dtype", "device", "instructions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", choices=WIDTHS, default="1B", help="of the layers (default: 1B)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: 4)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens (default: 512 2048)")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs a length (default: 5)")
    parser.add_argument(
        "--long", type=int, default=32768, help="tokens of the long window, 0 for none (default: 32768)"
    )
    parser.add_argument("--alone", choices=("plain", "measure"), help="one long window and nothing else")
    parser.add_argument("--models", nargs="+", help="real ones: folders")
    parser.add_argument("--text", help="for them: a text or .jsonl file")
    parser.add_argument("--tokens", type=int, default=0, help=f"of text (default: {INSPECTED:,}, or two windows)")
    parser.add_argument("--dtype", default="float32", help="of real models (default: float32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of real models (default: cpu)")
    parser.add_argument("--records", type=Path, default=RESULTS / "measure.jsonl")
    args = parser.parse_args()
    if args.models:
        measure_real(args)
        return
    if args.alone:
        model, ids = make_model(args.widths, 2), torch.randint(3, 32000, (1, args.long))
        plain(model, ids) if args.alone == "plain" else measure(model, Tokenizer(), ids, compared_windows=0)
        return

    model = make_model(args.widths, args.layers)
    check(model)
    ratios = {}
    for length in args.lengths:
        ids = torch.randint(3, 32000, (max(2, args.tokens // length), length))
        kinds = {
            "forward": partial(plain, model, ids),
            "measure": partial(measure, model, Tokenizer(), ids, compared_windows=0),
        }
        pairs = []
        for number in tqdm(range(args.pairs), desc=f"{length} tokens"):
            taken = {kind: seconds_of(kinds[kind]) for kind in sorted(kinds, reverse=number % 2 == 1)}
            pairs.append(taken["measure"] / taken["forward"])
        ratios[length] = summary(pairs)
    memory = {}
    for kind in ("plain", "measure") if args.long else ():
        command = [sys.executable, __file__, "--alone", kind, "--long", str(args.long), "--widths", args.widths]
        seconds, peak = run_measured(command)
        memory[kind] = {"seconds": seconds, "peak_mib": peak}

    for length, ratio in ratios.items():
        print(f"measure / forward, {length:6} tokens: {ratio['median']:.2f} ({ratio['q25']:.2f} to {ratio['q75']:.2f})")
    for kind, values in memory.items():
        print(f"{args.long} tokens, 2 layers, {kind:8}: {values['peak_mib']:,.0f} MiB, {values['seconds']:.0f} s")
    record = {
        "widths": args.widths,
        "ratios": ratios,
        "memory": memory,
        "tokens": args.tokens,
        "long": args.long,
        "layers": args.layers,
        "threads": torch.get_num_threads(),
        **circumstances(),
    }
    append_record(args.records, record)


if __name__ == "__main__":
    main()
