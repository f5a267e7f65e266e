# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The model: equal to the bit to the real classes with open gates, right by an independent reference with others."""

import ast
import inspect
import itertools

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AfmoeConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.afmoe.modeling_afmoe import AfmoeAttention
from transformers.models.llama.modeling_llama import LlamaAttention

import modeling_gated
from configuration_gated import AUTO_MAP, GatedLlamaConfig
from gated_llama.conversion.families import GATE_DEFAULTS, recognise
from gated_llama.conversion.families import gated_config as config_of
from modeling_gated import AttentionGate, GatedLlamaAttention, GatedLlamaForCausalLM, GatedLlamaModel
from tiny import VARIANTS, gated_config, gated_model, left_padding, published, source_model, tiny_tokenizer, token_ids


GATE_TYPES = ("headwise", "elementwise")
HEADS = list(modeling_gated.AUTO_CLASSES.values())


def as_gated(source, **gate_settings):
    """The same weights in our class, gates as they start."""
    origin = recognise(source.config.to_dict() | {"architectures": [type(source).__name__]}, "test")
    model = origin.gated_class(config_of(origin, GATE_DEFAULTS | gate_settings, where="test"))
    model.load_state_dict(source.state_dict(), strict=False)
    return model.to(source.dtype).eval()


def move_gates(model, to: float = 0.5):
    for name, parameter in model.named_parameters():
        if "attn_gate" in name:
            nn.init.constant_(parameter, to)


