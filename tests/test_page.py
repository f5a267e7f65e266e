# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The page: whole, by itself, and saying what was measured. (What a browser makes of it: `make check-report`.)"""

import json
import re
from html.parser import HTMLParser

import pytest

from gated_llama import UserError, measure
from gated_llama.checkpoints.measurements import differences, read_measurements, summary_rows
from gated_llama.inspection.page import FIGURES, draw, gate_colour
from gated_llama.inspection.verdict import verdict
from gated_llama.scripts.cli import main
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, source_model, tiny_tokenizer, token_ids


PANELS = {"sentence": 6, "sinks": 2, "gates": 3, "activations": 3, "lengths": 2}  # of a plain and a gated model
PNGS = {f"{name}-{number + 1}.png" for name, panels in PANELS.items() for number in range(panels)}
VOID = {"meta", "img", "link", "br"}


@pytest.fixture(scope="module")
def measurements(tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "measurements.json"
    models = [source_model("llama"), gated_model(GatedLlamaForCausalLM)]
    sentence = {"sentence": "the $cat <b> sat on the mat, which", "query": "which"}
    results = [measure(model, tiny_tokenizer(), token_ids(2, 70), **sentence) for model in models]
    path.write_text("[" + ",".join(result.to_json() for result in results) + "]")
    return path


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids, self.tokens = [], [], [], 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "action") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.tokens += attributes.get("class") == "token"
        if tag == "img":
            assert attributes["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(tmp_path, measurements):
    measured = read_measurements([measurements])
    page = draw(measured, tmp_path).read_text()
    parsed = Page(page)
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", *PNGS}
    assert len(parsed.addresses) == len(PNGS) and all(a.startswith("data:image/png;base64,") for a in parsed.addresses)
    assert "url(" not in page and "@import" not in page and "<script" not in page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.tokens == 70  # the text of the gated model, token by token
    for model in measured:
        assert f"{model['loss']:.4f}" in page and f"{model['attention']['first_token']:.4f}" in page
    assert re.search(r'<th scope="col">\s*&lt;b?</th>', page)  # the sentence's tokens are text, not tags
    assert "Sink rate, 64 tokens" in page and page.index("its first token") < page.index("<img") < page.index("Numbers")


def test_it_draws_again_without_a_model_and_plain_models_alone(tmp_path, measurements, capsys, monkeypatch):
    (tmp_path / "one.json").write_text(json.dumps(json.loads(measurements.read_text())[:1]))
    assert main(["report", str(tmp_path / "one.json"), "--out", str(tmp_path / "page")]) == 0
    alone = {"sentence": 2, "sinks": 1, "activations": 3, "lengths": 2}  # no gates are shown where there are none
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "index.html",
        *(f"{name}-{number + 1}.png" for name, panels in alone.items() for number in range(panels)),
    }
    assert capsys.readouterr().out.strip().endswith("index.html")
    monkeypatch.setattr("gated_llama.inspection.page.FIGURES", [])
    both = [str(tmp_path / "one.json"), str(measurements)]
    assert main(["report", *both, "--out", str(tmp_path / "three")]) == 0
    page = (tmp_path / "three" / "index.html").read_text()
    columns = ("LlamaForCausalLM", "LlamaForCausalLM", "change", "GatedLlamaForCausalLM", "change")
    assert page.count("".join(f'<th scope="col">{column}</th>' for column in columns)) == 1


def test_what_is_no_measurement_is_refused(tmp_path):
    for content in ("{", "{}", "[]", "[1]", '[{"loss": 1}]', '[{"attention": {}}]'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=r"x\.json (cannot be read as|holds no) measurements"):
            read_measurements([tmp_path / "x.json"])
    assert main(["report", str(tmp_path / "none.json"), "--out", str(tmp_path / "page")]) == 2
    assert not (tmp_path / "page").exists()


def test_colours_are_on_one_scale():
    colours = [gate_colour(gate) for gate in (0, 0.5, 1, 1.5, 2)]
    assert len(set(colours)) == 5
    assert gate_colour(-1) == colours[0] and gate_colour(9) == colours[4]


def test_a_sentence_that_cannot_be_shown_is_refused():
    model = source_model("llama")
    with pytest.raises(UserError, match="no token that begins 'dog'"):
        measure(model, tiny_tokenizer(), token_ids(1, 8), sentence="the cat sat", query="dog")
    with pytest.raises(UserError, match="fewer than 2 tokens"):
        measure(model, tiny_tokenizer(), token_ids(1, 8), sentence=",")


