"""Each pair of architectures: what it computes, against the dense model or a loop written from the
equation.
"""

import dataclasses
import json
import os
import re

import click
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mergekit_moe_ext.mixtures.routers import routers_of
from mergekit_moe_ext.upcycling import families
from mergekit_moe_ext.upcycling.families.mixtral import MIXTRAL
from tests.conftest import document, make_model, merge, read_tensors, run

TOKENS = torch.arange(1, 41).reshape(2, 20) * 7 % 96
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
# The texts of 20 tokens are longer than the original 16.
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = [
    ("qwen3", {**WINDOW, "max_window_layers": 1, "rope_parameters": LLAMA3}, "MellumForCausalLM"),
    ("qwen2", {}, "Qwen2MoeForCausalLM"),
    ("qwen2", {**WINDOW, "max_window_layers": 0}, "Qwen2MoeForCausalLM"),
    ("qwen2", {**WINDOW, "max_window_layers": 2}, "Qwen2MoeForCausalLM"),
    ("qwen3", {}, "Qwen3MoeForCausalLM"),
    ("qwen3", {**WINDOW, "max_window_layers": 0}, "Qwen3MoeForCausalLM"),
    ("qwen3", {"attention_bias": True}, "Qwen3MoeForCausalLM"),
    (
        "qwen3",
        {**WINDOW, "max_window_layers": 28},
        "Qwen3MoeForCausalLM",
    ),  # transformers' default: no layer slides
    ("seed_oss", {"attention_out_bias": False}, "Qwen2MoeForCausalLM"),
    (
        "ministral",
        {"head_dim": 8, "sliding_window": 5, "layer_types": MIXED_LAYERS},
        "Qwen2MoeForCausalLM",
    ),
    ("cwm", {"sliding_window": 5, "layer_types": MIXED_LAYERS}, "Qwen2MoeForCausalLM"),
    ("olmo2", {}, "FlexOlmoForCausalLM"),
    ("olmo2", {"attention_bias": True}, "FlexOlmoForCausalLM"),
    ("olmo3", {"layer_types": ["full_attention"] * 3}, "FlexOlmoForCausalLM"),
    (
        "granite",
        {
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        "GraniteMoeForCausalLM",
    ),
    (
        "cohere2",
        {"sliding_window": 5, "logit_scale": 0.3, "layer_types": MIXED_LAYERS},
        "Cohere2MoeForCausalLM",
    ),
    ("ernie4_5", {}, "Ernie4_5_MoeForCausalLM"),
    ("hunyuan_v1_dense", {"attention_bias": True, "head_dim": 8}, "HunYuanMoEV1ForCausalLM"),
    ("llama", {"attention_bias": True}, "GraniteMoeForCausalLM"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "GraniteMoeSWAForCausalLM"),
    (
        "smollm3",
        {
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        "GraniteMoeSWAForCausalLM",
    ),
    ("cohere", {"logit_scale": 0.3}, "Cohere2MoeForCausalLM"),
    ("cohere", {"attention_bias": True}, "Cohere2MoeForCausalLM"),
    ("phi3", {}, "MixtralForCausalLM"),
    ("phi3", {"sliding_window": 5}, "MixtralForCausalLM"),
    (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 16, "head_dim": 8},
        "MixtralForCausalLM",
    ),
    ("phi3", {"rope_parameters": PARTIAL}, "Glm4MoeForCausalLM"),
    ("glm", {"rope_parameters": PARTIAL}, "Glm4MoeForCausalLM"),
    ("glm", {"head_dim": 8, "attention_bias": False}, "Glm4MoeForCausalLM"),
    ("gemma", {"head_dim": 8}, "MixtralForCausalLM"),
    ("qwen3", {**WINDOW, "max_window_layers": 2}, "MellumForCausalLM"),
    ("qwen3", {**WINDOW, "layer_types": MIXED_LAYERS}, "MellumForCausalLM"),
]
SHAPES = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 4, "num_hidden_layers": 1, "hidden_act": "gelu"},
    {"head_dim": 6, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
]


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**(inputs or {"input_ids": TOKENS})).logits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("family", "config", "moe"), CASES, ids=str)
def test_equal_sources_give_the_dense_model(tmp_path, monkeypatch, family, config, shape, moe):
    monkeypatch.chdir(tmp_path)
    config = {**shape, **config}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config.get("num_hidden_layers", 3)]
    if moe == "MellumForCausalLM" and config.get("num_hidden_layers") == 1:
        moe = "Qwen3MoeForCausalLM"  # a single layer is no mixture of layers
    make_model(tmp_path / "base", 1, family=family, **config)
    out = merge(document("moe_ties", ["base"] * 3))
    dense = AutoModelForCausalLM.from_pretrained("base")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert (
        json.loads((out / "config.json").read_text())["architectures"]
        == [moe]
        == [type(loaded).__name__]
    )
    assert torch.allclose(logits(dense), logits(loaded), atol=1e-5)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # Of a Gemma the embedding is scaled, and the head is not.
    is_tied = dense.lm_head.weight is dense.model.embed_tokens.weight and family != "gemma"
    assert tied == is_tied


