# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Publishing, with the real Hub client against a Hub on this machine: what is sent, what is refused, what fails."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import modeling_gated  # noqa: F401  (registers the Auto classes)
from gated_llama import convert_checkpoint, gated_lora_config
from gated_llama.card import BEGIN, END, with_text_of
from gated_llama.errors import UserError
from gated_llama.publish import check_loads, files_to_publish
from hub import Fault, lfs_oid, local_hub
from tiny import published, source_model, token_ids


PUSH = """
import sys
from gated_llama import publish
from gated_llama.scripts.cli import main

if sys.argv[2:]:
    publish.check_loads = lambda *args, **settings: None  # it has a test of its own
for arguments in sys.argv[1].split(";"):
    print("EXIT", main(["push", *arguments.split()]))
"""
LOAD = """
import sys
for name in ("gated_llama", "modeling_gated", "configuration_gated"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
exec(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])
"""


@pytest.fixture
def gated(tmp_path):
    source = published(tmp_path / "source", source_model("llama"), tokenizer=True)
    convert_checkpoint(source, tmp_path / "gated", progress=False, verify=False)
    return tmp_path / "gated"


def push(environment, *commands: str, checked: bool = True) -> tuple[list[str], str, str]:
    """Exit codes, stdout and stderr of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PUSH, ";".join(commands), *([] if checked else ["unchecked"])],
        env=environment,
        capture_output=True,
        text=True,
    )
    codes = [line[5:] for line in done.stdout.splitlines() if line.startswith("EXIT ")]
    assert len(codes) == len(commands), done.stderr
    assert "Traceback" not in done.stderr
    return codes, done.stdout, done.stderr


def test_pushed_and_loaded_by_its_id_at_the_printed_commit(gated, tmp_path):
    """Into a Hub that has the base's weights already: only the gates are sent. Then by who has not the package."""
    sent = {}
    with local_hub(tmp_path / "hub", sent=sent) as environment:
        shard = gated / "model-00001-of-00001.safetensors"
        have = tmp_path / "lfs" / lfs_oid(shard.read_bytes())
        have.parent.mkdir()
        have.write_bytes(shard.read_bytes())
        codes, out, _ = push(environment, f"{gated} org/name --pin", f"{gated} org/name --create-pr")
        assert codes == ["0", "0"] and "/discussions/1" in out
        assert sum(sent.values()) == (gated / "model-gates.safetensors").stat().st_size
        snippet = out.split("published: ")[1].split("\n", 1)[1].split("EXIT")[0]
        assert "revision=" in snippet
        torch.save(token_ids(), tmp_path / "x.pt")
        subprocess.run([sys.executable, "-c", LOAD, snippet, tmp_path / "x.pt"], cwd="/", env=environment, check=True)
    own = AutoModelForCausalLM.from_pretrained(gated)
    assert torch.equal(torch.load(tmp_path / "x.pt"), own(token_ids()).logits)


def test_what_goes_wrong_on_the_way(gated, tmp_path):
    """Every fault ends in a sentence with nothing visible, or is got over; the next attempt sends only the rest."""
    refused = {401: "create", 403: "preupload", 404: "preupload", 409: "/commit/", 413: "/commit/"}
    faults, sent = [Fault(part, status) for status, part in refused.items()], {}
    name = "model-gates.safetensors"
    with local_hub(tmp_path / "hub", faults, sent) as environment:
        token = f"--token hf_{'s' * 34}"
        codes, _, errors = push(environment, *[f"{gated} org/name {token}"] * len(refused), checked=False)
        assert codes == ["2"] * len(refused)
        assert errors.count("Run the same command again") == len(refused) and "hf_sss" not in errors
        assert not list((tmp_path / "hub" / "org" / "name").iterdir())
        assert len(sent) == 2 and f"Arrived: model-00001-of-00001.safetensors, {name}; nothing" in errors
        sent.clear()
        (tmp_path / "lfs" / lfs_oid((gated / name).read_bytes())).unlink()  # as if the line had been cut before it
        faults += [Fault("PUT", 0), Fault("preupload", 429), Fault("objects/batch", 500)]
        codes, _, errors = push(environment, *[f"{gated} org/name"] * 2, checked=False)
        assert codes[-1] == "0", errors
    assert list(sent.values()) == [(gated / name).stat().st_size]  # the other file was there
    assert (tmp_path / "hub" / "org" / "name" / name).read_bytes() == (gated / name).read_bytes()


def test_adapters(gated, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(gated), gated_lora_config(r=2))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"x")
    with local_hub(tmp_path / "hub") as environment:
        there = f"{tmp_path / 'adapter'} org/adapter"
        codes, _, errors = push(environment, there, f"{there} --base org/gated --pin")
        assert codes == ["2", "0"], errors
        assert "publish that one first" in errors
    names = {path.name for path in (tmp_path / "hub" / "org" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "optimizer.pt" not in names
    config = json.loads((tmp_path / "hub" / "org" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/gated"
    own = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == str(gated)


def test_what_does_not_load_elsewhere_is_refused(gated):
    code = gated / "modeling_gated.py"
    text = code.read_text()
    code.write_text(text + "# changed\n")
    with pytest.raises(UserError, match="not this version's"):
        check_loads(gated)
    code.write_text(text + "raise RuntimeError('broken')\n")
    with pytest.raises(UserError, match="does not load without this package: RuntimeError: broken"):
        check_loads(gated, trust_remote_code=True)
    code.write_text(text)
    gates = load_file(gated / "model-gates.safetensors")
    name = next(iter(gates))
    save_file({**gates, name: gates[name][1:].clone()}, gated / "model-gates.safetensors")
    with pytest.raises(UserError, match=r"attn_gate\.proj\.weight of shape"):
        check_loads(gated)


@pytest.mark.parametrize("secret", ["hf_" + "a" * 34, "AKIA" + "A" * 16, "-----BEGIN PRIVATE KEY-----"])
def test_secrets_are_not_sent(gated, secret):
    assert "README.md" in files_to_publish(gated)
    (gated / "README.md").write_text(f"token = {secret}")
    with pytest.raises(UserError, match=r"README\.md holds what looks like a secret") as caught:
        files_to_publish(gated)
    assert secret not in str(caught.value)


def test_the_authors_text_stays(gated):
    new = (gated / "README.md").read_text()
    assert "@inproceedings{qiu2025gated" in new
    old = (
        new.replace("gated_llama", "old")
        .replace(END, f"{END}\n\nMy own words.")
        .replace("tags:", "datasets:\n- mine\ntags:")
    )
    old = old.replace("## How it was made", "## An outdated part")
    card = with_text_of(new, old)
    assert card.endswith("\n\nMy own words.") and "outdated" not in card
    assert ModelCard(card).data.datasets == ["mine"]
    assert with_text_of(card, new.replace(END, f"{END}\nother")) == card  # the newer word
    by_hand = with_text_of(new, "# A card by hand\n")
    assert by_hand.index("# A card by hand") < by_hand.index(BEGIN)
