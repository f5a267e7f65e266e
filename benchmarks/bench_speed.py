# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the gate costs: Llama, ours, the in-tree gated attentions and the retrofit by hooks on the same weights (see
contestants.py), once each has proved to compute what it should. Every contestant does the same work once a round, in
rotating order; a ratio is to Llama in the same round, and Llama's to itself is the noise. Beside each figure stands its
limit: the ratio of FLOPs, or for decoding of bytes read, with and without the gate's projection. Layers have their
full width, and are few. Keeps one JSON line in benchmarks/results/, written anew after every case; speed_table.py makes
the table of it.

    python benchmarks/bench_speed.py [--device cpu] [--pairs 15] [--minutes 10]
"""

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.utils import logging

import speed_table
from contestants import (
    GATE_TYPES,
    NAMES,
    NARROW,
    PEERS,
    TOLERANCE,
    CorrectnessError,
    check,
    distance,
    llama_config,
    loss_of,
    make_contestants,
)
from measured import circumstances, keep_record, peak_of, run_measured, seconds_of, summary


CONTEXT = 128  # tokens in the cache when decoding begins
FEW = ("llama", "llama-again", *GATE_TYPES)
NO_HOOKS = tuple(name for name in NAMES if not name.startswith("hook"))  # Dynamo does not trace these hooks


@dataclass(frozen=True)
class Case:
    """A work: `tokens` at once (prefill, training, first token), or one after the other (decode)."""

    work: str
    shape: str
    tokens: int = 0
    layers: int = 1
    batch: int = 1
    cache: str = ""  # of decoding: dynamic or static
    compiled: bool = False
    checkpointing: bool = False
    names: tuple[str, ...] = NAMES
    pairs: int | None = None  # where it is not the number asked for
    threads: int | None = None


NARROW_CASES = [
    Case("training", NARROW, 16, layers=8, threads=1),
    Case("decode", NARROW, tokens=4, layers=8, cache="dynamic", threads=1),
]


def cases_of(device: str) -> list[Case]:
    small, middle, large = "Qwen3-0.6B", "Llama-3.2-1B", "8B"
    if device == "cuda":
        return _cases_that_fill_a_card(small, large)
    prefill, training = partial(Case, "prefill"), partial(Case, "training")
    # Decoding reads every weight once a token: there are more of them than the processor's cache holds.
    decode, memory = partial(Case, "decode", tokens=4, layers=2), partial(Case, tokens=1024, layers=2)
    return [
        prefill(small, 128),
        prefill(small, 512),
        prefill(small, 2048, names=FEW),
        prefill(small, 8192, names=FEW, pairs=5 if device == "cpu" else None),
        training(small, 256),
        training(small, 256, checkpointing=True, names=FEW),
        Case("first token", small, 128, names=FEW),
        Case("load", small, names=FEW),
        decode(small, cache="dynamic"),
        decode(small, cache="static"),
        decode(small, cache="static", compiled=True, names=NO_HOOKS),
        decode(small, cache="dynamic", batch=8),
        decode(small, cache="static", batch=8, compiled=True, names=FEW),
        memory("memory of prefill", small),
        memory("memory of training", small),
        memory("memory of training", small, checkpointing=True, names=NO_HOOKS),
        prefill(middle, 128),
        prefill(middle, 512, names=FEW),
        training(middle, 128, names=FEW),
        decode(middle, cache="dynamic", layers=1),
        decode(middle, cache="dynamic", layers=1, batch=8, names=FEW),
        prefill(large, 128, names=FEW),
        decode(large, cache="dynamic", layers=1, names=FEW),
    ]


def _cases_that_fill_a_card(small: str, large: str) -> list[Case]:
    """And some that do not, where launches are what costs; the most telling first."""
    decode = partial(Case, "decode", small, tokens=4, layers=8, names=NO_HOOKS)
    return [
        decode(cache="dynamic", names=NAMES),
        decode(cache="static"),
        Case("training", small, 4096, layers=8, names=NO_HOOKS),
        Case("prefill", small, 2048, layers=8),
        decode(cache="dynamic", batch=32),
        Case("prefill", small, 8192, layers=8, names=NO_HOOKS),
        Case("memory of training", small, 4096, layers=8, names=NO_HOOKS),
        Case("memory of prefill", small, 8192, layers=8, names=NO_HOOKS),
        Case("decode", large, tokens=4, layers=4, cache="dynamic", names=NO_HOOKS),
        Case("prefill", large, 4096, layers=4, names=NO_HOOKS),
        Case("training", large, 4096, layers=4, names=FEW),
        decode(cache="static", compiled=True),
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
    The ratio of peaks when gates hold no more than they must: their weights, and in training the gradient and AdamW's
    two states of these, and of every token their values and the product with them (`o_proj`'s input, where Llama's is
    what the attention keeps anyway).
    """
    config = llama.config
    queries = config.num_attention_heads * config.head_dim
    values = config.num_attention_heads if gate_type == "headwise" else queries
    held = config.hidden_size * values * config.num_hidden_layers
    if "training" in case.work:
        kept = 1 if case.checkpointing else config.num_hidden_layers
        held = 4 * held + kept * case.batch * case.tokens * (values + queries)
    return 1 + held * llama.dtype.itemsize / peak


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
                [run(ids[:, -1:], past_key_values=kept, use_cache=True).last_hidden_state]
                for run, kept in ((model.model, deepcopy(cache)), (step, cache))
            )
            if distance(fast, eager) > TOLERANCE[model.dtype]:
                raise CorrectnessError(f"compiled, it differs by {distance(fast, eager):.2g} from itself")
    return work


