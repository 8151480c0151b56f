"""Generic mixtures: against the dense model, a loop over the sources' own FFNs, and a closed form
of the loss; loaded by transformers alone.
"""

import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import click
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2LMHeadModel

from mergekit_moe_ext.modeling.modeling_upcycled_moe import TokenRouter, grouped_product
from mergekit_moe_ext.upcycling.ffns import find_ffns
from tests.conftest import SPECIAL_TOKENS, document, make_model, merge, read_tensors, run

TOKENS = torch.arange(1, 41).reshape(2, 20) * 7 % 96
HEADS = {"n_head": 4}
GPT2 = {"n_embd": 32, "n_positions": 64, **HEADS}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}
VIT = {"image_size": 16, "patch_size": 8, "num_labels": 5}
# By the class of the sources: model type, what makes it tiny, and how many FFNs it has.
FAMILIES = {
    "GPT2LMHeadModel": ("gpt2", GPT2, 3),
    "GPTNeoXForCausalLM": ("gpt_neox", {}, 3),
    "OPTForCausalLM": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}, 3),
    "FalconForCausalLM": ("falcon", {"new_decoder_architecture": True}, 3),
    "BloomForCausalLM": ("bloom", HEADS, 3),
    "MptForCausalLM": ("mpt", {"d_model": 32, "n_heads": 4}, 3),
    "Gemma2ForCausalLM": ("gemma2", {"head_dim": 6}, 3),
    "BertForMaskedLM": ("bert", {}, 3),
    "T5ForConditionalGeneration": ("t5", {**T5, "feed_forward_proj": "gated-gelu"}, 5),
    "BartForConditionalGeneration": ("bart", BART, 5),
    "MarianMTModel": ("marian", BART, 5),  # its positions are not in its files
    "ViTForImageClassification": ("vit", VIT, 3),
}


