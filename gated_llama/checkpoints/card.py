# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Model cards: what a checkpoint is, how it was made, what was verified and measured, how it is loaded."""

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from configuration_gated import GatedLlamaConfig
from gated_llama.checkpoints.folder import Source
from gated_llama.checkpoints.measurements import numbers


PIPELINE_TAGS = {
    "GatedLlamaForCausalLM": "text-generation",
    "GatedLlamaModel": "feature-extraction",
    "GatedLlamaForSequenceClassification": "text-classification",
    "GatedLlamaForTokenClassification": "token-classification",
    "GatedLlamaForQuestionAnswering": "question-answering",
}
AUTO_CLASSES = {
    "GatedLlamaForCausalLM": "AutoModelForCausalLM",
    "GatedLlamaModel": "AutoModel",
    "GatedLlamaForSequenceClassification": "AutoModelForSequenceClassification",
    "GatedLlamaForTokenClassification": "AutoModelForTokenClassification",
    "GatedLlamaForQuestionAnswering": "AutoModelForQuestionAnswering",
}
FROM_BASE = ("license", "license_name", "license_link", "language")

CITATION = """## Citation

```bibtex
@inproceedings{qiu2025gated,
  title = {Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free},
  author = {Qiu, Zihan and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
  eprint = {2505.06708},
  archivePrefix = {arXiv}
}
```"""

UNCHANGED = "The base model's weight files are unchanged, byte for byte; the gates are in `model-gates.safetensors`."
REWRITTEN = "The weights were written anew; the gates are in `model-gates.safetensors`."
UNTRAINED = "The gates have not been trained. On its own, adding gates changes neither quality nor attention sinks."

NO_LINK = "#how-it-was-made"  # of a source that has no page on the Hub

# What stands between these is written anew by the tools; the text around them is the author's.
BEGIN, END = "<!-- gated-llama: begin -->", "<!-- gated-llama: end -->"

INTRODUCTION = """with gated attention: the attention output of every layer is multiplied by a gate computed from
the hidden state that the queries read, before `o_proj` ([Qiu et al., 2025](https://arxiv.org/abs/2505.06708))."""

GATES = """| gate | value |
|---|---|
| type | {{ config.gate_type }} |
| value | {{ "%g" | format(config.gate_scale) }} · σ(x · W{% if config.gate_bias %} + b{% endif %}) |
"""

ORIGIN = """{% if conversion %}The gates were added to {{ conversion.source }}{% if conversion.revision %} (commit
`{{ conversion.revision }}`){% endif %} by `gated-llama convert`.
{% endif %}"""

LOADING = """## How it is loaded

With the gated-llama package installed, which needs no remote code:

```python
import modeling_gated  # registers the Auto classes
from {{ library }} import {{ auto_class }}

model = {{ auto_class }}.from_pretrained("path or id of this repository")
```

Without it, `{{ auto_class }}.from_pretrained(…, trust_remote_code=True)` runs the two Python files beside the weights{%
if library == "peft" %} of the base model{% endif %}: read them first. `AutoTokenizer.from_pretrained` alone asks for
it too, since Transformers reads the model's config to choose the tokenizer's class.
"""

CONVERSION = f"""# {{{{ name }}}}

[{{{{ source }}}}]({{{{ source_link }}}}){{% if revision %}} (commit `{{{{ revision }}}}`){{% endif %}}
{INTRODUCTION} {{{{ weights }}}}

{GATES}| start | {{{{ start }}}} |
| parameters | {{{{ "{{:,}}".format(gate_parameters) }}}} beside {{{{ "{{:,}}".format(other_parameters) }}}} |

{{{{ trained }}}}

## How it was made

```bash
{{{{ command }}}}
```

**Verified:** {{{{ verified }}}}.

{LOADING}"""

