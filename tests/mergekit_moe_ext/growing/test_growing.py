"""Experts added to a mixture and removed again, against the mixture that is built with them at
once, and against hooks of the test's own.
"""

import json

import click
import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import mergekit_moe_ext
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.growing.arrangement import order_with_new, order_without
from mergekit_moe_ext.growing.gate_rows import offset_of_row, random_tokens
from mergekit_moe_ext.mixtures.experts import with_num_experts
from mergekit_moe_ext.mixtures.routers import routers_of
from tests.conftest import TINY, document, make_model, merge, read_tensors
from tests.mergekit_moe_ext.mixtures.test_usage import make_moe
from tests.tokenizers import save_tokenizer

DENSE = {
    "llama": {},
    "phi3": {},
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "olmo2": {},
    "granite": {},
    "cohere2": {"layer_types": ["full_attention"] * 3},
    "ernie4_5": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4},
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}


def grow(models=("law",), out="grown", into="./moe", **parameters):
    """The document of a merge that adds these models to ./moe, without a forward pass."""
    margin = {} if parameters.get("gate_init") == "zeros" else {"margin": 0.0}
    settings = {"into": into, **margin, **parameters}
    return merge(document("moe", models=models, base=None, parameters=settings), out)


def entry(model, **parameters):
    return {"model": f"./{model}", "parameters": parameters}


@pytest.fixture
def moe(here):
    """A working directory with ./moe, a Mixtral of base and math, and the dense models."""
    merge(document("moe", models=("base", "math")), "moe")
    save_tokenizer(here / "moe", 96)
    return here


@pytest.mark.parametrize("family", DENSE)
def test_a_grown_mixture_is_the_one_that_is_built_at_once(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "law")):
        make_model(tmp_path / name, seed, family=family, **DENSE[family])
    merge(document("moe", models=("base", "math")), "moe")
    merge(document("moe", models=("base", "math", "law")), "at_once")
    old, grown = read_tensors(tmp_path / "moe"), read_tensors(grow())
    at_once = read_tensors(tmp_path / "at_once")
    assert grown.keys() == at_once.keys()
    gates = 0
    for name, tensor in grown.items():
        if name in old and old[name].shape == tensor.shape:
            assert torch.equal(tensor, old[name]), name
        elif any(part in name for part in ("gate.", "router.", "moe_statics")):
            axis = tensor.dim() - 1 if "moe_statics" in name else 0
            kept, new = tensor.split([2, 1], dim=axis)
            assert torch.equal(kept, old[name])
            assert torch.allclose(new, old[name].mean(dim=axis, keepdim=True), atol=1e-7)
            gates += 1
        else:  # an expert that is new, or the tensor of all
            assert torch.equal(tensor, at_once[name]), name
    assert gates
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    expected = json.loads((tmp_path / "at_once" / "config.json").read_text())
    assert config == expected
    smaller = {"merge_method": "remove_experts", "models": [{"model": "./grown"}]}
    back = read_tensors(merge({**smaller, "parameters": {"experts": [2]}}, "back"))
    assert back.keys() == old.keys()
    assert all(torch.equal(tensor, old[name]) for name, tensor in back.items())
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    with_margin = read_tensors(grow(out="with_margin", margin=5.0))
    changed = [name for name in grown if not torch.equal(grown[name], with_margin[name])]
    assert len(changed) == len(routers_of(auto.from_pretrained("moe")))
    _, report = auto.from_pretrained("grown", output_loading_info=True)
    assert not any(report.values())


def test_experts_that_are_equal_compute_what_one_does(moe):
    merge(document("moe", models=("base", "base")), "equal")
    grow(("base", "base"), out="grown", into="./equal", gate_init="zeros")
    ids = torch.arange(5, 45)[None]
    grown, base = (
        AutoModelForCausalLM.from_pretrained(name)(ids).logits for name in ("grown", "base")
    )
    assert (grown - base).abs().max() < 1e-5