@torch.no_grad()
def logits_of(model):
    """Odd shapes: padding left and right, and the last tokens one by one through a cache."""
    ids = token_ids().to(model.device)
    mask = left_padding(ids)
    seen = [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]
    right = mask.flip(1)
    seen.append(model(ids, attention_mask=right).logits[right.bool()])
    out = model(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
    seen.append(out.logits[mask[:, :11].bool()])
    for token in range(11, 17):
        out = model(
            ids[:, token : token + 1],
            attention_mask=mask[:, : token + 1],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        seen.append(out.logits)
    return seen


# --- the same function as the source, to the bit ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate_type", GATE_TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_open_gates_change_no_bit(variant, gate_type, dtype):
    source = source_model(variant).to(dtype)
    gated = as_gated(source, gate_type=gate_type)
    expected = logits_of(source)
    assert all(torch.isfinite(logits).all() for logits in expected)
    assert all(map(torch.equal, expected, logits_of(gated)))
    move_gates(gated)  # the control: the comparison sees a gate that is not open
    assert not any(map(torch.equal, expected, logits_of(gated)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_change_no_bit(implementation):
    source = source_model("qwen2-sliding")
    gated = as_gated(source)
    for model in (source, gated):
        model.set_attn_implementation(implementation)
    assert all(map(torch.equal, logits_of(source), logits_of(gated)))


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "Model"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2-sliding", "qwen3", "mixtral", "qwen3-moe-mixed"])
def test_open_gates_change_no_bit_of_a_head(variant, head):
    source = source_model(variant, head)
    gated = as_gated(source)
    key = "last_hidden_state" if head == "Model" else "logits"
    with torch.no_grad():
        assert torch.equal(source(token_ids())[key], gated(token_ids())[key])


@pytest.mark.parametrize("variant", ["mistral", "mixtral"])  # families whose heads all keep their base in `model`
def test_open_gates_change_no_bit_of_question_answering(variant):
    source = source_model(variant, "ForQuestionAnswering")
    with torch.no_grad():
        expected, actual = source(token_ids()), as_gated(source)(token_ids())
    assert torch.equal(expected.start_logits, actual.start_logits)
    assert torch.equal(expected.end_logits, actual.end_logits)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("greedy", {"do_sample": False}),
        ("sample", {"do_sample": True, "top_k": 7}),
        ("beams", {"num_beams": 3, "do_sample": False}),
        ("static cache", {"cache_implementation": "static", "do_sample": False, "disable_compile": True}),
        ("no cache", {"use_cache": False, "do_sample": False}),
        ("prompt lookup", {"prompt_lookup_num_tokens": 2, "do_sample": False}),
        ("repetition penalty", {"repetition_penalty": 1.3, "do_sample": False}),
    ],
)
@pytest.mark.parametrize("variant", ["llama-3.2", "qwen2-sliding", "mixtral-sliding", "qwen3-moe"])
def test_generates_what_the_source_generates(variant, kind, arguments):
    source = source_model(variant)
    batch = 1 if kind == "prompt lookup" else 3
    ids = token_ids(batch)
    generated = []
    for model in (source, as_gated(source)):
        torch.manual_seed(0)
        generated.append(
            model.generate(ids, attention_mask=left_padding(ids), max_new_tokens=9, min_new_tokens=9, **arguments)
        )
    assert torch.equal(*generated)


# --- the gate itself ----------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_attention(attention, x):
    """
    Y' = Y ⊙ s·σ(X Wg) (Qiu et al., eq. 5 and section 2.2, position G1), one query and head at a time, in fp64 and with
    nothing of the module but its weights. x: (T, E).
    """
    config, weights = attention.config, {name: p.double() for name, p in attention.named_parameters()}
    heads, size, x = config.num_attention_heads, config.head_dim, x.double()
    angles = torch.outer(
        torch.arange(len(x)).double(),
        1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).double() / size),
    )

    def project(name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def prepared(name, head, t):
        vector = project(f"{name}_proj")[t, head * size : (head + 1) * size]
        if config.use_qk_norm:
            vector = vector / (vector.pow(2).mean() + config.rms_norm_eps).sqrt() * weights[f"{name}_norm.weight"]
        a, b = vector[: size // 2], vector[size // 2 :]
        cos, sin = angles[t].cos(), angles[t].sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    gate = config.gate_scale / (1 + torch.exp(-project("attn_gate.proj")))
    rows = []
    for t in range(len(x)):
        first = 0 if attention.sliding_window is None else max(0, t + 1 - attention.sliding_window)
        outputs = []
        for head in range(heads):
            kv = head // (heads // config.num_key_value_heads)
            query = prepared("q", head, t)
            scores = torch.stack([query @ prepared("k", kv, s) / size**0.5 for s in range(first, t + 1)])
            values = project("v_proj")[first : t + 1, kv * size : (kv + 1) * size]
            output = scores.softmax(0) @ values
            own = gate[t, head] if config.gate_type == "headwise" else gate[t, head * size : (head + 1) * size]
            outputs.append(output * own)
        rows.append(torch.cat(outputs))
    return torch.stack(rows) @ weights["o_proj.weight"].T + weights.get("o_proj.bias", 0.0)


@pytest.mark.parametrize("gate_bias", [False, True])
@pytest.mark.parametrize("gate_type", GATE_TYPES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head_dim": 8, "use_qk_norm": True},
        {"attention_bias": True, "attention_out_bias": False, "sliding_window": 3},
    ],
    ids=["llama", "qwen3", "qwen2"],
)
def test_attention_equals_an_independent_reference(fields, gate_type, gate_bias):
    model = gated_model(
        GatedLlamaModel, gate_type=gate_type, gate_bias=gate_bias, gate_scale=1.5, gate_init="normal", **fields
    ).double()
    seen = {}
    attention = model.layers[1].self_attn
    attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(x=kwargs["hidden_states"][0], y=output[0][0]), with_kwargs=True
    )
    model(token_ids(1, 7))
    expected = reference_attention(attention, seen["x"])
    # fp64 throughout but for Transformers' rotary angles, which are fp32
    torch.testing.assert_close(seen["y"], expected, rtol=0, atol=2e-6)
    move_gates(model, to=0.1)
    assert (reference_attention(attention, seen["x"]) - expected).abs().max() > 1e-2  # the control