def training(case: Case, model: PreTrainedModel, rounds: int) -> Callable[[], object]:
    """Forward, backward and AdamW. The weights are everyone's, so the rate is 0: the same work, and no weight moves."""
    ids = random_ids(model, case.batch, case.tokens)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.0)

    def step(ids: torch.Tensor) -> None:
        model.train()
        if case.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if case.checkpointing:
            model.activation_checkpointing_disable()
        model.eval()

    step(ids[:, :8])  # AdamW makes its states
    return partial(step, ids)


WORKS = {"prefill": prefill, "decode": decode, "training": training, "first token": first_token}


def compiled(module: torch.nn.Module) -> Callable:
    return torch.compile(module, fullgraph=True, mode="reduce-overhead" if module.device.type == "cuda" else "default")


# --- measuring ------------------------------------------------------------------------------------------------------


def in_rounds(works: dict[str, Callable], rounds: int, device: str, label: str) -> dict[str, list[float]]:
    """Seconds of each work in each round, in rotating order; one round before, to get warm."""

    def run(work: Callable) -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = {name: [] for name in works}
    for work in works.values():
        run(work)
    for number in tqdm(range(rounds), desc=label, unit="round", leave=False):
        turn = number % len(works)
        gc.collect()
        gc.disable()
        for name in [*works][turn:] + [*works][:turn]:
            seconds[name].append(seconds_of(run, works[name]))
        gc.enable()
    return seconds


def compared(seconds: dict[str, list[float]], limits: dict[str, float]) -> dict[str, dict]:
    """Each contestant's seconds and, round by round, their ratio to Llama's; for ours, to those of its peers too."""

    def ratio(ours: str, theirs: str) -> dict:
        return summary([a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)])

    results = {name: {"seconds": summary(seconds[name]), "ratio": ratio(name, "llama")} for name in seconds}
    for name, limit in limits.items():
        peers = [peer for peer in PEERS[name] if peer in seconds]
        results[name] |= {"limit": limit, "to_peers": {peer: ratio(name, peer) for peer in peers}}
    return results


def measure_time(case: Case, models: dict[str, PreTrainedModel], pairs: int) -> dict[str, dict]:
    rounds, llama, usual = case.pairs or pairs, models["llama"], torch.get_num_threads()
    torch.compiler.reset()
    torch.set_num_threads(case.threads or usual)
    works = {name: WORKS[case.work](case, models[name], rounds) for name in case.names}
    limits = {kind: limit_of(case, llama.config, kind) for kind in GATE_TYPES}
    seconds = in_rounds(works, rounds, llama.device.type, case.work)
    torch.set_num_threads(usual)
    return compared(seconds, limits)