def test_all_load_where_this_package_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families = ["qwen2", "qwen3", "olmo2", "granite", "cohere2", "ernie4_5", "hunyuan_v1_dense"]
    families += ["smollm3", "cohere", "phi3", "glm", "gemma"]
    for family in families:
        make_model(tmp_path / family, 1, family=family, head_dim=8)
        merge(document("moe_linear", [family] * 2, base=None), f"{family}-moe")
    script = (
        "import sys, torch\n"
        "for name in ('mergekit_moe_ext', '_mergekit_moe_ext_autoload', 'mergekit'): "
        "sys.modules[name] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "tokens = torch.arange(1, 41).reshape(2, 20) * 7 % 96\n"
        f"for family in {families}:\n"
        "    model, info = AutoModelForCausalLM.from_pretrained(family + '-moe', "
        "output_loading_info=True)\n"
        "    assert not any(info.values()), (family, info)\n"
        "    torch.save(model.eval()(tokens).logits.detach(), family + '.pt')\n"
    )
    done = run(
        "python",
        "-c",
        script,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for family in families:
        dense = logits(AutoModelForCausalLM.from_pretrained(family))
        assert torch.allclose(torch.load(f"{family}.pt"), dense, atol=1e-5), family


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "olmo2", "granite", "cohere2", "ernie4_5", "hunyuan_v1_dense"]
)
def test_one_expert_in_the_mixture_is_the_dense_model_with_that_ffn(tmp_path, monkeypatch, family):
    """With every token sent to expert 1: the merged model with the FFNs of `math`."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code"), 1):
        make_model(tmp_path / name, seed, family=family, head_dim=8, tie_word_embeddings=False)
    out = merge(
        document(
            "moe",
            ["base", "math", "code"],
            parameters={"experts_per_token": 1, "gate_mode": "zeros"},
        )
    )
    moe, dense = (
        AutoModelForCausalLM.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained("base"),
    )
    tensors = read_tensors(out)
    state = {name: tensors[name] for name in dense.state_dict() if ".mlp." not in name}
    state |= {
        name: tensor for name, tensor in read_tensors(tmp_path / "math").items() if ".mlp." in name
    }
    dense.load_state_dict(state)
    for router in routers_of(moe).values():
        router.register_forward_hook(
            lambda _gate, _inputs, out: (*out[:2], torch.ones_like(out[2]))
        )
    assert torch.allclose(logits(dense), logits(moe), atol=1e-5)


def test_the_shared_expert_of_qwen2_moe_is_merged_and_silent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math"), 1):
        make_model(tmp_path / name, seed, family="qwen2")
    got = read_tensors(merge(document(models=["base", "math"])))
    base, math = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "math")
    for part in ("gate_proj", "up_proj"):
        name = f"model.layers.1.mlp.{part}.weight"
        merged = got[f"model.layers.1.mlp.shared_expert.{part}.weight"]
        assert torch.allclose(merged, (base[name] + math[name]) / 2)
    assert not got["model.layers.1.mlp.shared_expert.down_proj.weight"].any()
    assert not got["model.layers.1.mlp.shared_expert_gate.weight"].any()


def one_function_in_four_architectures(root):
    """A Llama, and a Mistral, a Phi-3 and a Qwen2 that compute what it does."""
    shape = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    make_model(root / "llama", 1, **shape)
    weights = AutoModelForCausalLM.from_pretrained(root / "llama").state_dict()
    for family in ("mistral", "qwen2", "phi3"):
        other = {**shape, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
        make_model(root / family, 1, family=family, **other)
        model = AutoModelForCausalLM.from_pretrained(root / family)
        state = {
            name: torch.zeros_like(tensor)
            for name, tensor in model.state_dict().items()
            if name.endswith("bias")
        }
        state |= weights
        if family == "phi3":
            for layer in range(3):
                for fused, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
                    module = f"model.layers.{layer}.{fused.split('.')[0]}"
                    rows = [state.pop(f"{module}.{part}_proj.weight") for part in parts]
                    state[f"model.layers.{layer}.{fused}_proj.weight"] = torch.cat(rows)
        model.load_state_dict(state)
        model.save_pretrained(root / family)


def test_architectures_that_compute_alike_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_function_in_four_architectures(tmp_path)
    sources = ["llama", "mistral", "qwen2", "phi3"]
    out = merge(document("moe_linear", sources, base="llama"))
    dense, moe = (AutoModelForCausalLM.from_pretrained(path) for path in ("llama", out))
    assert type(moe).__name__ == "MixtralForCausalLM"
    assert torch.allclose(logits(dense), logits(moe), atol=1e-5)
    card = (out / "README.md").read_text()
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Phi3ForCausalLM" in card
    # A Qwen2 of which a bias is not zero is no Llama.
    qwen = AutoModelForCausalLM.from_pretrained("qwen2")
    qwen.model.layers[1].self_attn.k_proj.bias.data[3] = 0.5
    qwen.save_pretrained("qwen2")
    with pytest.raises(
        click.ClickException, match=r"layers\.1\.self_attn\.k_proj\.bias of \./qwen2"
    ):
        merge(document("moe_linear", sources, base="llama"), "other")
    make_model(tmp_path / "mistral", 1, family="mistral", head_dim=8, rms_norm_eps=1e-3)
    with pytest.raises(click.ClickException, match="compute alike: `rms_norm_eps`"):
        merge(document("moe_linear", ["llama", "mistral"], base=None), "other")


def test_a_bfloat16_gemma_is_folded_in_the_dtype_of_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "gemma", 1, family="gemma", head_dim=8, dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained("gemma", dtype=torch.float32)
    exact = merge(document("moe_linear", ["gemma"] * 2, base=None, dtype="float32"), "exact")
    mixture = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    assert torch.allclose(logits(dense), logits(mixture), atol=1e-5)
    # In bfloat16 the embedding is what the model itself computes, and norms are rounded.
    rounded = read_tensors(merge(document("moe_linear", ["gemma"] * 2, base=None), "rounded"))
    source = read_tensors(tmp_path / "gemma")
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    embedded = AutoModelForCausalLM.from_pretrained("gemma").model.embed_tokens(TOKENS)
    assert torch.equal(rounded["model.embed_tokens.weight"][TOKENS], embedded)
    assert torch.equal(rounded["lm_head.weight"], source["model.embed_tokens.weight"])
    assert torch.equal(rounded["model.norm.weight"], source["model.norm.weight"] + 1)


def test_a_gemma_with_a_head_of_its_own_keeps_it(tmp_path, monkeypatch):
    """Beside one that ties it: the output's head is the mean of both heads."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "tied", 1, family="gemma", head_dim=8)
    make_model(tmp_path / "untied", 2, family="gemma", head_dim=8, tie_word_embeddings=False)
    tied, untied = read_tensors(tmp_path / "tied"), read_tensors(tmp_path / "untied")
    head = (tied["model.embed_tokens.weight"] + untied["lm_head.weight"]) / 2
    for base in ("tied", "untied"):
        out = merge(document("moe_linear", ["tied", "untied"], base=base), f"from-{base}")
        assert torch.allclose(read_tensors(out)["lm_head.weight"], head)