def every_output(dtype, below=2.0**126):
    """Attention outputs (1, T, 6, 6): every value that bf16 (or fp16) has, subnormal ones too, as `dtype`."""
    kind = torch.float16 if dtype is torch.float16 else torch.bfloat16
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)
    values = values[values.abs() < below].to(dtype)
    return values[: len(values) // 36 * 36].view(1, -1, 6, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gate_type", GATE_TYPES)
def test_open_gate_changes_no_bit_of_any_number_and_still_learns(gate_type, dtype):
    gate = gated_model(GatedLlamaModel, gate_type=gate_type, trained=False).layers[0].self_attn.attn_gate.to(dtype)
    y = every_output(dtype)
    x = torch.randn(1, y.shape[1], 36, dtype=dtype, generator=torch.Generator().manual_seed(0))
    gated, scores = gate(x, y)
    assert torch.equal(gated, y.flatten(-2))
    assert (gate.values(scores) == 1).all() and scores.shape == (1, y.shape[1], 6 if gate_type == "headwise" else 36)
    # The control: a factor of one half and then 2 loses the last bit of the smallest.
    halved = (y * scores.unflatten(-1, (6, -1))) * 2
    assert torch.equal(halved, y) == (dtype in (torch.float32, torch.float64))
    x, y = x[:, :5], torch.ones(1, 5, 6, 6, dtype=dtype)
    gate(x, y)[0].sum().backward()
    slope = 0.5 * x.sum((0, 1)) * (6 if gate_type == "headwise" else 1)
    torch.testing.assert_close(gate.proj.weight.grad, slope.expand_as(gate.proj.weight))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by torch's own forward mode
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("gate_type", GATE_TYPES)
def test_gate_has_the_derivatives_of_its_formula(gate_type, strength):
    config = gated_config(gate_type=gate_type, gate_strength=strength, gate_bias=True, gate_scale=1.3)
    gate = AttentionGate(config).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 2, *size, dtype=torch.float64, generator=generator) for size in ((36,), (6, 6)))

    def formula(x, y):
        factor = 1 + strength * (1.3 * torch.sigmoid(gate.proj(x)) - 1)
        return (y * factor.unflatten(-1, (6, -1))).flatten(-2)

    def ours(x, y):
        return gate(x, y)[0]

    torch.testing.assert_close(ours(x, y), formula(x, y))
    tangents = (torch.ones_like(x), torch.ones_like(y))
    for derivative in (torch.func.jacrev, torch.func.jacfwd):  # backward and forward mode
        torch.testing.assert_close(derivative(ours, (0, 1))(x, y), derivative(formula, (0, 1))(x, y))
    torch.testing.assert_close(torch.func.jvp(ours, (x, y), tangents), torch.func.jvp(formula, (x, y), tangents))
    inputs = (x.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(ours, inputs) and torch.autograd.gradgradcheck(ours, inputs)


def bytes_kept(model):
    """Bytes that the graph of a forward pass keeps for its backward pass, weights aside, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(token_ids(1), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("gate_type", GATE_TYPES)
def test_training_keeps_the_scores_and_their_product_and_no_more(gate_type, monkeypatch):
    """The attention output itself is kept by the attention; without the product, it would be o_proj's input too."""
    source = source_model("llama")
    added = bytes_kept(as_gated(source, gate_type=gate_type)) - bytes_kept(source)
    values = 6 if gate_type == "headwise" else 36
    assert added == 3 * 17 * (values + 36) * 4

    def spelled_out(self, hidden_states, attn_output):  # the control
        gate = self.scale * torch.sigmoid(self.proj(hidden_states))
        return (attn_output.reshape(*gate.shape, -1) * gate.unsqueeze(-1)).flatten(-2), gate

    monkeypatch.setattr(AttentionGate, "forward", spelled_out)
    plain = bytes_kept(as_gated(source, gate_type=gate_type)) - bytes_kept(source)
    assert plain == added + 3 * 17 * values * 4


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        views = (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default)
        self.count += not (operation.is_view or operation in views)
        return operation(*args, **(kwargs or {}))


def operations_of(attention, training):
    """Of one forward, and of its backward pass when `training`."""
    attention.config._attn_implementation = "sdpa"
    attention.train(training)
    cos = torch.ones(1, 7, attention.head_dim)
    states = torch.randn(2, 7, attention.config.hidden_size, requires_grad=training)
    with torch.set_grad_enabled(training), Operations() as operations:
        output = attention(states, position_embeddings=(cos, cos), attention_mask=None)[0]
        if training:
            output.sum().backward()
    return operations.count


@pytest.mark.parametrize(
    ("training", "afmoe", "headwise", "elementwise"),
    [(False, 3, 3, 3), (True, 9, 12, 11)],
    ids=["inference", "training"],
)
def test_operations_beyond_llamas(training, afmoe, headwise, elementwise):
    """
    Launches are what eager decoding and small models cost: in inference no more of them than AFMoE's, the leanest gate
    in-tree. In training its 9 are out of reach: it has no scale, and that takes one operation in the gradient of each
    factor; a headwise gate sums over its head besides.
    """
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    counts = {}
    for kind in GATE_TYPES:
        counts[kind] = operations_of(GatedLlamaAttention(GatedLlamaConfig(**fields, gate_type=kind), 0), training)
    in_tree = AfmoeAttention(AfmoeConfig(**fields, num_hidden_layers=1, layer_types=["sliding_attention"]), 0)
    in_tree.q_norm = in_tree.k_norm = nn.Identity()  # Llama has none
    counts["afmoe"] = operations_of(in_tree, training)
    llama = operations_of(LlamaAttention(LlamaConfig(**fields), 0), training)
    beyond = {name: count - llama for name, count in counts.items()}
    assert beyond == {"headwise": headwise, "elementwise": elementwise, "afmoe": afmoe}


@pytest.mark.parametrize("gate_type", GATE_TYPES)
def test_compiled_training_has_the_same_gradients(gate_type):
    model = gated_model(GatedLlamaForCausalLM, gate_type=gate_type, num_hidden_layers=2).train()
    torch.compiler.reset()
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(token_ids(), labels=token_ids()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(expected, actual)


def test_a_large_bias_would_be_open_but_could_not_learn():
    """Why open is 2·σ(0) and not σ of something large."""
    logits = torch.full((1,), 8.0, dtype=torch.bfloat16, requires_grad=True)
    gate = torch.sigmoid(logits)
    gate.backward()
    assert gate.item() == 1 and logits.grad.item() == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("scale", [1.25, 1.5, 3.0, 10.0])
def test_open_gate_with_a_bias_is_one_to_rounding(scale, dtype, tolerance):
    model = gated_model(GatedLlamaModel, gate_scale=scale, gate_bias=True, trained=False).to(dtype)
    values = model(token_ids(), output_gates=True).gates
    for gate in values:
        torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=tolerance)


def test_from_scratch_gates_start_near_one_half():
    model = gated_model(GatedLlamaModel, gate_scale=1.0, gate_init="normal", initializer_range=0.02, trained=False)
    gates = torch.stack(model(token_ids(), output_gates=True).gates)
    assert gates.std() > 0.01
    assert abs(gates.mean() - 0.5) < 0.05


def test_scale_folds_into_the_output_projection():
    """The factor 2 and the paper's σ are one model: gate_scale 1 with `o_proj` doubled, to the bit."""
    two = gated_model(GatedLlamaForCausalLM)
    one = gated_model(GatedLlamaForCausalLM, gate_scale=1.0, gate_init="normal")
    one.load_state_dict(two.state_dict())
    for layer in one.model.layers:
        layer.self_attn.o_proj.weight.data *= 2
    with torch.no_grad():
        assert torch.equal(one(token_ids()).logits, two(token_ids()).logits)


# --- how it is built and initialised ------------------------------------------------------------------------------


def test_each_layer_is_built_once_and_finished_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an ungated attention was built")

    monkeypatch.setattr(LlamaAttention, "__init__", refuse)
    finished = []
    post_init = transformers.PreTrainedModel.post_init
    monkeypatch.setattr(
        transformers.PreTrainedModel, "post_init", lambda self: (finished.append(type(self).__name__), post_init(self))
    )
    gated_model(GatedLlamaForCausalLM)
    assert finished == ["GatedLlamaModel", "GatedLlamaForCausalLM"]


@pytest.mark.parametrize("gate_type", GATE_TYPES)
@pytest.mark.parametrize("head", HEADS)
def test_plain_folder_loads_with_open_gates(tmp_path, head, gate_type):
    source = source_model("llama")
    published(tmp_path / "plain", source)
    config = gated_config(gate_type=gate_type, gate_scale=3.0, gate_bias=True)
    model = head.from_pretrained(tmp_path / "plain", config=config).eval()
    gates = model.base_model(token_ids(1), output_gates=True).gates
    torch.testing.assert_close(torch.stack(gates), torch.ones_like(torch.stack(gates)), rtol=0, atol=1e-6)
    assert torch.equal(
        model.base_model.layers[2].self_attn.q_proj.weight, source.model.layers[2].self_attn.q_proj.weight
    )


def test_plain_folder_loads_with_random_gates_if_asked(tmp_path):
    published(tmp_path / "plain", source_model("llama"))
    config = gated_config(gate_scale=1.0, gate_init="normal")
    model = GatedLlamaForCausalLM.from_pretrained(tmp_path / "plain", config=config)
    stds = [layer.self_attn.attn_gate.proj.weight.std().item() for layer in model.model.layers]
    assert stds == pytest.approx([config.initializer_range] * 3, rel=0.3)


def test_save_and_load_keeps_every_bit(tmp_path):
    model = gated_model(GatedLlamaForCausalLM, tie_word_embeddings=True, gate_type="elementwise")
    model.save_pretrained(tmp_path)
    again = GatedLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    expected, actual = model.state_dict(), again.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


# --- output_gates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_type", GATE_TYPES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", [GatedLlamaModel, GatedLlamaForCausalLM])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_gates_that_are_returned_are_those_at_work(strength, model_class, implementation, gate_type):
    model = gated_model(model_class, gate_type=gate_type, gate_strength=strength, gate_scale=1.5, gate_bias=True)
    model.set_attn_implementation(implementation)
    seen = []
    for module in model.modules():
        if isinstance(module, AttentionGate):
            module.register_forward_hook(lambda module, args, output: seen.append((args[1], output[0])))
    ids = token_ids(1)
    plain = model(ids)
    assert plain.gates is None
    seen.clear()
    outputs = model(ids, output_gates=True)
    assert len(outputs.gates) == len(seen) == 3
    for gate, (y, gated) in zip(outputs.gates, seen, strict=True):
        torch.testing.assert_close((y * gate.unflatten(-1, (6, -1))).flatten(-2), gated)
    assert outputs.gates[0].shape == (1, 17, 6 if gate_type == "headwise" else 36)
    assert torch.equal(outputs[0], plain[0])
    assert all(map(torch.equal, model(ids, output_gates=True, return_dict=False)[-1], outputs.gates))
    model.config.output_gates = True
    assert len(model(ids).gates) == 3


@pytest.mark.parametrize("head", HEADS[2:])
def test_classification_heads_return_what_in_tree_ones_do(head):
    """As those of mixtures of experts, they hand on no record of their layers; the base model beneath does."""
    model = gated_model(head)
    in_tree = source_model("llama", head.__name__.removeprefix("GatedLlama"))
    assert model(token_ids(1), output_gates=True).keys() == in_tree(token_ids(1)).keys()
    assert len(model.base_model(token_ids(1), output_gates=True).gates) == 3


def test_gates_beside_other_recorded_outputs():
    model = gated_model(GatedLlamaForCausalLM)
    model.set_attn_implementation("eager")
    outputs = model(token_ids(), output_gates=True, output_hidden_states=True, output_attentions=True)
    assert [len(outputs[name]) for name in ("gates", "hidden_states", "attentions")] == [3, 4, 3]


def test_gates_with_gradient():
    model = gated_model(GatedLlamaForCausalLM).train()
    torch.stack(model(token_ids(), output_gates=True).gates).mean().backward()
    assert model.model.layers[0].self_attn.attn_gate.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("gate_type", GATE_TYPES)
def test_compiles_to_one_graph(gate_type):
    model = gated_model(GatedLlamaForCausalLM, gate_type=gate_type, sliding_window=5, num_hidden_layers=2)
    ids = token_ids()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        gates = model(ids, output_gates=True).gates  # first by itself: Transformers puts its hooks in place then
        assert all(map(torch.equal, compiled(ids, output_gates=True).gates, gates))
        model.set_gate_strength(0.5)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


# --- all that LlamaForCausalLM does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 5}], ids=["full", "sliding"])
def test_cache_and_attention_implementations_agree(fields):
    model = gated_model(GatedLlamaForCausalLM, **fields)
    reference = logits_of(model)
    model.set_attn_implementation("eager")
    for expected, actual in zip(reference, logits_of(model), strict=True):
        torch.testing.assert_close(expected, actual, rtol=1e-4, atol=1e-5)
    full = model(token_ids()).logits
    cached = model(token_ids()[:, :9], use_cache=True)
    rest = model(token_ids()[:, 9:], past_key_values=cached.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([cached.logits, rest], 1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of calls that Transformers and torch make of each other
def test_flex_attention_agrees():
    model = gated_model(GatedLlamaForCausalLM, hidden_size=32, num_attention_heads=2, num_key_value_heads=1).eval()
    with torch.no_grad():
        expected = model(token_ids()).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    model = gated_model(GatedLlamaForCausalLM)
    first, second = token_ids(1, 7, seed=1), token_ids(1, 10, seed=2)
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, :7], model(first).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed[:, 7:], model(second).logits, rtol=1e-4, atol=1e-5)
        unpacked = model(torch.cat([first, second], 1)).logits
    assert (packed[:, 7:] - unpacked[:, 7:]).abs().max() > 1e-2  # the control


def test_inputs_embeds_and_logits_to_keep():
    model = gated_model(GatedLlamaForCausalLM)
    ids = token_ids()
    full = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, full)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = gated_model(GatedLlamaForCausalLM).train()
        calls = []
        model.model.layers[1].self_attn.attn_gate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            if hasattr(model, "activation_checkpointing_enable"):  # its name since Transformers 5.22
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            else:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(token_ids(), labels=token_ids()).loss.backward()
        assert len(calls) == 1 + checkpointing  # the layer really ran a second time
        gradients.append([parameter.grad for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(expected, actual)
    assert all(gradient is not None for gradient in gradients[1])


def test_assisted_decoding_gives_the_greedy_tokens():
    model, assistant = gated_model(GatedLlamaForCausalLM), gated_model(GatedLlamaForCausalLM, seed=7)
    arguments = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(token_ids(1))}
    expected = model.generate(token_ids(1), **arguments)
    assert torch.equal(model.generate(token_ids(1), assistant_model=assistant, **arguments), expected)


def test_static_and_sliding_caches_give_the_greedy_tokens():
    for fields in ({}, {"sliding_window": 5}):
        model = gated_model(GatedLlamaForCausalLM, **fields)
        arguments = {"max_new_tokens": 9, "do_sample": False, "attention_mask": left_padding(token_ids())}
        expected = model.generate(token_ids(), use_cache=False, **arguments)
        for cache in ("dynamic", "static"):
            actual = model.generate(token_ids(), cache_implementation=cache, disable_compile=True, **arguments)
            assert torch.equal(actual, expected), (cache, fields)


def test_continuous_batching_gives_the_greedy_tokens():
    model = gated_model(GatedLlamaForCausalLM)
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (5, 11, 8)]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else all of memory
    outputs = model.generate_batch(prompts, config, small, progress_bar=False)
    generated = [output.generated_tokens for output in outputs.values()]
    expected = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    assert generated == expected


