"""Merges of updates against PEFT's own, and against the plain mean."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.fusion.merges import error_of, write_merge
from tests.peft_routing.adapters import make_base, save_experts

NAMES = ("math", "code")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"), NAMES)


def updates(path):
    """B A of every module of the adapter in a directory, times its scaling of 1."""
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8  # of two adapters of rank 4
    tensors = load_file(path / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            found[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = b @ a
    return found


def stock(experts):
    """The base model with both adapters on it, by PEFT."""
    model = PeftModel.from_pretrained(make_base(), experts["math"], adapter_name="math")
    model.load_adapter(experts["code"], "code")
    return model


def test_ties_is_peft_s_merge_of_updates(experts, tmp_path):
    write_merge("ties", experts, make_base(), "base", tmp_path / "out", device=CPU, seed=0)
    model = stock(experts)
    model.add_weighted_adapter(
        ["math", "code"], [1.0, 1.0], "merged", "ties_svd", svd_rank=8, density=0.2
    )
    found = updates(tmp_path / "out")
    assert len(found) == 9
    for module, update in found.items():
        expected = model.get_base_model().get_submodule(module).get_delta_weight("merged")
        assert (update - expected).norm() < 0.02 * expected.norm()
    assert 0 < error_of(tmp_path / "out") < 1


def test_dare_that_drops_nothing_is_the_mean_of_the_updates(experts, tmp_path):
    with pytest.warns(UserWarning, match="no pruning"):
        write_merge(
            "dare", experts, make_base(), "base", tmp_path / "out", device=CPU, seed=0, density=1.0
        )
    model = stock(experts)
    for module, update in updates(tmp_path / "out").items():
        layer = model.get_base_model().get_submodule(module)
        mean = (layer.get_delta_weight("math") + layer.get_delta_weight("code")) / 2
        torch.testing.assert_close(update, mean, atol=1e-5, rtol=0)
    assert error_of(tmp_path / "out") < 1e-5


def test_dare_follows_its_seed_and_leaves_the_others_alone(experts, tmp_path):
    base = make_base()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for out, seed in (("one", 1), ("again", 1), ("other", 2)):
        write_merge("dare", experts, base, "base", tmp_path / out, device=CPU, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    files = [tmp_path / out / "adapter_model.safetensors" for out in ("one", "again", "other")]
    one, again, other = [path.read_bytes() for path in files]
    assert one == again and one != other


def test_biases_are_refused(tmp_path):
    with_bias = save_experts(tmp_path / "biased", NAMES, lora_bias=True)
    with pytest.raises(UserError, match="'math' has biases"):
        write_merge("ties", with_bias, make_base(), "base", tmp_path / "out", device=CPU, seed=0)
    assert not (tmp_path / "out").exists()
