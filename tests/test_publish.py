# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Publishing, with the real Hub client against a Hub on this machine: what is sent, what is refused, what fails."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import modeling_gated  # noqa: F401  (registers the Auto classes)
from fresh import run_fresh
from gated_llama import convert_checkpoint, gated_lora_config, measure
from gated_llama.checkpoints.card import BEGIN, END, with_text_of
from gated_llama.errors import UserError
from gated_llama.publish import check_loads, contents_to_publish, publish, readable
from hub import Fault, lfs_oid, local_hub
from tiny import gated_model, published, source_model, tiny_tokenizer, token_ids


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
    convert_checkpoint(source, tmp_path / "gated", source_id="org/source", progress=False, verify=False)
    return tmp_path / "gated"


def push(environment, *commands: str, checked: bool = True, before: str = "") -> tuple[list[str], str, str]:
    """Exit codes, stdout and stderr of one fresh process."""
    done = run_fresh(before + PUSH, ";".join(commands), *([] if checked else ["unchecked"]), environment=environment)
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
        codes, out, _ = push(environment, f"{gated} org/name --pin")
        assert codes == ["0"]
        codes, proposed, _ = push(environment, f"{gated} org/name --create-pr", checked=False)
        assert codes == ["0"] and "/discussions/1" in proposed
        assert sum(sent.values()) == (gated / "model-gates.safetensors").stat().st_size
        snippet = out.split("published: ")[1].split("\n", 1)[1].split("EXIT")[0]
        assert "revision=" in snippet
        torch.save(token_ids(), tmp_path / "x.pt")
        done = run_fresh(LOAD, snippet, tmp_path / "x.pt", cwd="/", environment=environment)
        assert done.returncode == 0, done.stderr
    own = AutoModelForCausalLM.from_pretrained(gated)
    assert torch.equal(torch.load(tmp_path / "x.pt"), own(token_ids()).logits)


def test_a_private_branch(gated, tmp_path):
    """Into a private repository, on a branch that is made: seen with the token only, and only on that branch."""
    code = LOAD.replace("exec(", "import os; os.environ['HF_TOKEN'], cache = sys.argv[3:]\nexec(")
    snippet = """
model = AutoModelForCausalLM.from_pretrained("org/name", revision="dev", trust_remote_code=True, cache_dir=cache)
"""
    torch.save(token_ids(), tmp_path / "x.pt")

    def load(token, cache):
        return run_fresh(code, snippet, tmp_path / "x.pt", token, tmp_path / cache, cwd="/", environment=environment)

    with local_hub(tmp_path / "hub") as environment:
        codes, _, errors = push(environment, f"{gated} org/name --private --revision dev", checked=False)
        assert codes == ["0"], errors
        done = load(environment["HF_TOKEN"], "own")
        assert done.returncode == 0, done.stderr
        done = load("hf_other", "other")
        assert done.returncode and "org/name" in done.stderr
    assert not list((tmp_path / "hub" / "org" / "name").iterdir())  # main is as it was
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


def test_adapters(gated, tmp_path, monkeypatch):
    """Refused while its base is a folder; then loaded by its id, base and all, by who has not the package."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(gated), gated_lora_config(r=2))
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"x")
    snippet = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("org/adapter", trust_remote_code=True)
"""
    torch.save(token_ids(), tmp_path / "x.pt")
    with local_hub(tmp_path / "hub") as environment:
        there = f"{tmp_path / 'adapter'} org/adapter"
        commands = f"{there} --dry-run", f"{there} --base org/gated --pin", f"{gated} org/gated"
        codes, _, errors = push(environment, *commands, checked=False)
        assert codes == ["2", "0", "0"], errors
        assert "gated' as its base, which is no id on the Hub: publish that checkpoint if it is not there" in errors
        done = run_fresh(LOAD, snippet, tmp_path / "x.pt", cwd="/", environment=environment)
        assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "hub" / "org" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "optimizer.pt" not in names
    card = ModelCard.load(tmp_path / "hub" / "org" / "adapter" / "README.md")
    assert card.data.base_model == "org/gated" and str(tmp_path) not in str(card)
    own = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == str(gated)
    assert torch.equal(torch.load(tmp_path / "x.pt"), model.eval()(token_ids()).logits)

    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**own, "base_model_name_or_path": "org/other", "revision": "f" * 40})
    )
    monkeypatch.chdir(tmp_path / "hub")  # org/gated is a folder there
    for base, revision in ((None, "f" * 40), ("org/other", "f" * 40), ("org/gated", None)):
        sent = json.loads(contents_to_publish(tmp_path / "adapter", base=base)["adapter_config.json"])
        assert (sent["base_model_name_or_path"], sent["revision"]) == (base or "org/other", revision)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(own))

    check_loads(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    gate = next(key for key in weights if "attn_gate" in key)
    save_file({**weights, gate: weights[gate][1:].clone()}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"attn_gate\.proj\.weight of shape"):
        check_loads(tmp_path / "adapter")
    own["base_model_name_or_path"] = str(tmp_path / "source")  # which has no gates
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"adapter: the model has .*attn_gate\.proj\.weight of shape None"):
        check_loads(tmp_path / "adapter")
    own["base_model_name_or_path"] = str(tmp_path / "nowhere")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match="cannot be put on its base"):
        check_loads(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"nowhere' as its base, .* with --base OWNER/NAME"):
        contents_to_publish(tmp_path / "adapter")