def test_a_head_is_chosen(tmp_path, measurements, monkeypatch):
    monkeypatch.setattr(
        "gated_llama.inspection.page.FIGURES", [figure for figure in FIGURES if figure[0] == "sentence"]
    )
    pictures = []
    for head in (None, "2.3", "0.1"):
        (tmp_path / str(head)).mkdir()
        draw(read_measurements([measurements]), tmp_path / str(head), head)
        pictures.append((tmp_path / str(head) / "sentence-1.png").read_bytes())
    assert len(set(pictures)) >= 2 and pictures[1] != pictures[2]
    for head in ("3.0", "0.6", "x", "1"):
        with pytest.raises(UserError, match=rf"no head {head}: name one from 0\.0 to 2\.5"):
            draw(read_measurements([measurements]), tmp_path, head)


def test_models_of_other_shapes_stand_side_by_side(tmp_path, measurements):
    small = measure(
        source_model("llama", num_hidden_layers=1, num_attention_heads=2),
        tiny_tokenizer(),
        token_ids(2, 70),
        sentence="the cat sat on the mat",
    )
    one = tmp_path / "small.json"
    one.write_text(f"[{small.to_json()}]")

    def page_of(name: str, *files) -> str:
        (tmp_path / name).mkdir()
        return draw(read_measurements(files), tmp_path / name).read_text()

    assert "layer 0, head" in page_of("first", one, measurements)
    alone, around = page_of("alone", measurements), page_of("around", measurements, one, measurements)
    chosen = re.search(r"layer \d, head \d", alone)[0]
    assert chosen[6] != "0" and around.count(chosen) == 2 * alone.count(chosen)  # those behind it are as they were


def test_changes_say_better_or_worse_where_that_is_clear(measurements):
    one, other = read_measurements([measurements])
    other = json.loads(json.dumps(one)) | {"loss": one["loss"] * 1.01}
    other["activations"]["m_act"] = one["activations"]["m_act"] / 50
    rows = zip(summary_rows([one, other]), differences([one, other]), strict=True)
    found = {name: change for (name, _, _), (change,) in rows}
    assert found["Loss, nats a token"] == "+1.0 %, worse" and found["Largest activation"] == "× 0.02, better"
    assert found["Attention to the first token"] == "+0.0 %"
    one["name"], other["name"] = "before", "after"
    first, second = verdict([one, other])
    assert first.startswith("before gives its first token ") and "No token is massive." in first
    assert "its loss is +1.0 %, and its largest activations are 0.02 times as large" in second
    token = {"first": True, "seen": 2, "written_by": "the MLP of layer 1", "removed_by": None}
    one["massive"] = other["massive"] = [token]
    assert verdict([one, other])[1].endswith("times as large. The same tokens are massive.")
    other["massive"] = [token | {"removed_by": "the MLP of layer 2"}]
    assert verdict([one, other])[1].endswith("Massive: the first token, from the MLP of layer 1 to the MLP of layer 2.")


def test_a_change_from_nothing_is_a_difference(measurements):
    one, other = (json.loads(json.dumps(read_measurements([measurements])[1])) for _ in range(2))
    one["attention"]["sink_rate"]["64"], other["attention"]["sink_rate"]["64"] = 0.0, 0.25
    one["without_gates"]["open"][1], other["without_gates"]["open"][1] = 1e-9, 0.5
    names = [name for name, _, _ in summary_rows([one, other])]
    found = dict(zip(names, (change for (change,) in differences([one, other])), strict=True))
    assert found["Sink rate, 64 tokens"] == "+25 points, worse"
    assert found["KL from trained, gates open"] == "+0.500"


def test_of_gates_that_are_all_open_nothing_is_drawn(tmp_path, measurements):
    gated = gated_model(GatedLlamaForCausalLM, trained=False)
    sentence = {"sentence": "the cat sat on the mat", "query": "sat"}
    opened = json.loads(measure(gated, tiny_tokenizer(), token_ids(2, 70), **sentence).to_json())
    assert opened["gated"] and opened["gates"]
    page = draw([opened, *read_measurements([measurements])[1:]], tmp_path).read_text()
    assert len(list(tmp_path.glob("gates-*.png"))) == 3 and len(list(tmp_path.glob("sentence-*.png"))) == 6
    assert re.search(r"Loss, gates open</th>.*?<td>–</td>", page) and Page(page).tokens == 70
