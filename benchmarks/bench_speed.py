# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the gate costs: Llama, ours, the in-tree gated attentions and the retrofit by hooks on the same weights (see
contestants.py), once each has proved to compute what it should. Every contestant does the same work once a round, in
rotating order; a ratio is to Llama in the same round, and Llama's to itself is the noise. Beside each figure stands its
limit: the ratio of FLOPs, or for decoding of bytes read, with and without the gate's projection. Layers have their
full width, and are few. Writes one JSON line to benchmarks/results/; speed_table.py makes the table of it.

    python benchmarks/bench_speed.py [--device cpu] [--pairs 15]
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.utils import logging

import speed_table
from contestants import (
    GATE_TYPES,
    NAMES,
    PEERS,
    TOLERANCE,
    CorrectnessError,
    check,
    distance,
    llama_config,
    make_contestants,
)
from measured import circumstances, peak_of, run_measured, seconds_of, summary


CONTEXT = 128  # tokens in the cache when decoding begins
FEW = ("llama", "llama-again", *GATE_TYPES)
NO_HOOKS = tuple(name for name in NAMES if not name.startswith("hook"))
LAYERS = {
    "cpu": {"Qwen3-0.6B": 2, "Llama-3.2-1B": 1, "8B": 1},
    "cuda": {"Qwen3-0.6B": 8, "Llama-3.2-1B": 4, "8B": 2},  # more of them than its cache holds
}


@dataclass(frozen=True)
class Case:
    """A work: `tokens` at once (prefill, training, first token), or one after the other (decode)."""

    work: str
    shape: str
    tokens: int = 0
    batch: int = 1
    cache: str = ""  # of decoding: dynamic or static
    compiled: bool = False
    checkpointing: bool = False
    names: tuple[str, ...] = NAMES
    pairs: int | None = None  # where it is not the number asked for


def cases_of(device: str) -> list[Case]:
    prefill, training = partial(Case, "prefill"), partial(Case, "training")
    decode = partial(Case, "decode", tokens=4)
    return [
        prefill("Qwen3-0.6B", 128),
        prefill("Qwen3-0.6B", 512),
        prefill("Qwen3-0.6B", 2048, names=FEW),
        prefill("Qwen3-0.6B", 8192, names=FEW, pairs=5 if device == "cpu" else None),
        prefill("Llama-3.2-1B", 128),
        prefill("Llama-3.2-1B", 512, names=FEW),
        prefill("8B", 128, names=FEW),
        decode("Qwen3-0.6B", cache="dynamic"),
        decode("Qwen3-0.6B", cache="static"),
        decode("Qwen3-0.6B", cache="static", compiled=True, names=NO_HOOKS),
        decode("Qwen3-0.6B", cache="dynamic", batch=8),
        decode("Qwen3-0.6B", cache="static", batch=8, compiled=True, names=FEW),
        decode("Llama-3.2-1B", cache="dynamic"),
        decode("Llama-3.2-1B", cache="dynamic", batch=8, names=FEW),
        decode("8B", cache="dynamic", names=FEW),
        training("Qwen3-0.6B", 512),
        training("Qwen3-0.6B", 512, checkpointing=True, names=FEW),
        training("Llama-3.2-1B", 128, names=FEW),
        Case("first token", "Qwen3-0.6B", 128, names=FEW),
    ]


# --- limits ---------------------------------------------------------------------------------------------------------


def limit_of(case: Case, config: LlamaConfig, gate_type: str) -> float:
    """The ratio of multiplications (of bytes read, when decoding) in a layer with the gate's projection and without."""
    queries = config.num_attention_heads * config.head_dim
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    values = config.num_attention_heads * (1 if gate_type == "headwise" else config.head_dim)
    weights = config.hidden_size * (2 * queries + keys_and_values + 3 * config.intermediate_size)
    # causal attention: each query meets half of the keys, then half of the values; decoding reads the whole cache
    attention = case.batch * CONTEXT * keys_and_values if case.work == "decode" else queries * case.tokens
    return 1 + config.hidden_size * values / (weights + attention)