def test_what_does_not_load_elsewhere_is_refused(gated):
    (gated / "json.py").write_text("raise RuntimeError('run unasked')\n")
    check_loads(gated)  # runs the two code files and no other
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
    assert "README.md" in contents_to_publish(gated)
    (gated / "README.md").write_text(f"token = {secret}")
    with pytest.raises(UserError, match=r"README\.md holds what looks like a secret") as caught:
        contents_to_publish(gated)
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


def test_names_that_are_none_on_the_hub(tmp_path):
    """A repository without its owner, and a card whose base is a folder's name until --base says more."""
    with pytest.raises(UserError, match="'name' is no repository of the Hub: give OWNER/NAME"):
        publish(tmp_path / "nowhere", "name")
    source = published(tmp_path / "source", source_model("llama"))
    convert_checkpoint(source, tmp_path / "gated", progress=False, verify=False)
    with pytest.raises(UserError, match=r"the card of .*gated names 'source' as base_model.* --base OWNER/NAME"):
        contents_to_publish(tmp_path / "gated")
    with pytest.raises(UserError, match="'source' is no id of a Hub repository: give --base"):
        contents_to_publish(tmp_path / "gated", base="source")
    card = ModelCard(contents_to_publish(tmp_path / "gated", base="org/base")["README.md"].decode())
    assert card.data.base_model == "org/base" and "[org/base](https://huggingface.co/org/base)" in card.text
    (tmp_path / "gated" / "README.md").unlink()
    card = ModelCard(contents_to_publish(tmp_path / "gated", base="org/base")["README.md"].decode())
    assert card.data.base_model == "org/base" and "added to [org/base](https://huggingface.co/org/base)" in card.text


def test_sizes_are_readable():
    sizes = {2: "2 bytes", 999: "999 bytes", 1000: "1.0 kB", 2_470_000: "2.5 MB", 16_060_522_240: "16.1 GB"}
    assert {size: readable(size) for size in sizes} == sizes
    assert readable(2_000_000_000_000) == "2,000.0 GB"


def test_a_card_the_hub_refuses_stops_before_the_weights(gated, tmp_path):
    (gated / "README.md").write_text("---\nlicense: none-such\n---\n")
    sent = {}
    with local_hub(tmp_path / "hub", sent=sent) as environment:
        codes, _, errors = push(environment, f"{gated} org/name", checked=False)
    assert codes == ["2"] and "license" in errors and not sent
    (gated / "README.md").unlink()
    unreachable = "import huggingface_hub; huggingface_hub.constants.ENDPOINT = 'http://127.0.0.1:1'\n"
    codes, _, errors = push(environment, f"{gated} org/name", checked=False, before=unreachable)
    assert codes == ["2"] and "did not take" in errors
    (gated / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(UserError, match=r"README\.md: the metadata of the card cannot be read"):
        contents_to_publish(gated)


def test_a_saved_model_gets_a_card_with_what_was_measured(gated, tmp_path):
    """A model as `save_pretrained` leaves it, with an inspection beside it; the author's text on the Hub stays."""
    model = AutoModelForCausalLM.from_pretrained(gated)
    model.save_pretrained(tmp_path / "saved")
    assert "## Measured" not in contents_to_publish(tmp_path / "saved")["README.md"].decode()
    windows = token_ids(2, 70)
    models = (source_model("llama"), gated_model(type(model)))
    results = [replace(measure(m, tiny_tokenizer(), windows), model=name) for m, name in zip(models, "ab", strict=True)]
    (tmp_path / "saved" / "inspection").mkdir()
    lines = ",".join(result.to_json() for result in results)
    (tmp_path / "saved" / "inspection" / "measurements.json").write_text(f"[{lines}]")
    with local_hub(tmp_path / "hub") as environment:
        there = tmp_path / "hub" / "org" / "name" / "README.md"
        there.parent.mkdir(parents=True)
        there.write_text("---\ndatasets:\n- mine\n---\n# By hand\n")
        codes, _, errors = push(environment, *[f"{tmp_path / 'saved'} org/name"] * 2, checked=False)
        assert codes == ["0", "0"], errors
    card = ModelCard.load(there)
    assert card.data.base_model == "org/source" and card.data.datasets == ["mine"]
    assert card.text.count("# By hand") == 1 and card.text.count("## Measured") == 1
    assert "| type | headwise |" in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| Loss, nats a token"))
    assert row.endswith(f"| {results[0].loss:.4f} | {results[1].loss:.4f} |")
