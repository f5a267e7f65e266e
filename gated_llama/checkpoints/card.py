# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Model cards: what a checkpoint is, how it was made, what was verified and measured, how it is loaded."""

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import Source
from gated_llama.checkpoints.measurements import summary_rows


TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).with_name("cards")))
HEADS = {  # Auto class and pipeline tag
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "Model": ("AutoModel", "feature-extraction"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}
PIPELINE_TAGS = {prefix + head: tag for prefix in ("GatedLlama", "GatedMoe") for head, (_, tag) in HEADS.items()}
AUTO_CLASSES = {prefix + head: auto for prefix in ("GatedLlama", "GatedMoe") for head, (auto, _) in HEADS.items()}
FROM_BASE = ("license", "license_name", "license_link", "language")

APART = "The gates are in `model-gates.safetensors`."
UNCHANGED = f"The base model's weight files are unchanged, byte for byte. {APART}"
REWRITTEN = f"The weights were written anew. {APART}"
UNTRAINED = "The gates have not been trained. On its own, adding gates changes neither quality nor attention sinks."

NO_LINK = "#how-it-was-made"  # of a source that has no page on the Hub

CITATION = "## Citation\n"
# What stands between these is written anew by the tools; the text around them is the author's.
BEGIN, END = "<!-- gated-llama: begin -->", "<!-- gated-llama: end -->"

MEASURED = """## Measured

By `gated-llama inspect`, on {windows} windows of {length} tokens.

{table}

"""


def is_hub_id(name: str) -> bool:
    """Whether it can be that of a repository, with its owner; the name of a folder has none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _link(hub_id: str) -> str:
    return f"https://huggingface.co/{hub_id}"


def conversion_card(result, source: Source, source_folder: Path, architecture: str) -> str:
    """
    The card of a converted checkpoint.

    Args:
        result: the [`ConversionResult`] to describe.
        source_folder: where a README.md may name the base model's licence.
        architecture: the class that the checkpoint holds.
    """
    card_data = _of_whole_model(architecture, base_model=result.source, **_base_card_fields(source_folder))
    return _card(
        card_data,
        "conversion",
        name=Path(result.output).name,
        source=result.source,
        source_link=_link(result.source) if source.on_hub or is_hub_id(result.source) else NO_LINK,
        revision=result.revision,
        config=result,
        start="open (1: the model computes what it did without)" if result.gate_init == "open" else "random",
        gate_parameters=result.gate_parameters,
        other_parameters=result.other_parameters,
        weights=_weights(result),
        trained=UNTRAINED if result.source_layout == "plain" else "The gates are those of the source.",
        command=_command(result),
        verified=str(result.verification) if result.verification else "nothing (`--verify` does it)",
        **_loading(architecture),
    )


def _weights(result) -> str:
    if result.gguf_file:
        return f"The weights are those of `{result.gguf_file}`, quantized ({result.quantized}) and made dense. " + APART
    return UNCHANGED if result.carried_bytes else REWRITTEN


def _of_whole_model(architecture: str, **fields) -> ModelCardData:
    """The metadata of a checkpoint that holds the class `architecture`, with what `fields` say of its origin."""
    return ModelCardData(
        **fields,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[architecture],
        tags=["gated-attention", "gated-llama", "custom_code"],
    )


def _loading(architecture: str, *, is_adapter: bool = False) -> dict[str, str]:
    """What `cards/_loading.md.jinja` asks for."""
    has_experts = architecture.startswith("GatedMoe")
    return {
        "library": "peft" if is_adapter else "transformers",
        "auto_class": "AutoPeftModelForCausalLM" if is_adapter else AUTO_CLASSES[architecture],
        "module": "modeling_gated_moe" if has_experts else "modeling_gated",
        "files": "four" if has_experts else "two",
    }


def _card(card_data: ModelCardData, body: str, **values) -> str:
    """Metadata, and the generated part between its marks, whose text is in `cards/{body}.md.jinja`."""
    template = TEMPLATES.get_template("card.md.jinja")
    values |= {"card_data": card_data, "body": f"{body}.md.jinja", "begin": BEGIN, "end": END}
    return str(ModelCard(template.render(values)))


def _base_card_fields(folder: Path) -> dict:
    if not (folder / "README.md").is_file():
        return {}
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):  # a README without readable metadata says nothing about a licence
        return {}
    return {name: data[name] for name in FROM_BASE if data.get(name)}


def _command(result) -> str:
    words = ["gated-llama", "convert", result.source, Path(result.output).name, "--gate-type", result.gate_type]
    if result.revision:
        words += ["--revision", result.revision]
    if result.gguf_file and result.gguf_file != result.source:
        words += ["--gguf-file", result.gguf_file]
    if result.source_layout == "plain" and result.gate_scale != 2:
        words += ["--gate-scale", f"{result.gate_scale:g}"]
    if result.source_layout != "official" and result.gate_bias:
        words += ["--gate-bias"]
    if result.source_layout == "plain" and result.gate_init != "open":
        words += ["--gate-init", result.gate_init]
    if result.dtype:
        words += ["--dtype", result.dtype]
    if result.max_shard_size:
        words += ["--max-shard-size", str(result.max_shard_size)]
    return shlex.join(words)


def finetuning_card(result, way, source: Source, config: GatedLlamaConfig, asked: dict) -> str:
    """
    The card of a fine-tuned checkpoint or adapter.

    Args:
        result: the [`FinetuneResult`] to describe.
        way: the [`Way`] in which it was trained.
        source: the gated checkpoint that was trained.
        config: its config.
        asked: what the run was asked to do, by the names of [`FinetuneSettings`]; `data` and whatever differs from its
            defaults.
    """
    losses = ""
    if result.held_out_after is not None:
        losses = f"{result.held_out_before:.4f} before, {result.held_out_after:.4f} after"
    card_data = ModelCardData(
        base_model=source.name,
        library_name="peft" if way.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["gated-attention", "gated-llama", *(["lora"] if way.is_adapter else ["custom_code"])],
        **_base_card_fields(source.folder),
    )
    asked = {name: _without_folders(value) for name, value in asked.items()}
    words = ["gated-llama", "finetune", source.name, "--out", Path(result.output).name]
    for name, value in asked.items():
        words += _option(name, value)
    settings = {
        name.replace("_", " "): asked[name] for name in asked if name not in ("data", "eval_data", "train", "steps")
    }
    return _card(
        card_data,
        "finetuning",
        name=Path(result.output).name,
        source=source.name,
        revision=source.revision,
        config=config,
        conversion=config.conversion,
        what=way.trained,
        command=shlex.join(words),
        trained=str(result.parameters).removeprefix("training "),
        result=result,
        settings=settings,
        losses=losses,
        **_loading(config.architectures[0], is_adapter=way.is_adapter),
    )


def _option(name: str, value) -> list[str]:
    """A setting as `gated-llama finetune` takes it."""
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-")]
    return [option, *(value if isinstance(value, list) else [str(value)])]


def _without_folders(value):
    """Replace local paths by file names, since a card is read by others."""
    if not isinstance(value, (list, tuple)):
        return value
    return [Path(entry).name if Path(entry).exists() else entry for entry in value]


def saved_card(config: GatedLlamaConfig, folder: Path) -> str:
    """A card for a checkpoint that has none (after `save_pretrained`), from its config."""
    architecture = config.architectures[0]
    base = {"base_model": config.conversion["source"]} if config.conversion else {}
    card_data = _of_whole_model(architecture, **base)
    return _card(
        card_data,
        "saved",
        name=folder.resolve().name,
        config=config,
        conversion=config.conversion,
        **_loading(architecture),
    )


def merged_card(config: GatedLlamaConfig, base: Source, adapter: Path, output: Path) -> str:
    """The card of an adapter merged into its base. How the adapter was trained is told by its own card."""
    architecture = config.architectures[0]
    card_data = _of_whole_model(architecture, base_model=base.name, **_base_card_fields(base.folder))
    return _card(
        card_data,
        "merged",
        name=output.resolve().name,
        adapter=adapter.resolve().name,
        source=base.name,
        revision=base.revision,
        config=config,
        conversion=config.conversion,
        **_loading(architecture),
    )


def desinking_card(result, source: Source, config: GatedLlamaConfig, asked: dict, text: list[str]) -> str:
    """
    The card of a checkpoint whose sink was moved.

    Args:
        result: the [`DesinkResult`] to describe.
        source: the checkpoint that it was made of.
        asked: the settings, by the names of [`DesinkSettings`].
    """
    words = ["gated-llama", "desink", source.name, Path(result.output).name, "--text", *_without_folders(text)]
    options = (
        "max_loss",
        "calm_tokens",
        "damping",
        "move_tokens",
        "heal_tokens",
        "sliding_window",
        "length",
        "batch_size",
        "seed",
    )
    options = [name for name in options if asked[name] is not None]
    words += ["--calm-only"] if asked["calm_only"] else []
    words += [word for name in options for word in _option(name, asked[name])]
    return _card(
        _of_whole_model(config.architectures[0], base_model=source.name, **_base_card_fields(source.folder)),
        "desinking",
        name=Path(result.output).resolve().name,
        source=source.name,
        revision=source.revision,
        what="massive activations" if asked["calm_only"] else "its attention sink",
        config=config,
        command=shlex.join(words),
        result=result,
        steps=[
            ("base", "", result.before),
            *((step.title, f"{step.tokens:,}", step.judgement) for step in result.steps),
        ],
        **_loading(config.architectures[0]),
    )


def bases_of(card: str) -> list[str]:
    """The `base_model` entries of a card's metadata."""
    bases = ModelCard(card, ignore_metadata_errors=True).data.base_model or []
    return [bases] if isinstance(bases, str) else bases


def with_base(card: str, base: str) -> str:
    """The card with the Hub id `base` as its `base_model`, also where the generated part speaks of that."""
    old, card = bases_of(card), ModelCard(card, ignore_metadata_errors=True)
    card.data.base_model = base
    if card.data.tags:  # PEFT's cards name the base, path and all, there too
        card.data.tags = [re.sub("^base_model:adapter:.*", f"base_model:adapter:{base}", t) for t in card.data.tags]
    before, generated, after = _parts(card.text)
    if old:
        name = re.escape(old[0])
        told = rf"\[{name}\]\({NO_LINK}\)|(fine-tuned from |merged into |added to ){name}(?=[ ,])"
        generated = re.sub(told, lambda match: f"{match[1] or ''}[{base}]({_link(base)})", generated, count=1)
    card.text = before + generated + after
    return str(card)


def with_measurements(card: str, measured: list[dict]) -> str:
    """The card with a table of these models side by side, as the last part of what is generated but the citation."""
    card = ModelCard(card, ignore_metadata_errors=True)
    before, generated, after = _parts(card.text)
    names = [Path(model["model"]).name for model in measured]
    rows = [["", *names], ["---"] * (1 + len(names))]
    rows += [[f"{name} ({source})" if source else name, *values] for name, source, values in summary_rows(measured)]
    section = MEASURED.format(
        windows=measured[0]["windows"],
        length=measured[0]["length"],
        table="\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows),
    )
    place = CITATION if CITATION in generated else END
    card.text = before + (generated.replace(place, section + place) or f"\n\n{section}") + after
    return str(card)


def with_text_of(new: str, old: str) -> str:
    """
    The card `new` with the author's text of `old`, the card that is published: what stands around the generated part,
    and metadata that `new` says nothing about. A `new` that has such text itself is the author's latest word.
    """
    new, old = ModelCard(new, ignore_metadata_errors=True), ModelCard(old, ignore_metadata_errors=True)
    before, generated, after = _parts(new.text)
    if generated and not before.strip() and not after.strip():
        before, has_generated, after = _parts(old.text)
        if not has_generated:  # a card written by hand: it stands, and ours follows
            before = before.rstrip() + "\n\n"
    new.text = before + generated + after
    new.data = ModelCardData(**{**old.data.to_dict(), **new.data.to_dict()})
    return str(new)


def _parts(text: str) -> tuple[str, str, str]:
    """Before, within (with its marks) and after the generated part."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        return text, "", ""
    return text[:begin], text[begin : end + len(END)], text[end + len(END) :]