TRAINED = {
    "lora": "A LoRA adapter, and the gates trained whole beside it",
    "gates": "The gates were trained; every other weight is as it was",
    "full": "All weights were trained",
}
FINETUNING = f"""# {{{{ name }}}}

{{{{ what }}}}: fine-tuned from {{{{ source }}}}{{% if revision %}} (commit `{{{{ revision }}}}`){{% endif %}}, a model
{INTRODUCTION}

{GATES}
{ORIGIN}
## How it was trained

```bash
{{{{ command }}}}
```

| | |
|---|---|
| trained | {{{{ trained }}}} |
| data | {{{{ result.data }}}} |
| steps | {{{{ result.steps }}}} |
| tokens seen in training | {{{{ "{{:,}}".format(result.tokens) }}}} |
{{% for name, value in settings.items() %}}| {{{{ name }}}} | {{{{ value }}}} |
{{% endfor %}}
{{% if losses %}}Held-out loss, nats a token: {{{{ losses }}}}. {{% endif %}}{{{{ result.verdict }}}}

{LOADING}"""

SAVED = f"""# {{{{ name }}}}

A model {INTRODUCTION}

{GATES}
{ORIGIN}
{LOADING}"""

MERGED = f"""# {{{{ name }}}}

The adapter `{{{{ adapter }}}}`, merged into {{{{ source }}}}{{% if revision %}} (commit
`{{{{ revision }}}}`){{% endif %}}, a model {INTRODUCTION}

{GATES}
{ORIGIN}
{LOADING}"""

DESINKING = f"""# {{{{ name }}}}

{{{{ source }}}}{{% if revision %}} (commit `{{{{ revision }}}}`){{% endif %}} without {{{{ what }}}}: a model
{INTRODUCTION}

{GATES}
## How it was made

```bash
{{{{ command }}}}
```

| step | tokens | loss on held-out text | attention to the most attended key | largest activation |
|---|---|---|---|---|
{{% for name, tokens, now in steps %}}| {{{{ name }}}} | {{{{ tokens }}}} | {{{{ "%.4f" | format(now.loss) }}}} | {{{{
"%.3f" | format(now.most_attended) }}}} | {{{{ "{{:,.0f}}".format(now.m_act) }}}} |
{{% endfor %}}
On {{{{ result.text }}}}, with windows cut anywhere and begun with each special token; costs in nats a token:

| | before | after |
|---|---|---|
{{% for name, before, after in result.rows() %}}| {{{{ name }}}} | {{{{ before }}}} | {{{{ after }}}} |
{{% endfor %}}
{LOADING}"""

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
    Args:
        result: the [`ConversionResult`] to describe.
        source_folder: where a README.md may name the base model's licence.
        architecture: the class that the checkpoint holds.
    """
    card_data = _of_whole_model(architecture, base_model=result.source, **_base_card_fields(source_folder))
    return _card(
        card_data,
        CONVERSION,
        name=Path(result.output).name,
        source=result.source,
        source_link=_link(result.source) if source.on_hub or is_hub_id(result.source) else NO_LINK,
        revision=result.revision,
        config=result,
        start="open (1: the model computes what it did without)" if result.gate_init == "open" else "random",
        gate_parameters=result.gate_parameters,
        other_parameters=result.other_parameters,
        weights=UNCHANGED if result.carried_bytes else REWRITTEN,
        trained=UNTRAINED if result.source_layout == "plain" else "The gates are those of the source.",
        command=_command(result),
        verified=str(result.verification) if result.verification else "nothing (conversion with `--no-verify`)",
        library="transformers",
        auto_class=AUTO_CLASSES[architecture],
    )


def _of_whole_model(architecture: str, **fields) -> ModelCardData:
    """The metadata of a checkpoint that holds the class `architecture`, with what `fields` say of its origin."""
    return ModelCardData(
        **fields,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[architecture],
        tags=["gated-attention", "gated-llama", "custom_code"],
    )


def _card(card_data: ModelCardData, body: str, **values) -> str:
    """Metadata, and the generated part between its marks."""
    template = "\n".join(["---\n{{ card_data }}\n---\n", BEGIN, body, CITATION, END, ""])
    return str(ModelCard.from_template(card_data, template_str=template, **values))


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
    if result.verification is None:
        words += ["--no-verify"]
    return shlex.join(words)


def finetuning_card(result, source: Source, config: GatedLlamaConfig, asked: dict) -> str:
    """
    Args:
        result: the [`FinetuneResult`] to describe.
        source: the gated checkpoint that was trained.
        config: its config.
        asked: what the run was asked to do, by the names of [`FinetuneSettings`]; `data` and whatever differs from its
            defaults.
    """
    lora = result.train == "lora"
    losses = ""
    if result.held_out_after is not None:
        losses = f"{result.held_out_before:.4f} before, {result.held_out_after:.4f} after"
    card_data = ModelCardData(
        base_model=source.name,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation",
        tags=["gated-attention", "gated-llama", *(["lora"] if lora else ["custom_code"])],
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
        FINETUNING,
        name=Path(result.output).name,
        source=source.name,
        revision=source.revision,
        config=config,
        conversion=config.conversion,
        what=TRAINED[result.train],
        command=shlex.join(words),
        trained=str(result.parameters).removeprefix("training "),
        result=result,
        settings=settings,
        losses=losses,
        library="peft" if lora else "transformers",
        auto_class="AutoPeftModelForCausalLM" if lora else "AutoModelForCausalLM",
    )


def _option(name: str, value) -> list[str]:
    """A setting as `gated-llama finetune` takes it."""
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-")]
    return [option, *(value if isinstance(value, list) else [str(value)])]


def _without_folders(value):
    """Of data on this machine its name: a local path is nobody else's business."""
    if not isinstance(value, (list, tuple)):
        return value
    return [Path(entry).name if Path(entry).exists() else entry for entry in value]


