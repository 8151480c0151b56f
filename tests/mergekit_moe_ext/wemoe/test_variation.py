"""How far fine-tunes are from their base, against loops over numbers, and what `upscale: auto`
makes of it.
"""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

from mergekit_moe_ext.analysis import parameter_variation
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.wemoe import variation
from tests.conftest import make_model, merge
from tests.mergekit_moe_ext.merging.test_bad_input import refused
from tests.mergekit_moe_ext.wemoe.test_wemoe import load, make_classifier, wemoe

T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
LLAMA = ("model.layers.{}", ".self_attn.", ".mlp.")
# family: what its config needs here, and where its layers, their attention and their MLPs are
FAMILIES = {
    "llama": ({}, *LLAMA),
    "qwen2": ({}, *LLAMA),  # biases in attention
    "qwen3": ({}, *LLAMA),  # norms inside attention
    "gpt2": ({}, "transformer.h.{}", ".attn.", ".mlp."),
    "opt": (OPT, "model.decoder.layers.{}", ".self_attn.", ".fc"),
}
EDGES = (0.001, 0.01, 0.02, 0.05)


def loop(start, end, layer, part):
    """Squared L2 change, cosine, number of parameters, and numbers below the edges: number by
    number.
    """
    change = product = of_base = of_model = 0.0
    count, below = 0, [0] * len(EDGES)
    for name, tensor in start.items():
        if name.startswith(f"{layer}{part}") and "norm" not in name:
            for before, after in zip(
                tensor.flatten().tolist(), end[name].flatten().tolist(), strict=True
            ):
                change += (after - before) ** 2
                product += after * before
                of_base += before**2
                of_model += after**2
                count += 1
                below = [
                    number + (abs(after - before) < edge)
                    for number, edge in zip(below, EDGES, strict=True)
                ]
    assert count
    return change, product / (of_base * of_model) ** 0.5, count, below


def check(measured, start, ends, layers, part):
    """Compares what was measured of a part with the loop."""
    assert measured.layers == tuple(layers)
    all_changes = []
    for model, end in ends.items():
        by_layer = [loop(start, end, layer, part) for layer in layers]
        changes, cosines, parameters, below = zip(*by_layer, strict=True)
        all_changes += changes
        assert measured.change[model] == pytest.approx(changes, rel=1e-9)
        assert measured.cosine[model] == pytest.approx(cosines, rel=1e-12)
        assert measured.parameters == parameters
        counts = tuple(sum(of_edge) for of_edge in zip(*below, strict=True))
        assert measured.below[model] == counts and len(counts) == len(EDGES)
        shares = [number / sum(measured.parameters) for number in counts]
        assert measured.share_below(model) == pytest.approx(shares)
        assert 0 < shares[0] < shares[2] < 1
    assert measured.mean_change == pytest.approx(sum(all_changes) / len(all_changes))
    everything = len(ends) * sum(measured.parameters)
    assert measured.mean_change_per_parameter == pytest.approx(sum(all_changes) / everything)


def states(auto, *paths):
    return [auto.from_pretrained(path, dtype="auto").double().state_dict() for path in paths]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_a_loop_over_numbers(tmp_path, family, monkeypatch):
    config, layers, attention, mlp = FAMILIES[family]
    base, *others = (
        make_model(tmp_path / n, i, family=family, **config)
        for i, n in enumerate(("base", "a", "b"))
    )
    monkeypatch.setattr(variation, "_CHUNK", 100)  # several per tensor, and one that is not full
    found = parameter_variation(base, dict(zip("ab", others, strict=True)), thresholds=EDGES)
    start, *ends = states(AutoModelForCausalLM, base, *others)
    names = [layers.format(index) for index in range(3)]
    for part, where in (("attention", attention), ("mlp", mlp)):
        check(found[part], start, dict(zip("ab", ends, strict=True)), names, where)
    (last,) = parameter_variation(base, {"a": others[0]}, layers=[2])["mlp"].change["a"]
    assert last == found["mlp"].change["a"][2]


def test_images_and_encoder_decoders(tmp_path):
    base, sun = (
        make_classifier(tmp_path / name, seed) for seed, name in enumerate(("base", "sun"))
    )
    found = parameter_variation(base, {"sun": sun}, thresholds=EDGES)
    start, end = states(AutoModelForImageClassification, base, sun)
    layers = sorted({name.split(".attention.")[0] for name in start if ".attention." in name})
    check(found["attention"], start, {"sun": end}, layers, ".attention.")
    assert len(layers) == 2 and found["mlp"].parameters == (2 * 16 * 24 + 16 + 24,) * 2
    base, math = (make_model(tmp_path / f"t5-{seed}", seed, family="t5", **T5) for seed in (0, 1))
    found = parameter_variation(base, {"math": math}, thresholds=EDGES)
    start, end = states(AutoModelForSeq2SeqLM, base, math)
    where = ".layer.0.SelfAttention."
    blocks = dict.fromkeys(name.split(where)[0] for name in start if where in name)
    assert {name.split(".")[0] for name in blocks} == {"encoder", "decoder"}
    linears = {
        name: tensor
        for name, tensor in start.items()
        if not name.endswith("relative_attention_bias.weight")
    }
    check(found["attention"], linears, {"math": end}, blocks, where)  # not that across


