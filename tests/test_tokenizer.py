# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A tokenizer means the same behind a conversion and an export, whichever class AutoTokenizer had chosen for it."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer

from gated_llama import VerificationError, convert_checkpoint, export_checkpoint
from gated_llama.conversion import tokenizer
from gated_llama.scripts.cli import main
from tiny import VOCAB, published, source_model, tiny_tokenizer


TEXTS = ["the grumpy cat", "<s>the</s> cat", "  the cat\n\nsat", "café 2024 12345", "don't"]


def byte_level():
    """As Llama 3's and Qwen's."""
    made = tiny_tokenizer().backend_tokenizer
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def metaspace():
    """As Llama 2's and Mistral 7B's."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    made.train_from_iterator(["the grumpy cat sat on the mat"] * 3, trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def with_tokenizer(folder, variant, made, config):
    published(folder, source_model(variant))
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        common = {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 1000}
        (folder / "tokenizer_config.json").write_text(json.dumps(common | config))
    return folder


def meaning(folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = [loaded(text).input_ids for text in TEXTS]
    return type(loaded).__name__, ids, loaded.padding_side, loaded.special_tokens_map, loaded.chat_template


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None, "no file"])
@pytest.mark.parametrize("made", [byte_level, metaspace])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3"])
def test_ids_sides_and_tokens_stay(tmp_path, variant, made, named):
    config = None if named == "no file" else {"tokenizer_class": named} if named else {}
    source = with_tokenizer(tmp_path / "source", variant, made(), config)
    try:
        expected = meaning(source)
    except Exception:  # such a folder has no tokenizer in Transformers
        expected = None
    result = convert_checkpoint(source, tmp_path / "gated", progress=False, verify=False)
    if expected is None:
        assert result.tokenizer.startswith("not compared: the source's does not load")
        return
    assert meaning(tmp_path / "gated") == expected
    assert result.tokenizer == "gives the token ids that the source's gives"
    export_checkpoint(tmp_path / "gated", tmp_path / "base", to="base", progress=False, verify=False)
    assert meaning(tmp_path / "base") == expected
    if config is not None:
        again = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
        assert again == json.loads((source / "tokenizer_config.json").read_text())


def test_copying_the_files_alone_would_change_the_ids(tmp_path, monkeypatch):
    """The control: what the class is named for; and that a comparison sees it."""
    source = with_tokenizer(tmp_path / "source", "mistral", metaspace(), {"tokenizer_class": "LlamaTokenizer"})
    monkeypatch.setattr(tokenizer, "name_class", lambda folder, name: None)
    with pytest.raises(VerificationError, match=r"the tokenizer makes .* where the source's makes"):
        convert_checkpoint(source, tmp_path / "gated", progress=False, verify=False)
    assert not (tmp_path / "gated").exists()
    monkeypatch.setattr(tokenizer, "_compare", lambda one, other: None)
    convert_checkpoint(source, tmp_path / "gated", progress=False, verify=False)
    assert meaning(tmp_path / "gated") != meaning(source)


@pytest.mark.parametrize(
    "change",
    [
        {"padding_side": "right"},
        {"chat_template": "other"},
        {"eos_token": "<pad>"},
        {"model_max_length": 7},
    ],
)
def test_what_is_compared(tmp_path, change):
    one, other = (published(tmp_path / name, source_model("llama"), tokenizer=True) for name in ("one", "other"))
    config = source_model("llama").config
    assert tokenizer.keep_tokenizer(one, config, other, config).said.startswith("gives the token ids")  # the control
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if "chat_template" in change:
        (other / "chat_template.jinja").write_text("other")
    with pytest.raises(VerificationError, match=f"the tokenizer has ({next(iter(change))}|special_tokens_map)"):
        tokenizer.keep_tokenizer(one, config, other, config)


def test_a_tokenizer_with_code_is_carried_and_not_run(tmp_path, capsys):
    source = published(tmp_path / "source", source_model("llama"), tokenizer=True)
    path = source / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None], "AutoProcessor": "org/name--elsewhere.Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (source / "tokenization_own.py").write_text("from .helpers import split\nraise SystemExit('code was run')\n")
    (source / "helpers.py").write_text("import re\n")
    (source / "unrelated.py").write_text("")
    assert main(["convert", str(source), str(tmp_path / "gated")]) == 0
    said = capsys.readouterr().out
    assert "not compared: it has code of its own" in said and "left      unrelated.py" in said
    for name in ("tokenization_own.py", "helpers.py", "tokenizer_config.json"):
        assert (tmp_path / "gated" / name).read_bytes() == (source / name).read_bytes()
