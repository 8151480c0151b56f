"""The ways out: ordinary LoRA directories that PEFT loads, equal to what came in and to the
mixture.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_routing import RoutedLoraConfig, UserError
from peft_routing.cli import main
from tests.conftest import read_tensors
from tests.peft_routing.adapters import make_base, save_experts, save_lora

IDS = torch.tensor([[5, 17, 40, 9, 66, 31], [12, 80, 33, 7, 21, 90]])
INDEPENDENT = {
    "uniform": {},
    "fixed": {"weights": {"math": 0.5, "code": -0.25, "law": 1.0}},
    "global": {},
    "layer": {},
    "mlp": {"mlp_layers": 0},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


def routed(experts, router, **options):
    model = get_peft_model(
        make_base(), RoutedLoraConfig(experts=experts, router=router, **options)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routed_lora_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("router", INDEPENDENT)
def test_a_mixture_is_an_ordinary_lora(experts, tmp_path, router, mixing):
    model = routed(experts, router, mixing=mixing, **INDEPENDENT[router])
    assert model.to_lora(str(tmp_path / "one")) == 0
    one = PeftModel.from_pretrained(make_base(), tmp_path / "one").eval()
    assert one.peft_config["default"].peft_type == "LORA"
    assert one.peft_config["default"].r == (12 if mixing == "full" else 4)
    assert torch.allclose(one(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)


def test_experts_of_several_ranks_and_targets_merge_into_one_lora(tmp_path):
    experts = [
        save_lora(
            tmp_path / "a", 1, r=2, rank_pattern={"layers.0.self_attn.q_proj": 5}, use_rslora=True
        ),
        save_lora(tmp_path / "b", 2, r=3, target_modules=["q_proj", "up_proj"]),
    ]
    model = routed(experts, "layer")
    model.to_lora(str(tmp_path / "one"))
    one = PeftModel.from_pretrained(make_base(), tmp_path / "one").eval()
    assert torch.allclose(one(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)


def test_a_smaller_rank_is_the_closest_and_says_how_close(experts, tmp_path):
    model = routed(experts, "layer", mixing="full")
    error = model.to_lora(str(tmp_path / "one"), rank=3)
    one = PeftModel.from_pretrained(make_base(), tmp_path / "one")
    dropped = whole = 0.0
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "routed_lora_router"):
            update = module.get_delta_weight("default").double()
            u, s, vt = torch.linalg.svd(update, full_matrices=False)
            closest = (u[:, :3] * s[:3]) @ vt[:3]
            found = one.get_base_model().get_submodule(name).get_delta_weight("default")
            assert torch.allclose(found.double(), closest, atol=1e-5)
            dropped, whole = (
                dropped + (update - closest).square().sum(),
                whole + update.square().sum(),
            )
    assert error == pytest.approx((dropped / whole).sqrt().item(), rel=1e-6)
    assert 0.1 < error < 1


@pytest.mark.parametrize("router", ["arrow", "linear", "mlp"])
def test_a_mixture_that_depends_on_the_input_is_refused(experts, tmp_path, router):
    with pytest.raises(ValueError, match="depend on the input"):
        routed(experts, router).to_lora(str(tmp_path / "one"))
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("tasks", [(None, None, None), ("CAUSAL_LM", None, None)])
def test_experts_without_a_task_come_and_go(tmp_path, tasks):
    experts = {}
    for seed, (name, task) in enumerate(zip(("math", "code", "law"), tasks, strict=True), 1):
        experts[name] = str(save_lora(tmp_path / name, seed, task_type=task))
    ids = torch.arange(2, 12)[None]
    first = {name: experts[name] for name in ("math", "code")}
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=first, router="uniform"))
    model.add_expert("law", experts["law"])
    whole = get_peft_model(make_base(), RoutedLoraConfig(experts=experts, router="uniform"))
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    model.remove_expert("law")
    before = get_peft_model(make_base(), RoutedLoraConfig(experts=first, router="uniform"))
    torch.testing.assert_close(model(ids).logits, before(ids).logits)


def test_names_that_would_be_one_directory_are_told(tmp_path):
    names = {f"a{sign}b": str(save_lora(tmp_path / f"{ord(sign)}", 1)) for sign in " +"}
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=names))
    with pytest.raises(UserError, match=r"'a b' and 'a\+b' would both be written to a-b: compose"):
        model.export_experts(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_experts_come_out_as_they_came_in(tmp_path):
    experts = save_experts(
        tmp_path / "in", lora_alpha=6, use_rslora=True, rank_pattern={"v_proj": 2}
    )
    bf16 = make_base(dtype=torch.bfloat16)
    experts["half"] = str(
        save_lora(tmp_path / "in" / "half", 9, bf16, target_modules=["k_proj", "v_proj"])
    )
    for file in (tmp_path / "in" / "half").glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=experts))
    model.save_pretrained(str(tmp_path / "routed"))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "routed")
    loaded.remove_expert("law")
    loaded.add_expert("law", experts["law"])
    loaded.export_experts(str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "code",
        "half",
        "law",
        "math",
    ]
    for name, path in experts.items():
        before, after = read_tensors(tmp_path / "in" / name), read_tensors(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        assert all(
            before[key].dtype == after[key].dtype and torch.equal(before[key], after[key])
            for key in before
        )
        one, other = (
            PeftModel.from_pretrained(make_base(), root) for root in (path, tmp_path / "out" / name)
        )
        assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_patterns_keep_the_order_in_which_peft_reads_them(tmp_path):
    """Of the keys that match a module PEFT takes the first, which need not be the first by name."""
    path = save_lora(tmp_path / "math", 5)
    file = path / "adapter_config.json"
    pattern = {"q_proj": 100, "layers.0.self_attn.q_proj": 1, "v_proj": 3}
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": pattern}))
    ids = torch.arange(3, 23).reshape(2, 10)

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = logits(PeftModel.from_pretrained(make_base(), path).eval())
    config = RoutedLoraConfig(experts={"math": str(path)}, router="uniform")
    model = get_peft_model(make_base(), config).eval()
    model.save_pretrained(tmp_path / "routed")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "routed").eval()
    for name, routed in (("composed", model), ("loaded", again)):
        assert torch.allclose(logits(routed), expected, atol=1e-5)
        routed.export_experts(str(tmp_path / name))
        exported = tmp_path / name / "math"
        kept = json.loads((exported / "adapter_config.json").read_text())["alpha_pattern"]
        assert list(kept.items()) == list(pattern.items())
        alone = PeftModel.from_pretrained(make_base(), exported).eval()
        assert torch.allclose(logits(alone), expected, atol=1e-5)


def test_a_name_is_no_path(experts, tmp_path):
    hostile = {"../../out": experts["math"], ".hidden/x": experts["code"]}
    get_peft_model(make_base(), RoutedLoraConfig(experts=hostile)).export_experts(
        str(tmp_path / "a" / "b")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(list((tmp_path / "a" / "b").glob("*/adapter_model.safetensors"))) == 2


def test_from_the_shell(experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_base().save_pretrained("base")
    model = routed(experts, "layer")
    model.save_pretrained("routed")

    def export(*arguments):
        return CliRunner().invoke(main, ["export", "routed", "--base", "base", *arguments])

    assert export("-o", "experts").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["code", "law", "math"]
    assert export("-o", "one", "--merged").exit_code == 0
    one = PeftModel.from_pretrained(make_base(), "one").eval()
    assert torch.allclose(one(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)
    assert (
        "relative error of the updates 0."
        in export("-o", "small", "--merged", "--rank", "2").output
    )
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 2
    assert "--rank needs --merged" in export("-o", "no", "--rank", "2").output
    assert "is not empty" in export("-o", "one", "--merged").output


def test_patterns_come_back_in_their_order(tmp_path):
    """PEFT takes the first pattern of alphas that matches, and here several do."""
    path = save_lora(tmp_path / "math", 5)
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    alphas = {"q_proj": 100, "layers.0.self_attn.q_proj": 1}
    file.write_text(json.dumps({**config, "alpha_pattern": alphas}))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make_base(), path).eval()(tokens).logits
        model = routed({"math": path}, "uniform").eval()
        torch.testing.assert_close(model(tokens).logits, expected, atol=2e-6, rtol=1e-5)
        model.export_experts(str(tmp_path / "experts"))
        again = PeftModel.from_pretrained(make_base(), tmp_path / "experts" / "math").eval()
        torch.testing.assert_close(again(tokens).logits, expected, atol=2e-6, rtol=1e-5)