def saved_card(config: GatedLlamaConfig, folder: Path) -> str:
    """Of a checkpoint that has none, as `save_pretrained` leaves it: what its config tells."""
    architecture = config.architectures[0]
    base = {"base_model": config.conversion["source"]} if config.conversion else {}
    card_data = _of_whole_model(architecture, **base)
    return _card(
        card_data,
        SAVED,
        name=folder.resolve().name,
        config=config,
        conversion=config.conversion,
        library="transformers",
        auto_class=AUTO_CLASSES[architecture],
    )


def merged_card(config: GatedLlamaConfig, base: Source, adapter: Path, output: Path) -> str:
    """Of what an adapter and its base became; how the adapter was trained, its own card tells."""
    architecture = config.architectures[0]
    card_data = _of_whole_model(architecture, base_model=base.name, **_base_card_fields(base.folder))
    return _card(
        card_data,
        MERGED,
        name=output.resolve().name,
        adapter=adapter.resolve().name,
        source=base.name,
        revision=base.revision,
        config=config,
        conversion=config.conversion,
        library="transformers",
        auto_class=AUTO_CLASSES[architecture],
    )


def desinking_card(result, source: Source, config: GatedLlamaConfig, asked: dict, text: list[str]) -> str:
    """
    Args:
        result: the [`DesinkResult`] to describe.
        source: the checkpoint that it was made of.
        asked: the settings, by the names of [`DesinkSettings`].
    """
    words = ["gated-llama", "desink", source.name, Path(result.output).name, "--text", *_without_folders(text)]
    options = ("max_loss", "calm_tokens", "move_tokens", "heal_tokens", "length", "batch_size", "seed")
    words += ["--calm-only"] if asked["calm_only"] else []
    words += [word for name in options for word in _option(name, asked[name])]
    return _card(
        _of_whole_model(config.architectures[0], base_model=source.name, **_base_card_fields(source.folder)),
        DESINKING,
        name=Path(result.output).resolve().name,
        source=source.name,
        revision=source.revision,
        what="massive activations" if asked["calm_only"] else "its attention sink",
        config=config,
        command=shlex.join(words),
        result=result,
        steps=[
            ("base", "", result.before),
            *(
                (f"{step.name}, undone" if step.undone else step.name, f"{step.tokens:,}", step.judgement)
                for step in result.steps
            ),
        ],
        library="transformers",
        auto_class=AUTO_CLASSES[config.architectures[0]],
    )


def bases_of(card: str) -> list[str]:
    """What the metadata names as `base_model`."""
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
    rows += [[f"{name} ({source})" if source else name, *values] for name, source, values in numbers(measured)]
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
