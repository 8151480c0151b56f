"""Experts added to generic mixtures, against the mixture that is built with them at once."""

import click
import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors.torch import save_file

import mergekit_moe_ext
from mergekit_moe_ext.merging.sources import Headers
from mergekit_moe_ext.merging.views import Derivation, seen_through
from tests.conftest import document, merge, read_tensors
from tests.mergekit_moe_ext.growing.test_growing import grow
from tests.mergekit_moe_ext.upcycling.test_generic import load, make

SHAPES = {"model.a.weight": (2, 3), "model.b.weight": (2,)}
DTYPES = dict.fromkeys(SHAPES, "float32")
FAMILIES = (
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_grown_mixture_is_the_one_that_is_built_at_once(tmp_path, monkeypatch, architecture):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "law")):
        make(tmp_path / name, architecture, seed)
    old = read_tensors(merge(document("moe", models=("base", "math")), "moe"))
    at_once = read_tensors(merge(document("moe", models=("base", "math", "law")), "at_once"))
    grown = read_tensors(grow())
    assert grown.keys() == at_once.keys()
    routers = 0
    for name, tensor in grown.items():
        if tensor.shape == old[name].shape:
            assert torch.equal(tensor, old[name]), name
        elif name.endswith("router.weight"):
            assert torch.equal(tensor[:2], old[name])
            assert torch.allclose(tensor[2], old[name].mean(dim=0), atol=1e-7)
            routers += 1
        else:
            assert torch.equal(tensor, at_once[name]), name
    assert routers
    assert not any(load(tmp_path / "grown")[1].values())
    mergekit_moe_ext.remove_expert("grown", [2], "back")
    back = read_tensors(tmp_path / "back")
    assert back.keys() == old.keys()
    assert all(torch.equal(tensor, old[name]) for name, tensor in back.items())
    if architecture.startswith("ViT"):
        with pytest.raises(click.ClickException, match="reads none"):
            grow(out="with_margin", margin=5.0)
        return
    with_margin = read_tensors(grow(out="with_margin", margin=5.0))
    changed = [name for name in grown if not torch.equal(grown[name], with_margin[name])]
    assert len(changed) == routers and all("router" in name for name in changed)


def test_a_layer_of_a_view_stands_on_names_as_they_are_shown(tmp_path):
    """Where the files leave the trunk's name out, or have a prefix, and a layer makes something of
    their tensors.
    """
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(2)}
    double = Derivation("model.a.weight", ("model.c.weight",), lambda tensor: (2 * tensor,))
    for headers, stored in (
        (Headers(SHAPES, DTYPES, trunk="model."), tensors),
        (
            Headers(SHAPES, DTYPES, prefix="whole."),
            {f"whole.model.{name}": tensor for name, tensor in tensors.items()},
        ),
    ):
        save_file(stored, tmp_path / "model.safetensors")
        seen = headers.seen_through((double,))
        assert seen.shapes == {"model.c.weight": (2, 3), "model.b.weight": (2,)}
        loader = seen_through(LazyTensorLoader.from_disk(str(tmp_path)), seen.view)
        assert torch.equal(loader.get_tensor("model.c.weight"), 2 * tensors["a.weight"])
        assert torch.equal(loader.get_tensor("model.b.weight"), tensors["b.weight"])


def test_what_does_not_fit_a_generic_mixture_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base", "GPT2LMHeadModel", 0)
    make(tmp_path / "relu", "GPT2LMHeadModel", 1, activation_function="relu")
    make(tmp_path / "wide", "GPT2LMHeadModel", 1, n_inner=56)
    make(tmp_path / "other", "OPTForCausalLM", 1)
    merge(document("moe", models=("base", "base")), "moe")
    for name, message in {
        "relu": "another activation than ./moe: `activation_function` is 'relu'",
        "wide": r"c_fc.weight of ./wide is \(32, 56\), but an expert of the mixture wants",
        "other": "is a OPTForCausalLM; the experts of UpcycledMoeGPT2LMHeadModel are made of",
    }.items():
        with pytest.raises(click.ClickException, match=message):
            grow((name,))
    assert not (tmp_path / "grown").exists()