def memory_limit(case: Case, llama: PreTrainedModel, peak: float, gate_type: str) -> float:
    """
    The ratio of peaks when the gates keep what they must: of their weights a gradient and AdamW's two states besides,
    and of each token their values and the product with them (o_proj's input; the attention keeps its own output).
    """
    config, layers = llama.config, llama.config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    values = config.num_attention_heads if gate_type == "headwise" else queries
    weights = (4 if case.work == "training" else 1) * layers * values * config.hidden_size
    kept = 1 if case.work == "prefill" or case.checkpointing else layers
    activations = kept * case.batch * case.tokens * (values + queries)
    return 1 + (weights + activations) * llama.dtype.itemsize / peak


# --- works: each makes a function that does the work once -------------------------------------------------------------


def random_ids(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    ids = torch.randint(3, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(2))
    return ids.to(model.device)


def prefill(case: Case, model: PreTrainedModel, rounds: int) -> Callable[[], object]:
    ids = random_ids(model, case.batch, case.tokens)
    return torch.no_grad()(lambda: model.model(ids, use_cache=False))


def first_token(case: Case, model: PreTrainedModel, rounds: int) -> Callable[[], object]:
    ids = random_ids(model, case.batch, case.tokens)
    settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def decode(case: Case, model: PreTrainedModel, rounds: int) -> Callable[[], object]:
    """From `CONTEXT` tokens on, further with every call: in one round all contestants have the same cache lengths."""
    ids = random_ids(model, case.batch, CONTEXT + 1)
    if case.cache == "static":
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT + (rounds + 3) * case.tokens)
    else:
        cache = DynamicCache(config=model.config)
    step = compiled(model.model) if case.compiled else model.model

    @torch.no_grad()
    def work() -> None:
        for _ in range(case.tokens):
            step(ids[:, -1:], past_key_values=cache, use_cache=True)

    with torch.no_grad():
        model.model(ids[:, :-1], past_key_values=cache, use_cache=True)
        if case.compiled:  # it computes what the eager one does, or it is not timed
            eager, fast = (
                run(ids[:, -1:], past_key_values=kept, use_cache=True).last_hidden_state
                for run, kept in ((model.model, deepcopy(cache)), (step, cache))
            )
            if distance(fast, eager) > TOLERANCE[model.dtype]:
                raise CorrectnessError(f"compiled, it differs by {distance(fast, eager):.2g} from itself")
    return work


def training(case: Case, model: PreTrainedModel, rounds: int) -> Callable[[], object]:
    """Forward, backward and AdamW. The weights are everyone's, so the rate is 0: the same work, and no weight moves."""
    ids = random_ids(model, case.batch, case.tokens)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.0)

    def work() -> None:
        model.train()
        if case.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.model(ids, use_cache=False).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if case.checkpointing:
            model.activation_checkpointing_disable()
        model.eval()

    return work


WORKS = {"prefill": prefill, "decode": decode, "training": training, "first token": first_token}


def compiled(module: torch.nn.Module) -> Callable:
    return torch.compile(module, fullgraph=True, mode="reduce-overhead" if module.device.type == "cuda" else "default")


# --- measuring ------------------------------------------------------------------------------------------------------


def in_rounds(works: dict[str, Callable], rounds: int, device: str, label: str) -> dict[str, list[float]]:
    """Seconds of each work in each round, in rotating order; two rounds before, to get warm."""

    def run(work: Callable) -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = {name: [] for name in works}
    for work in (*works.values(), *works.values()):
        run(work)
    for number in tqdm(range(rounds), desc=label, unit="round", leave=False):
        gc.collect()
        turn = number % len(works)
        for name in [*works][turn:] + [*works][:turn]:
            seconds[name].append(seconds_of(run, works[name]))
    return seconds


def compared(seconds: dict[str, list[float]], limits: dict[str, float]) -> dict[str, dict]:
    """Of each contestant its seconds and, round by round, their ratio to Llama's; of ours, to those of its peers too."""

    def ratio(ours: str, theirs: str) -> dict:
        return summary([a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)])

    results = {name: {"seconds": summary(seconds[name]), "ratio": ratio(name, "llama")} for name in seconds}
    for name, limit in limits.items():
        peers = [peer for peer in PEERS[name] if peer in seconds]
        results[name] |= {"limit": limit, "to_peers": {peer: ratio(name, peer) for peer in peers}}
    return results