def make(path, architecture, seed, dtype=torch.float32, **changes):
    """A tiny model of this class; seeds other than 0 are fine-tunes of the first."""
    model_type, values, _ = FAMILIES[architecture]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    config = AutoConfig.for_model(model_type, **{**sizes, **SPECIAL_TOKENS, **values, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    model.to(dtype).save_pretrained(path)


def inputs_of(architecture):
    if architecture.startswith("ViT"):
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()}
    if architecture.endswith(("ConditionalGeneration", "MTModel")):
        return {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :6]}
    return {"input_ids": TOKENS}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def load(path, **keywords):
    """The model by the Auto class that its config names, and transformers' report."""
    auto_map = json.loads((path / "config.json").read_text())["auto_map"]
    (auto,) = auto_map.keys() - {"AutoConfig"}
    return getattr(transformers, auto).from_pretrained(path, output_loading_info=True, **keywords)


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """A working directory with ./base, ./math and ./code, fine-tunes of one GPT-2."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code")):
        make(tmp_path / name, "GPT2LMHeadModel", seed)
    return tmp_path


@pytest.mark.parametrize("architecture", FAMILIES)
def test_equal_sources_give_the_dense_model(tmp_path, monkeypatch, architecture):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base", architecture, 1)
    out = merge(document("moe_linear", ["base"] * 3))
    dense = getattr(transformers, architecture).from_pretrained("base")
    loaded, info = load(out)
    assert not any(info.values()), info
    assert type(loaded).__name__ == f"UpcycledMoe{architecture}"
    routers = [module for module in loaded.modules() if isinstance(module, TokenRouter)]
    assert len(routers) == FAMILIES[architecture][2]
    inputs = inputs_of(architecture)
    wanted = logits(dense, inputs)
    assert torch.allclose(logits(loaded, inputs), wanted, atol=1e-5 * wanted.abs().max().item())
    # Saved and loaded again it is the same; so it is from another place.
    loaded.save_pretrained("again")
    Path("again").rename("moved")
    again, info = load(tmp_path / "moved")
    assert not any(info.values()), info
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))


@pytest.mark.parametrize(
    ("architecture", "ffn", "residuals", "chosen"),
    [
        ("GPT2LMHeadModel", "transformer.h.1.mlp", 0, 1),
        ("GPT2LMHeadModel", "transformer.h.1.mlp", 0, 3),
        ("BloomForCausalLM", "transformer.h.1.mlp", 1, 2),
        ("T5ForConditionalGeneration", "decoder.block.1.layer.2.DenseReluDense", 0, 2),
    ],
)
def test_a_token_gets_the_mean_of_the_ffns_that_it_chooses(
    tmp_path, monkeypatch, architecture, ffn, residuals, chosen
):
    """Against the FFNs of the sources themselves, one token at a time."""
    monkeypatch.chdir(tmp_path)
    sources = []
    for seed, name in enumerate(("base", "math", "code")):
        make(tmp_path / name, architecture, seed)
        dense = getattr(transformers, architecture).from_pretrained(name).eval()
        sources.append(dense.get_submodule(ffn))
    out = merge(
        document("moe_linear", ["base", "math", "code"], parameters={"experts_per_token": chosen})
    )
    mixture = load(out)[0].eval().get_submodule(ffn)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    others = [torch.zeros_like(x)] * residuals  # which some FFNs add
    got = mixture(x, *others)
    for sample in range(2):
        for token in range(5):
            here = x[sample : sample + 1, token : token + 1]
            scores = (here @ mixture.router.weight.T).flatten()
            experts = scores.argsort(descending=True)[:chosen]
            weights = scores[experts].exp() / scores[experts].exp().sum()
            wanted = torch.zeros(32)
            for weight, expert in zip(weights, experts, strict=True):
                zeros = [torch.zeros_like(here)] * residuals
                wanted += weight * sources[expert](here, *zeros)[0, 0]
            assert torch.allclose(got[sample, token], wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 5])  # one that torch's own grouped product takes, one not
def test_the_grouped_product_and_its_gradients(dtype, width):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, width, generator=generator).to(dtype).requires_grad_()
    matrices = torch.randn(4, width, 24, generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)  # the second expert has none
    experts = torch.tensor([0, 0, 2, 2, 2, 2, 3])
    got = grouped_product(rows, matrices, ends)
    wanted = torch.einsum("ri,rio->ro", rows, matrices[experts])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5}
    assert torch.allclose(got, wanted, **tolerance)
    weights = torch.randn(got.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad((got * weights).sum(), (rows, matrices))
    for gradient, expected in zip(
        gradients, torch.autograd.grad((wanted * weights).sum(), (rows, matrices)), strict=True
    ):
        assert torch.allclose(gradient, expected, **tolerance)


def test_the_balance_loss_and_what_is_returned(gpt2):
    model = load(merge(document(models=["base", "math", "code"])))[0].eval()
    mask = torch.ones_like(TOKENS)
    mask[1, 12:] = 0
    plain = model(TOKENS, attention_mask=mask, labels=TOKENS)
    assert "router_logits" not in plain
    asked = model(TOKENS, attention_mask=mask, labels=TOKENS, output_router_logits=True)
    assert torch.equal(asked.logits, plain.logits) and len(asked.router_logits) == 3
    # Switch Transformers, equations 4 to 6, over the tokens of all layers that are no padding.
    real = mask.flatten().bool()
    rows = torch.cat([each[real] for each in asked.router_logits])
    chosen = functional.one_hot(rows.topk(2).indices, 3).sum(dim=1).float()
    wanted = 3 * (chosen.mean(dim=0) * rows.softmax(-1).mean(dim=0)).sum()
    assert torch.allclose(asked.aux_loss, wanted)
    assert torch.allclose(asked.loss, plain.loss + 0.001 * wanted)
    asked.aux_loss.backward()
    assert model.transformer.h[0].mlp.router.weight.grad.abs().sum() > 0
    model.config.output_router_logits = True
    values = model(TOKENS, return_dict=False)
    assert isinstance(values, tuple) and torch.equal(values[0], model(TOKENS).logits)


def test_a_balance_loss_that_would_not_reach_the_routers_is_an_error(gpt2):
    model = load(merge(document(models=["base", "math"])))[0].train()
    for reentrant, is_right in ((False, True), (True, False)):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if is_right:
            model(TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()
            assert model.transformer.h[1].mlp.router.weight.grad.abs().sum() > 0
            continue
        with pytest.raises(ValueError, match="use_reentrant=True"):
            model(TOKENS, labels=TOKENS, output_router_logits=True)


def test_generation_with_a_cache_is_generation_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for architecture in ("GPT2LMHeadModel", "Gemma2ForCausalLM", "T5ForConditionalGeneration"):
        for seed, name in enumerate(("base", "math")):
            make(tmp_path / architecture / name, architecture, seed)
        paths = [f"{architecture}/{name}" for name in ("base", "math")]
        model = load(merge(document(models=paths, base=None), f"{architecture}-moe"))[0].eval()
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        cached = model.generate(TOKENS, use_cache=True, num_beams=2, **settings)
        assert torch.equal(cached, model.generate(TOKENS, use_cache=False, num_beams=2, **settings))


def test_threads_do_not_take_each_other_s_choices(gpt2):
    model = load(merge(document(models=["base", "math", "code"])))[0].eval()
    texts = [TOKENS.roll(shift, dims=1) for shift in range(4)]
    wanted = [logits(model, {"input_ids": ids}) for ids in texts]

    def is_right(index):
        rounds = [logits(model, {"input_ids": texts[index]}) for _ in range(10)]
        return all(torch.equal(got, wanted[index]) for got in rounds)

    with ThreadPoolExecutor(len(texts)) as pool:
        assert all(pool.map(is_right, range(len(texts))))


def test_half_precision_tied_weights_copies_and_offloading(gpt2):
    out = merge(document(models=["base", "math"], dtype="bfloat16"))
    tensors = read_tensors(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    model = load(out, dtype=torch.bfloat16)[0]
    assert model.lm_head.weight is model.transformer.wte.weight
    exact = load(out, dtype=torch.float32)[0]
    inputs = {"input_ids": TOKENS}
    half = logits(model, inputs)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), logits(exact, inputs), atol=0.05)
    assert torch.equal(logits(copy.deepcopy(exact), inputs), logits(exact, inputs))
    # Each layer stays whole, and its router with it.
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu"}
    places |= {"transformer.h.0": "disk", "transformer.h.1": "cpu", "transformer.h.2": "disk"}
    places |= {"lm_head": "cpu"}
    spread = load(out, dtype=torch.float32, device_map=places, offload_folder="offload")[0]
    assert torch.equal(logits(spread, inputs), logits(exact, inputs))


def test_peft_trains_its_copies_of_the_routers(gpt2):
    """With `modules_to_save` they stand in the routers' places, and are what chooses."""
    model = load(merge(document(models=["base", "math", "code"])))[0]
    settings = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["router"])
    adapted = peft.get_peft_model(model, settings).eval()
    before = logits(adapted, {"input_ids": TOKENS})
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    names = [name for name, _ in adapted.named_parameters()]
    routers = [name for name in names if "router.modules_to_save" in name]
    assert len(routers) == 3
    with torch.no_grad():
        for name in routers:
            parameter = adapted.get_parameter(name)
            assert parameter.grad.abs().sum() > 0, name
            parameter.copy_(-parameter)
    after = logits(adapted, {"input_ids": TOKENS})
    assert not torch.allclose(after, before)
    assert torch.allclose(logits(adapted.merge_and_unload(), {"input_ids": TOKENS}), after)