def logits_of_routers(model, ids):
    """The gate's logits (tokens, experts) of every layer, in the mixture that lies there."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    return loaded(ids, output_router_logits=True).router_logits


def test_the_margin_is_the_distance_of_mean_logits(moe):
    """In the layer whose input no expert has changed yet, it is exact."""
    grow(margin=3.0)
    ids = torch.tensor(random_tokens(96, 64, seed=0))
    first = logits_of_routers("grown", ids)[0].mean(dim=0)
    assert first[2].item() == pytest.approx(first[:2].mean().item() - 3.0, abs=1e-4)


def test_prompts_draw_their_texts_and_no_others(moe):
    prompts = {"positive_prompts": ["w3 w4 w5", "w6 w7"], "negative_prompts": ["w20 w21 w22"]}
    grow([entry("law", name="law", **prompts)], gate_init="prompts", margin=2.0)
    tokenizer = AutoTokenizer.from_pretrained("moe")
    for key, sign in (("positive_prompts", 1), ("negative_prompts", -1)):
        differences = []
        for prompt in prompts[key]:
            ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
            first = logits_of_routers("grown", ids)[0]
            differences.append((first[:, 2] - first[:, :2].mean(dim=1)).mean())
        mean = torch.stack(differences).mean().item()
        assert mean == pytest.approx(sign * 2.0, abs=1e-4)
    assert AutoConfig.from_pretrained("grown").expert_names == [None, None, "law"]


def test_an_offset_is_the_shortest_that_meets_its_margins():
    states = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    offset = offset_of_row([(1.0, states[0]), (-1.0, states[1])], 4.0)
    assert torch.allclose(states.double() @ offset, torch.tensor([4.0, -4.0], dtype=torch.float64))
    # What is shortest lies in the span of the states.
    projection = states.double().T @ torch.linalg.lstsq(states.double().T, offset[:, None]).solution
    assert torch.allclose(projection[:, 0], offset)


def test_groups_of_experts_keep_their_members(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "deepseek_v3", first_k_dense_replace=1, **DEEPSEEK)
    for seed, name in enumerate(("law", "code"), 1):
        sizes = {"first_k_dense_replace": 3, "intermediate_size": 16}
        make_model(tmp_path / name, seed, family="deepseek_v3", **{**DEEPSEEK, **sizes})
    with pytest.raises(click.ClickException, match="2 groups of experts"):
        grow()
    old, grown = read_tensors(tmp_path / "moe"), read_tensors(grow(("law", "code")))
    dense = {name: read_tensors(tmp_path / name) for name in ("law", "code")}
    place = "model.layers.1.mlp.experts.{}.up_proj.weight"
    # Two of each group and a new one: the old ones 0, 1, 2, 3 are 0, 1, 3, 4 now.
    for target, index in ((0, 0), (1, 1), (3, 2), (4, 3)):
        assert torch.equal(grown[place.format(target)], old[place.format(index)])
    for target, name in ((2, "law"), (5, "code")):
        expected = dense[name]["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(grown[place.format(target)], expected)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(grown[bias][[0, 1, 3, 4]], old[bias])
    assert torch.allclose(grown[bias][[2, 5]], old[bias].mean().expand(2))


def test_orders_of_groups():
    config = AutoConfig.for_model("deepseek_v3", **{**TINY, **DEEPSEEK})
    config.architectures = ["DeepseekV3ForCausalLM"]
    assert order_with_new(config, 4) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert order_without(config, ["1", "2"]) == (0, 3)
    with pytest.raises(click.ClickException, match="remove as many of each group"):
        order_without(config, ["0", "1"])


def test_an_expert_in_another_dtype_is_cast_and_the_mixture_is_not(moe):
    merge(document("moe", models=("base", "math"), dtype="bfloat16"), "half")
    grown = read_tensors(grow(into="./half"))
    assert {tensor.dtype for tensor in grown.values()} == {torch.bfloat16}
    expected = read_tensors(moe / "law")["model.layers.0.mlp.up_proj.weight"].bfloat16()
    new = grown["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    assert torch.equal(new, expected)


def test_a_mixture_in_the_layout_of_memory_grows_alike(moe):
    loaded = AutoModelForCausalLM.from_pretrained("moe")
    loaded.save_pretrained("fused", save_original_format=False)
    expected, grown = read_tensors(grow(out="expected")), read_tensors(grow(into="./fused"))
    assert grown.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in grown.items())


def save_lora(name, targets):
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained("base")
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(name)
    return adapted


def test_a_lora_on_its_base_is_an_expert(moe):
    merged = save_lora("lora", ["q_proj", "down_proj"]).merge_and_unload()
    grown = read_tensors(grow([{"model": "./base+./lora"}]))
    expected = merged.model.layers[1].mlp.down_proj.weight
    new = grown["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    assert torch.allclose(new, expected, atol=1e-6)
    save_lora("attention", ["q_proj"])
    with pytest.raises(click.ClickException, match="changes no FFN"):
        grow([{"model": "./base+./attention"}], out="other")


WRONG = [
    ({"margin": -1.0}, "margin"),
    ({"shared": "linear"}, "`shared` does not go with `into`"),
    ({"gate_mode": "random"}, "`gate_mode` does not go with `into`"),
    ({"architecture": "upcycled"}, "`architecture` does not go with `into`"),
    ({"weight": 0.5}, "`weight` is not an option here"),
    ({"gate_init": "zeros", "margin": 1.0}, "does not go with `gate_init: zeros`"),
    ({"gate_init": "prompts", "margin": 1.0}, "needs `positive_prompts`"),
    ({"into": "./base"}, "LlamaForCausalLM"),
    ({"into": "./nowhere"}, "does not exist"),
]


@pytest.mark.parametrize(("parameters", "message"), WRONG, ids=str)
def test_wrong_options_are_refused(moe, parameters, message):
    with pytest.raises(click.ClickException, match=message):
        grow(**parameters)
    assert not (moe / "grown").exists()


def test_models_that_do_not_fit_are_refused(moe):
    make_model(moe / "wide", 1, intermediate_size=56)
    make_model(moe / "deep", 1, num_hidden_layers=2)
    make_model(moe / "other", 1, family="olmo2")
    make_model(moe / "gelu", 1, hidden_act="gelu")
    make_model(moe / "biased", 1, mlp_bias=True)
    for name, message in {
        "wide": r"gate_proj.weight of ./wide is \(56, 32\), but an expert of the mixture wants",
        "deep": "`num_hidden_layers` is 2, not 3",
        "other": "experts of MixtralForCausalLM are made of .*LlamaForCausalLM or Mistral",
        "gelu": "`hidden_act` is 'gelu'",
        "biased": "bias of ./biased has no place in an expert",
        "moe": "the mixture itself",
    }.items():
        with pytest.raises(click.ClickException, match=message):
            grow((name,))
    grow(out="copy")
    with pytest.raises(click.ClickException, match="mixture of experts itself"):
        grow(("copy",))
    with pytest.raises(click.ClickException, match=r"mixture of experts already .* caem"):
        merge(document("moe_linear", models=("moe", "moe"), base=None), "merged")
    with pytest.raises(click.ClickException, match="leave `base_model` out"):
        merge(document("moe", models=("law",), parameters={"into": "./moe"}), "grown")
    with pytest.raises(click.ClickException, match="is for `into`"):
        merge(document("moe", parameters={"margin": 1.0}), "new")
    assert not (moe / "grown").exists()


def test_a_mixture_of_transformers_alone_takes_ffns_of_its_own_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "olmoe", num_experts=4, num_key_value_heads=4)
    make_model(tmp_path / "law", 1, num_key_value_heads=4)
    with pytest.raises(click.ClickException, match="not of the base that OlmoeForCausalLM"):
        grow()


def test_names_are_kept_and_found(moe):
    grow([entry("law", name="law"), entry("code", name="code")])
    mergekit_moe_ext.remove_expert("grown", ["law", 0], "smaller")
    assert AutoConfig.from_pretrained("smaller").expert_names == [None, "code"]
    # Names of experts that may be others now are no names.
    assert not hasattr(with_num_experts(AutoConfig.from_pretrained("grown"), 3), "expert_names")
    smaller, old = read_tensors(moe / "smaller"), read_tensors(moe / "moe")
    place = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    assert torch.equal(smaller[place.format(0)], old[place.format(1)])
    for experts, message in {
        ("tax",): r"no expert 'tax': they are 0 to 3; .* 2 \(law\), 3 \(code\)",
        ("law", "2"): "twice",
        ("law", "code", "0"): "is sent to 2 experts, and only 1 would be left",
        ("0", "1", "2", "3"): "no expert would be left",
    }.items():
        with pytest.raises(click.ClickException, match=message):
            mergekit_moe_ext.remove_expert("grown", experts, "wrong")
    for names, message in {
        ("law", "law"): "two experts are called",
        ("law", "7"): "cannot be an expert's name",
        ("law",): r"1 name for 2 expert\(s\)",
    }.items():
        with pytest.raises(click.ClickException, match=message):
            mergekit_moe_ext.add_expert("moe", ["law", "code"], "wrong", names=names)


def test_the_commands_do_what_the_documents_do(moe):
    command = ["add-expert", "moe", "--expert", "law", "--name", "law", "--margin", "0", "--quiet"]
    result = CliRunner().invoke(main, [*command, "-o", "grown"])
    assert result.exit_code == 0, result.output
    expected = read_tensors(grow([entry("law", name="law")], out="expected"))
    for name, tensor in read_tensors(moe / "grown").items():
        assert torch.equal(tensor, expected[name])
    card = (moe / "grown" / "README.md").read_text()
    assert "| 2 | law | law |" in card and "which had 2 per layer" in card
    assert (moe / "grown" / "tokenizer.json").exists()
    again = CliRunner().invoke(main, [*command, "-o", "grown"])
    assert again.exit_code == 1 and "is not empty" in again.output
    command = ["remove-expert", "grown", "--expert", "law", "-o", "back"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert read_tensors(moe / "back").keys() == read_tensors(moe / "moe").keys()


def test_a_router_reads_what_a_hook_sees(moe):
    """The states of the gate are its inputs, in whatever shape it gets them."""
    from mergekit_moe_ext.upcycling.prompts import hidden_states

    model = AutoModelForCausalLM.from_pretrained("moe")
    names = list(routers_of(model))
    prompts = ((3, 4, 5), (6, 7))
    means = hidden_states(model, names, prompts, average=True)
    seen = []
    model.get_submodule(names[1]).register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].reshape(-1, 32).mean(dim=0))
    )
    for prompt in prompts:
        model(torch.tensor([prompt]))
    assert torch.allclose(means[1], torch.stack(seen).mean(dim=0), atol=1e-6)