def measure(case: Case, models: dict[str, PreTrainedModel], pairs: int, device: str) -> dict:
    rounds = case.pairs or pairs
    torch.compiler.reset()
    works = {name: WORKS[case.work](case, models[name], rounds) for name in case.names}
    limits = {kind: limit_of(case, models["llama"].config, kind) for kind in GATE_TYPES}
    return result_of(case, models, compared(in_rounds(works, rounds, device, case.work), limits))


def measure_memory(case: Case, models: dict[str, PreTrainedModel]) -> dict:
    """Peak of the memory that torch allocates, weights included: of a prefill, or of a first training step."""
    results = {}
    for name in case.names:
        weights = sum(parameter.nbytes for parameter in models[name].parameters())
        results[name] = {"bytes": weights + peak_of(WORKS[case.work](case, models[name], 1), models[name].device.type)}
    llama = results["llama"]["bytes"]
    for name, result in results.items():
        result["ratio"] = {"median": result["bytes"] / llama}
        if name in PEERS:
            result["limit"] = memory_limit(case, models["llama"], llama, name)
            to_peers = {peer: {"median": result["bytes"] / results[peer]["bytes"]} for peer in PEERS[name]}
            result["to_peers"] = to_peers
    return result_of(case, models, results, work=f"memory of {case.work}")


def measure_loading(shape: str, models: dict[str, PreTrainedModel], pairs: int, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama", *GATE_TYPES):
            models[name].save_pretrained(Path(folder) / name)
        works = {}
        for name in FEW:
            saved = Path(folder) / name.removesuffix("-again")
            works[name] = partial(AutoModelForCausalLM.from_pretrained, saved, device_map=device)
        sizes = {name: sum(parameter.nbytes for parameter in models[name].parameters()) for name in FEW}
        limits = {kind: sizes[kind] / sizes["llama"] for kind in GATE_TYPES}
        results = compared(in_rounds(works, pairs, device, "load"), limits)
    return result_of(Case("load", shape), models, results)


def result_of(case: Case, models: dict[str, PreTrainedModel], contestants: dict[str, dict], **fields) -> dict:
    described = {key: value for key, value in asdict(case).items() if key not in ("names", "pairs")}
    layers = models["llama"].config.num_hidden_layers
    result = {**described, "layers": layers, **fields, "contestants": contestants}
    tqdm.write(speed_table.plain_row(result, models["llama"].device.type))
    return result


def measure_starting(rounds: int = 3) -> dict[str, dict]:
    """Whole processes: importing the model, beside importing Llama's; and the command's help."""
    commands = {
        "import transformers.models.llama.modeling_llama": ["-c", "import transformers.models.llama.modeling_llama"],
        "import modeling_gated": ["-c", "import modeling_gated"],
        "gated-llama --help": ["-m", "gated_llama.scripts.cli", "--help"],
    }
    seconds = {name: [] for name in commands}
    for number in tqdm(range(rounds), desc="start", unit="round", leave=False):
        for name in sorted(commands, reverse=number % 2 == 1):
            seconds[name].append(run_measured([sys.executable, *commands[name]])[0])
    return {name: summary(values) for name, values in seconds.items()}


def run_all(device: str, pairs: int) -> dict:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    results, distances = [], {}
    for shape, layers in LAYERS[device].items():
        cases = [case for case in cases_of(device) if case.shape == shape]
        needed = [name for name in NAMES if any(name in case.names for case in cases)]
        models = make_contestants(llama_config(shape, layers), needed, dtype=dtype, device=device)
        distances[shape] = check(models)
        results += [measure(case, models, pairs, device) for case in cases]
        if shape == "Qwen3-0.6B":
            for case in (
                Case("prefill", shape, 2048),
                Case("training", shape, 512),
                Case("training", shape, 512, checkpointing=True),
            ):
                results.append(measure_memory(case, models))
            results.append(measure_loading(shape, models, pairs, device))
    return {"results": results, "distances": distances, "starting": measure_starting()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of a comparison (default: 15)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    gc.disable()
    print(speed_table.plain_head())
    measured = run_all(args.device, args.pairs)
    for name, seconds in measured["starting"].items():
        print(f"{name}: {seconds['median']:.2f} s")
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    threads = torch.get_num_threads()
    record = {"benchmark": "speed", "on": args.device, **measured, **circumstances(), **gpu, "threads": threads}
    with open(speed_table.RECORDS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