def measure_memory(case: Case, models: dict[str, PreTrainedModel], pairs: int) -> dict[str, dict]:
    """Peak of the memory that torch allocates, weights and AdamW's states included."""
    results, work = {}, WORKS[case.work.removeprefix("memory of ")]
    for name in case.names:
        held = sum(weight.nbytes for weight in models[name].model.parameters()) * (3 if "training" in case.work else 1)
        results[name] = {"bytes": held + peak_of(work(case, models[name], 1), models[name].device.type)}
    llama = results["llama"]["bytes"]
    for name, result in results.items():
        result["ratio"] = {"median": result["bytes"] / llama}
        if name in PEERS:
            result["limit"] = memory_limit(case, models["llama"], llama, name)
            peers = [peer for peer in PEERS[name] if peer in results]
            result["to_peers"] = {peer: {"median": result["bytes"] / results[peer]["bytes"]} for peer in peers}
    return results


def measure_loading(case: Case, models: dict[str, PreTrainedModel], pairs: int) -> dict[str, dict]:
    device = models["llama"].device.type
    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama", *GATE_TYPES):
            models[name].save_pretrained(Path(folder) / name)
        works = {}
        for name in case.names:
            saved = Path(folder) / name.removesuffix("-again")
            works[name] = partial(AutoModelForCausalLM.from_pretrained, saved, device_map=device)
        sizes = {name: sum(parameter.nbytes for parameter in models[name].parameters()) for name in case.names}
        limits = {kind: sizes[kind] / sizes["llama"] for kind in GATE_TYPES}
        return compared(in_rounds(works, pairs, device, case.work), limits)


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


def run_all(cases: list[Case], device: str, pairs: int, ends: float, keep: Callable[[dict], None]) -> dict:
    """Case by case until `ends` (of `time.monotonic`); `keep` is given all results so far after each."""
    done, distances, late = [], {}, []
    where = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16, "device": device}
    for (shape, layers), group in groupby(cases, lambda case: (case.shape, case.layers)):
        cases, models = list(group), None
        for case in cases:
            if time.monotonic() > ends:
                late.append(f"{case.shape}, {case.work}")
                continue
            if models is None:
                needed = [name for name in NAMES if any(name in case.names for case in cases)]
                models = make_contestants(llama_config(shape, layers), needed, **where)
                distances[f"{shape}, {layers}"] = check(models)
            measure = measure_loading if case.work == "load" else measure_time
            measure = measure_memory if case.work.startswith("memory") else measure
            described = {key: value for key, value in asdict(case).items() if key not in ("names", "pairs", "threads")}
            done.append({**described, "contestants": measure(case, models, pairs)})
            tqdm.write(speed_table.plain_row(done[-1], device))
            keep({"results": done, "distances": distances})
    if late:
        print(f"left out for time: {'; '.join(late)}")
    return {"results": done, "distances": distances}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--narrow", action="store_true", help="layers 64 wide alone, where launches are what costs")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of a comparison (default: 15)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so many (default: no end)")
    parser.add_argument("--records", type=Path, default=speed_table.RECORDS)
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    logging.disable_progress_bar()
    gc.freeze()  # what was imported need not be looked through between rounds
    print(speed_table.plain_head())
    on = f"{args.device}, narrow" if args.narrow else args.device
    about = {"benchmark": "speed", "on": on, "run": time.time(), **circumstances()}
    cases = NARROW_CASES if args.narrow else cases_of(args.device)
    about["threads"] = cases[0].threads or torch.get_num_threads()

    def keep(measured: dict) -> None:
        keep_record(args.records, about | measured, "run")

    measured = run_all(cases, args.device, args.pairs, ends, keep)
    if args.device == "cpu" and not args.narrow and time.monotonic() < ends:
        measured["starting"] = measure_starting()
        for name, seconds in measured["starting"].items():
            print(f"{name}: {seconds['median']:.2f} s")
        keep(measured)


if __name__ == "__main__":
    main()