def test_it_loads_where_this_package_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {}
    for architecture in ("GPT2LMHeadModel", "T5ForConditionalGeneration"):
        make(tmp_path / architecture, architecture, 1)
        out = merge(document(models=[architecture] * 2, base=None), f"{architecture}-moe")
        inputs = inputs_of(architecture)
        torch.save(inputs, f"{architecture}.pt")
        expected[architecture] = logits(load(out)[0], inputs)
    script = (
        "import sys, torch\n"
        "for name in ('mergekit_moe_ext', '_mergekit_moe_ext_autoload', 'mergekit'): "
        "sys.modules[name] = None\n"
        "from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM\n"
        "autos = {'GPT2LMHeadModel': AutoModelForCausalLM, "
        "'T5ForConditionalGeneration': AutoModelForSeq2SeqLM}\n"
        "for name, auto in autos.items():\n"
        "    model, info = auto.from_pretrained(name + '-moe', output_loading_info=True, "
        "trust_remote_code=True)\n"
        "    assert not any(info.values()), (name, info)\n"
        "    model.save_pretrained(name + '-again')\n"
        "    model = auto.from_pretrained(name + '-again', trust_remote_code=True)\n"
        "    with torch.no_grad():\n"
        "        torch.save(model.eval()(**torch.load(name + '.pt')).logits, name + '-logits.pt')\n"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_MODULES_CACHE": "code"}
    done = run("python", "-c", script, env=environment)
    assert done.returncode == 0, done.stderr
    for architecture, wanted in expected.items():
        assert torch.equal(torch.load(f"{architecture}-logits.pt"), wanted)


def test_shared_parameters_are_merged_and_experts_are_not(gpt2):
    tensors = read_tensors(
        merge(document("moe", ["base", "math"], parameters={"shared": "linear"}))
    )
    base, math = read_tensors(gpt2 / "base"), read_tensors(gpt2 / "math")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(tensors[name], torch.stack([base[name], math[name]]))
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.allclose(tensors[name], (base[name] + math[name]) / 2)


def test_checkpoints_of_a_trunk_alone_are_read(gpt2):
    """As GPT-2's and Bloom's on the Hub, which lack the prefix of the trunk."""
    expected = read_tensors(merge(document(models=["base", "math"]), "expected"))
    for name in ("base", "math"):
        tensors = read_tensors(gpt2 / name)
        names = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        names["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # which transformers leaves out
        save_file(names, gpt2 / name / "model.safetensors", {"format": "pt"})
    got = read_tensors(merge(document(models=["base", "math"])))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_gates_of_prompts_read_what_the_ffn_receives(gpt2):
    from tests.tokenizers import save_tokenizer

    save_tokenizer(gpt2 / "base", 96)
    prompts = {"base": ["w1 w2 w3"], "math": ["w9 w8", "w7 w6 w5 w4"]}
    models = [
        {"model": name, "parameters": {"positive_prompts": texts}}
        for name, texts in prompts.items()
    ]
    out = merge(document(models=models, parameters={"gate_mode": "hidden"}))
    dense = GPT2LMHeadModel.from_pretrained("base").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")
    got = read_tensors(out)["transformer.h.1.mlp.router.weight"]
    received = []
    dense.transformer.h[1].mlp.register_forward_pre_hook(lambda _, x: received.append(x[0][0, -1]))
    for expert, texts in enumerate(prompts.values()):
        received.clear()
        for text in texts:
            with torch.no_grad():
                dense(tokenizer(text, return_tensors="pt")["input_ids"])
        direction = functional.normalize(torch.stack(received).mean(dim=0), dim=0)
        assert torch.allclose(got[expert], direction, atol=1e-5)


def test_the_choice_of_architecture(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "llama", 1, tie_word_embeddings=True)
    make_model(tmp_path / "biased", 1, mlp_bias=True)
    dense = AutoModelForCausalLM.from_pretrained("llama")

    def merged(model, **parameters):
        return merge(document(models=[model] * 2, base=None, parameters=parameters), "out")

    out = merge(document(models=["llama"] * 2, base=None), "stock")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    upcycled = merge(
        document(models=["llama"] * 2, base=None, parameters={"architecture": "upcycled"}), "mine"
    )
    got = logits(load(upcycled)[0], {"input_ids": TOKENS})
    assert torch.allclose(got, logits(dense, {"input_ids": TOKENS}), atol=1e-5)
    with pytest.raises(click.ClickException, match=r"mlp_bias.*Those that have one: .*Llama"):
        merged("biased", architecture="stock")
    caplog.clear()
    merged("biased")
    warnings = [record.getMessage() for record in caplog.records]
    assert any("mlp_bias" in each and "UpcycledMoeLlama" in each for each in warnings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a generic mixture (`UpcycledMoeLlamaForCausalLM`)" in card and "mlp_bias" in card
    assert str(tmp_path) not in card


def test_what_no_generic_mixture_is_made_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "gpt2", "GPT2LMHeadModel", 0)
    make(tmp_path / "opt", "OPTForCausalLM", 0)
    make(tmp_path / "t5", "T5ForConditionalGeneration", 0)
    make(tmp_path / "vit", "ViTForImageClassification", 0)
    make(tmp_path / "cats", "ViTForImageClassification", 0, id2label=dict(enumerate("abcde")))
    make(tmp_path / "relu", "GPT2LMHeadModel", 0, activation_function="relu")
    moe = merge(document(models=["gpt2"] * 2, base=None), "moe")
    refusals = [
        (["gpt2", "opt"], {}, "must be one class"),
        ([str(moe)] * 2, {}, "mixture of experts already"),
        (["gpt2", "relu"], {}, "another activation than ./gpt2: `activation_function` is 'relu'"),
        (["gpt2"] * 2, {"experts_per_token": 3}, "^experts_per_token .* at most 2$"),
        (["gpt2"] * 2, {"gate_mode": "hidden"}, "^gate_mode: hidden needs `positive_prompts`"),
        (["gpt2"] * 2, {"expert_capacity": 3}, "Switch Transformers alone"),
        (["gpt2", "opt"], {"architecture": "upcycled"}, "^no generic mixture .* must be one class"),
        (["t5"] * 2, {"gate_mode": "hidden", "architecture": "upcycled"}, "is one decoder"),
        (["vit"] * 2, {"gate_mode": "cheap_embed"}, "token embeddings"),
        (["vit", "cats"], {}, "other classes"),
        (["gpt2"] * 2, {"architecture": "mine"}, "architecture"),
    ]
    for models, parameters, complaint in refusals:
        with pytest.raises(click.ClickException, match=complaint):
            merge(document(models=models, base=None, parameters=parameters), "refused")
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("architecture", "values", "complaint"),
    [
        ("RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1}, "is not linear"),
        ("SegformerForImageClassification", {}, "dwconv.*is not linear"),
        ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1}, "no FFN"),
        ("ResNetForImageClassification", {}, "no layers"),
        ("Qwen3MoeForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1}, "already"),
    ],
)
def test_ffns_that_do_more_than_map_tokens_are_refused(architecture, values, complaint):
    model_class = getattr(transformers, architecture)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**values))
    with pytest.raises(click.ClickException, match=complaint):
        find_ffns(model)