def test_shards_and_half_precision(sources, tmp_path):
    half = make_model(tmp_path / "half", 3, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(sources / "code").save_pretrained(
        tmp_path / "shards", max_shard_size="20KB"
    )
    found = parameter_variation(
        sources / "base", {"half": half, "shards": tmp_path / "shards"}, thresholds=EDGES
    )
    start, *ends = states(AutoModelForCausalLM, sources / "base", half, tmp_path / "shards")
    layers = [f"model.layers.{index}" for index in range(3)]
    check(found["mlp"], start, dict(zip(("half", "shards"), ends, strict=True)), layers, ".mlp.")


def test_the_base_itself_has_not_changed(sources):
    found = parameter_variation(sources / "base", {"same": sources / "base"})
    for part in found.values():
        assert part.change["same"] == (0.0,) * 3
        assert part.cosine["same"] == pytest.approx((1.0,) * 3)
        assert set(part.share_below("same")) == {1.0}
        assert part.mean_change == part.mean_change_per_parameter == 0


def test_mistakes(sources, tmp_path):
    with pytest.raises(ValueError, match="there is no fine-tune"):
        parameter_variation(sources / "base", {})
    with pytest.raises(ValueError, match="num_hidden_layers"):
        parameter_variation(
            sources / "base", {"deep": make_model(tmp_path / "deep", 1, num_hidden_layers=4)}
        )
    with pytest.raises(ValueError, match="no layer 3; the last is 2"):
        parameter_variation(sources / "base", {"math": sources / "math"}, layers=[3])
    mixture = make_model(tmp_path / "mixture", 1, family="mixtral", num_local_experts=2)
    with pytest.raises(ValueError, match="has no MLP"):
        parameter_variation(mixture, {"mixture": mixture})


# upscale: auto


def changed(here, name, amounts):
    """A fine-tune of the base: noise of these standard deviations in what is called so."""
    shutil.copytree(here / "base", here / name)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    tensors = load_file(here / "base" / "model.safetensors")
    for part, amount in amounts.items():
        for key in sorted(tensors):
            if part in key:
                tensors[key] = tensors[key] + amount * torch.randn(
                    tensors[key].shape, generator=generator
                )
    save_file(tensors, here / name / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        ({"self_attn": 0.02}, {"self_attn": 0.01}, "attention"),
        ({"mlp": 0.02}, {"mlp": 0.01}, "mlp"),
        ({"mlp": 0.02}, {"self_attn": 0.04}, "attention"),
        ({"mlp": 0.03}, {"self_attn": 0.02}, "mlp"),
        (
            {"self_attn": 0.02, "mlp": 0.019},
            {"embed_tokens": 1.0},
            "mlp",
        ),  # more parameters, each changed less
    ],
)
def test_what_changed_more_is_upscaled(here, first, second, chosen):
    names = changed(here, "one", first), changed(here, "two", second)
    model = load(merge(wemoe(names, upscale="auto")))
    part = {"attention": "self_attn", "mlp": "mlp"}[chosen]
    assert set(model.ensembling.groups) == {f"model.layers.{index}.{part}" for index in range(3)}
    start, *ends = states(AutoModelForCausalLM, *("base", *names))
    totals = {}
    for where, label in ((".self_attn.", "attention"), (".mlp.", "MLP")):
        total = 0
        for end, index in itertools.product(ends, range(3)):
            change, _, parameters, _ = loop(start, end, f"model.layers.{index}", where)
            total += change
        totals[label] = total / 6
        row = f"| {label} | {totals[label]:.4g} | {totals[label] / parameters:.4g} |"
        assert row in (here / "out" / "README.md").read_text()
    assert (totals["attention"] > totals["MLP"]) == (chosen == "attention")
    explicit = load(merge(wemoe(names, upscale=chosen), "explicit"))
    assert explicit.config.ensembling == model.config.ensembling


def test_only_the_layers_that_are_upscaled_decide_and_the_plan_says_so(here):
    names = (changed(here, "one", {"layers.0.mlp": 0.5, "layers.2.self_attn": 0.01}),)
    assert "model.layers.0.mlp" in load(merge(wemoe(names, upscale="auto"))).ensembling.groups
    model = load(merge(wemoe(names, "ewemoe", upscale="auto", upscale_layers="1-2"), "deep"))
    assert set(model.ensembling.groups) == {"model.layers.1.self_attn", "model.layers.2.self_attn"}
    text = Path("deep/mergekit_config.yml").read_text()
    Path("auto.yml").write_text(text)
    done = CliRunner().invoke(main, ["plan", "auto.yml", "--quiet"])
    assert done.exit_code == 0, done.output
    assert "`upscale: auto` chose `attention`" in done.output and "squared L2 change" in done.output


def test_attention_alone_is_upscaled_without_the_mlps(here):
    model = load(merge(wemoe(upscale="attention", upscale_layers="0,2")))
    assert list(model.ensembling.groups) == [f"model.layers.{index}.self_attn" for index in (0, 2)]
    linears = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert model.ensembling.groups["model.layers.0.self_attn"] == linears


def test_what_auto_cannot_measure_is_refused(here, tmp_path):
    name = changed(here, "broken", {"layers.1.mlp": float("nan")})
    refused(
        here, wemoe((name,), upscale="auto"), "upscale: auto", "the change of the mlp is not finite"
    )
    for seed, name in enumerate(("moe-a", "moe-b")):
        make_model(tmp_path / name, seed, family="mixtral", num_local_experts=2)
    refused(here, wemoe(("moe-b",), base="./moe-a", upscale="auto"), "upscale: auto", "has no MLP")
    refused(here, wemoe(upscale="auto", upscale_layers=7), "upscale: auto", "no layer 7")
    document = wemoe(upscale="auto")
    document["models"][0]["model"] = "./base+./lora"
    (here / "lora").mkdir()
    (here / "lora" / "adapter_config.json").write_text("{}")
    refused(
        here, document, "upscale: auto", "merge each LoRA", lora_merge_cache=str(tmp_path / "cache")
    )