def test_text_generation_pipeline():
    model, tokenizer = gated_model(GatedLlamaForCausalLM), tiny_tokenizer()
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = "the grumpy cat"
    text = generate(prompt, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = tokenizer(prompt, return_tensors="pt")
    assert text == tokenizer.decode(
        model.generate(**ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True
    )
    chat = generate([{"role": "user", "content": "cat"}], max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert [message["role"] for message in chat] == ["user", "assistant"]


def test_trainer_trains_the_gates(tmp_path):
    model = gated_model(GatedLlamaForCausalLM, trained=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "attn_gate" in name
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = token_ids(8)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, learning_rate=0.05, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    losses = []

    class Losses(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            losses.append(logs)

    transformers.Trainer(model, arguments, train_dataset=dataset, callbacks=[Losses()]).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"model.layers.{layer}.self_attn.attn_gate.proj.weight" for layer in range(3)}
    assert losses[-1]["train_loss"] > 0


def test_offloaded_layers_compute_the_same(tmp_path):
    model = gated_model(GatedLlamaForCausalLM)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = GatedLlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[1].self_attn.attn_gate.proj.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(offloaded(token_ids()).logits, model(token_ids()).logits)


def test_plans_reach_every_projection():
    """Tensor, pipeline and FSDP plans: each pattern finds modules, and no projection is left out."""
    model = gated_model(GatedLlamaForCausalLM, use_qk_norm=True)
    modules = dict(model.named_modules())
    patterns = {key.replace("model.", "", 1): value for key, value in model.tp_plan.items() if key.startswith("model.")}
    found = {key: [name for name in modules if _matches(name, f"model.{key}")] for key in patterns}
    assert all(found.values()), found
    assert patterns["layers.*.self_attn.attn_gate.proj"] == "colwise"
    reached = set(itertools.chain(*found.values()))
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear) and name != "lm_head"}
    assert linears <= reached
    assert set(model.config.base_model_pp_plan) == {"embed_tokens", "layers", "norm"}
    assert model._pp_plan and model._fsdp_plan and model.tp_plan["lm_head"] == "colwise_gather_output"
    assert model.config.base_model_fsdp_plan["layers.*"]


def _matches(name, pattern):
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))