def test_an_ffn_that_mixes_a_linear_module_of_its_input_with_its_output_is_refused():
    """Its gate would stay sorted by expert, where its output is not."""

    class GatedMLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(16, 24)
            self.gate = torch.nn.Linear(16, 16)
            self.down = torch.nn.Linear(24, 16)

        def forward(self, x):
            return self.gate(x).sigmoid() * self.down(self.up(x).relu())

    class Layer(transformers.modeling_layers.GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.mlp = GatedMLP()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])
            config = SimpleNamespace(is_encoder_decoder=False)
            config.get_text_config = lambda decoder=False: config
            config.sub_configs = {}
            self.config = config

    with torch.device("meta"):
        model = Model()
    with pytest.raises(click.ClickException, match="more than to map every token"):
        find_ffns(model)


def test_a_decoder_that_copies_its_configuration_is_saved_as_what_it_is(tmp_path):
    from mergekit_moe_ext.upcycling.generic import read_dense, upcycled_config
    from tests.mergekit_moe_ext.upcycling.architectures import tiny_config

    config = tiny_config(transformers.PegasusConfig)
    config.architectures = ["PegasusForCausalLM"]
    ours = upcycled_config(config, read_dense(config).ffns, 3, 2)
    model = AutoModelForCausalLM.from_config(ours)
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path)
    assert type(loaded) is type(model) and not any(info.values())
    assert torch.equal(*(logits(each, {"input_ids": TOKENS}) for each in (model, loaded)))


def test_an_encoder_decoder_s_stacks_have_losses_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        make(tmp_path / name, "BartForConditionalGeneration", seed)
    out = merge(document(models=["base", "math"], base=None))
    model = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    output = model(input_ids=TOKENS, labels=TOKENS[:, :6].contiguous(), output_router_logits=True)
    rows = [len(each) for each in output.router_logits]
    assert rows == [40, 40, 40, 12, 12]
    losses = []
    for stack in (output.router_logits[:3], output.router_logits[3:]):
        all_rows = torch.cat(stack)
        losses.append(2 * (2 / 2 * all_rows.softmax(-1).mean(dim=0)).sum())  # both are chosen
    assert torch.allclose(output.aux_loss, torch.stack(losses).mean())