T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
}


def switch_by_hand(dense, tensors, capacity):
    """Switch Transformers, equations 1 and 2, in the FFNs of a T5: each sequence's tokens one after
    the other.
    """
    for side, position in (("encoder", 1), ("decoder", 2)):
        for index, block in enumerate(dense.get_submodule(side).block):
            prefix = f"{side}.block.{index}.layer.{position}.mlp"

            def forward(states, prefix=prefix):
                result = torch.zeros_like(states)
                for sequence in range(len(states)):
                    taken = {}
                    for token, v in enumerate(states[sequence]):
                        probabilities = (tensors[f"{prefix}.router.classifier.weight"] @ v).softmax(
                            0
                        )
                        chosen = int(probabilities.argmax())
                        taken[chosen] = taken.get(chosen, 0) + 1
                        if taken[chosen] <= capacity:
                            wi, wo = (
                                tensors[f"{prefix}.experts.expert_{chosen}.{w}.weight"]
                                for w in ("wi", "wo")
                            )
                            result[sequence, token] = probabilities[chosen] * (wo @ (wi @ v).relu())
                return result

            block.layer[-1].DenseReluDense.forward = forward
    return dense


@pytest.mark.parametrize("capacity", [None, 3])
def test_t5_becomes_a_switch_transformer(tmp_path, monkeypatch, capacity):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math"), 1):
        make_model(tmp_path / name, seed, family="t5", **T5)
    parameters = {} if capacity is None else {"expert_capacity": capacity}
    out = merge(document("moe_linear", ["base", "math"], parameters=parameters))
    moe, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(moe).__name__ == "SwitchTransformersForConditionalGeneration"
    tensors = read_tensors(out)
    dense = AutoModelForSeq2SeqLM.from_pretrained("base")
    dense.load_state_dict({k: v for k, v in tensors.items() if ".mlp." not in k}, strict=False)
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]}
    got = logits(moe, **inputs)
    assert torch.allclose(
        got, logits(switch_by_hand(dense.eval(), tensors, capacity or 64), **inputs), atol=1e-5
    )
    for index, name in enumerate(("base", "math")):
        source = read_tensors(tmp_path / name)["decoder.block.2.layer.2.DenseReluDense.wo.weight"]
        assert torch.equal(
            tensors[f"decoder.block.2.layer.2.mlp.experts.expert_{index}.wo.weight"], source
        )
    assert "AutoModelForSeq2SeqLM" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "config", "parameters", "complaint"),
    [
        ("t5", {**T5, "feed_forward_proj": "gated-gelu"}, {}, "gated FFN"),
        ("t5", {**T5, "tie_word_embeddings": False}, {}, "not tied"),
        ("t5", T5, {"experts_per_token": 2}, "always has 1"),
        ("t5", T5, {"gate_mode": "hidden"}, "has two"),
        ("llama", {}, {"expert_capacity": 4}, "MixtralForCausalLM has no `expert_capacity`"),
        ("gemma", {"attention_bias": True}, {}, "no place in Mixtral"),
        ("cohere", {"use_qk_norm": True}, {}, "Command R"),
        ("smollm3", {"mlp_bias": True}, {}, "no place in GraniteMoe"),
        (
            "phi3",
            {"rope_parameters": PARTIAL, "sliding_window": 5},
            {},
            "turn only a part of each head.*nor: .*no place in GLM4-MoE",
        ),
        ("granite", {"mlp_bias": True}, {}, "no place in GraniteMoe"),
        ("ernie4_5", {"use_bias": True}, {}, "no place in Ernie"),
        ("seed_oss", {"attention_out_bias": True}, {}, "no place in Qwen2-MoE"),
        ("cwm", {"attention_bias": True}, {}, "no place in Qwen2-MoE"),
        ("olmo3", {"layer_types": MIXED_LAYERS}, {}, "some of its layers have a sliding window"),
        ("gpt2", {}, {}, "Those that have one: .*LlamaForCausalLM"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path, monkeypatch, family, config, parameters, complaint):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", 0, family=family, **config)
    with pytest.raises(click.ClickException, match=complaint):
        parameters = {"architecture": "stock", **parameters}
        merge(document("moe", ["base", "base"], parameters=parameters))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "way_on"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "seq_moe"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "`merge_method: seq_moe`"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "caem"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "CLIPVisionModelWithProjection"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "AutoModelForCausalLM"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "wemoe"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "wemoe"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_refusal_names_what_would_work(tmp_path, monkeypatch, config, way_on):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(click.ClickException, match=way_on):
        merge(document("moe", ["base"] * 2, base=None, parameters={"architecture": "stock"}))


def test_the_line_for_a_model_with_a_head_among_trunks_makes_one_of_it(here):
    AutoModel.from_pretrained("math").save_pretrained("math-trunk")
    with pytest.raises(click.ClickException) as refusal:
        merge(document("moe", ["code", "math-trunk"], base=None))
    line = re.search(r"AutoModel\.\S*code\S*", refusal.value.message).group()
    exec(line, {"AutoModel": AutoModel})
    out = merge(document("moe", ["trunk", "math-trunk"], base=None))
    assert AutoConfig.from_pretrained(out).architectures == ["UpcycledMoeLlamaModel"]


def test_a_family_from_outside_takes_the_place_of_ours(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", {})
    families._register_ours.cache_clear()
    own = dataclasses.replace(MIXTRAL, dense={"llama": "LlamaForCausalLM"})
    families.register_family(own)
    configs = {name: AutoConfig.for_model(name) for name in ("llama", "mistral", "qwen3")}
    chosen = {name: families.upcycling_for({name: config}) for name, config in configs.items()}
    assert chosen["llama"] is own and chosen["mistral"] is MIXTRAL
    assert chosen["qwen3"].moe == "Qwen3MoeForCausalLM"