def test_attention_source_is_what_vllm_reads():
    """Its Transformers backend parses this source; see `vllm/model_executor/models/transformers`."""
    tree = ast.parse(inspect.getsource(modeling_gated.GatedLlamaAttention.forward).lstrip().replace("\n    ", "\n"))
    assigned = [
        node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and any(isinstance(n, ast.Name) and n.id == "ALL_ATTENTION_FUNCTIONS" for n in ast.walk(node.value))
    ]
    assert len(assigned) == 1
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == assigned[0]]
    assert len(calls) == 1
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert keywords["scaling"] == "self.scaling"
    attention = gated_model(GatedLlamaModel).layers[1].self_attn
    assert type(attention.scaling) is float and attention.layer_idx == 1 and attention.is_causal is True
    assert GatedLlamaModel._supports_attention_backend
    direct = [name for name, module in attention.named_children() if isinstance(module, nn.Linear)]
    assert direct == ["q_proj", "k_proj", "v_proj", "o_proj"]  # the gate's is not among those that would be fused
    assert type(attention.attn_gate.proj) is nn.Linear


def test_state_dict_is_llamas_and_the_gates():
    gated = gated_model(GatedLlamaForCausalLM)
    plain = LlamaForCausalLM(source_model("llama").config)
    added = set(gated.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(gated.state_dict())
    assert added == {f"model.layers.{layer}.self_attn.attn_gate.proj.weight" for layer in range(3)}


def test_auto_map_names_the_registered_classes():
    own = {auto.__name__: f"modeling_gated.{cls.__name__}" for auto, cls in modeling_gated.AUTO_CLASSES.items()}
    assert {"AutoConfig": "configuration_gated.GatedLlamaConfig", **own} == AUTO_MAP


@pytest.mark.parametrize("gate_type", GATE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_strength_goes_from_the_base_to_the_trained_model(tmp_path, dtype, gate_type):
    source = source_model("qwen3").to(dtype)
    model = as_gated(source, gate_type=gate_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_gate" in name:
                parameter.normal_(0.0, 0.3)
    trained = model(token_ids(), output_gates=True)
    model.set_gate_strength(0.0)
    assert torch.equal(model(token_ids()).logits, source(token_ids()).logits)
    model.set_gate_strength(0.5)
    half = model(token_ids(), output_gates=True)
    torch.testing.assert_close(half.gates[0], 1 + 0.5 * (trained.gates[0] - 1), rtol=0, atol=0)
    assert not torch.equal(half.logits, trained.logits)
    model.save_pretrained(tmp_path)
    again = GatedLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(dtype)  # rounded as `model` was
    assert torch.equal(again(token_ids()).logits, half.logits)
    model.set_gate_strength(1)
    assert torch.equal(model(token_ids()).logits, trained.logits)
