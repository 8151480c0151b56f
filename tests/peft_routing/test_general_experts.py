"""General experts (GenKnowSub): their mean update is subtracted from each expert's, update by
update.
"""

import copy

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from torch.nn import functional

from peft_routing import RoutedLoraConfig
from peft_routing.choosers import perplexity, task_vector
from peft_routing.cli import main
from peft_routing.config import Site
from peft_routing.layer import Experts, RoutedLoraLinear, with_general
from tests.conftest import read_tensors
from tests.peft_routing.adapters import make_base, save_experts, save_lora

IDS = torch.tensor([[5, 17, 40, 9, 66, 31], [12, 80, 33, 7, 21, 90]])


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"), target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """Of other ranks, scalings and modules than the experts and one another."""
    root = tmp_path_factory.mktemp("general")
    return {
        "wiki": str(
            save_lora(root / "wiki", 7, r=3, use_rslora=True, target_modules=["q_proj", "k_proj"])
        ),
        "news": str(save_lora(root / "news", 8, r=2, lora_alpha=3)),
    }


def routed(experts, general, router="arrow", seed=None, **options):
    config = RoutedLoraConfig(experts=experts, general_experts=general, router=router, **options)
    model = get_peft_model(make_base(), config).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "routed_lora_router" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def layers(model):
    base = model.get_base_model()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, RoutedLoraLinear)
    }


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def updates(paths):
    """Per module each adapter's update, as PEFT's LoRA has it, in float64; zeros where an adapter
    has none.
    """
    shapes = {
        name: m.weight.shape
        for name, m in make_base().named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    by_module = {}
    for name, shape in shapes.items():
        by_module[name] = [torch.zeros(shape, dtype=torch.float64) for _ in paths]
    for index, path in enumerate(paths.values()):
        model = PeftModel.from_pretrained(make_base(), path).double().get_base_model()
        for name in shapes:
            module = model.get_submodule(name)
            if hasattr(module, "lora_A"):
                by_module[name][index] = module.get_delta_weight("default").detach()
    return by_module


def subtracted(experts, general):
    """Each expert's update less the general mean, by module."""
    of_general = updates(general)
    differences = {}
    for name, of_experts in updates(experts).items():
        mean = sum(of_general[name]) / len(general)
        differences[name] = [update - mean for update in of_experts]
    return differences


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("arrow", {"top_k": 2}),
        ("linear", {"top_k": 1}),
        ("linear", {"granularity": "sequence", "routing_tokens": 3}),
        ("mlp", {"top_k": 2}),
        ("hierarchical", {"clusters": {"math": 0, "code": 0, "law": 1}}),
        ("fixed", {"weights": [0.5, -0.25, 1.0]}),
    ],
)
def test_the_update_is_the_loop(experts, general, router, options):
    model = routed(experts, general, router, seed=3, **options)
    assert model.peft_config["default"].mixing == "full"
    expected, seen = subtracted(experts, general), []

    def check(layer, inputs, output):
        x = inputs[0].detach()
        scores = layer.router_of("default").scores(x)
        if options.get("granularity") == "sequence":
            scores = scores[:, :3].mean(dim=1, keepdim=True)
        coefficients = (
            layer.router_of("default").coefficients(scores).detach().expand(*x.shape[:-1], 3)
        )
        base = functional.linear(x, layer.base_layer.weight)
        for row, token in torch.cartesian_prod(
            torch.arange(x.shape[0]), torch.arange(x.shape[1])
        ).tolist():
            mixed = sum(
                c * u
                for c, u in zip(coefficients[row, token].double(), expected[layer.key], strict=True)
            )
            update = (output - base)[row, token].double()
            assert torch.allclose(update, mixed @ x[row, token].double(), rtol=1e-4, atol=1e-5)
        seen.append(layer.key)

    for layer in layers(model).values():
        layer.register_forward_hook(check)
    logits(model)
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"]
    assert seen == [f"model.layers.{i}.{module}" for i in range(3) for module in modules]


def test_few_tokens_read_the_chosen_and_the_general_alone(monkeypatch):
    site = Site((2,) * 102, tuple(0.5 + i for i in range(102)), 2)
    made, generator = Experts(site, 5, 7, "full", torch.float64), torch.Generator().manual_seed(0)
    made.fill(
        [
            (torch.randn(2, 5, generator=generator), torch.randn(7, 2, generator=generator))
            for _ in range(102)
        ]
    )
    x = torch.randn(1, 5, generator=generator).double()
    coefficients = torch.zeros(1, 100, dtype=torch.float64)
    coefficients[0, [3, 50]] = torch.tensor([0.7, -1.5], dtype=torch.float64)
    each = [b @ a * scaling for (a, b), scaling in zip(made.factors(), site.scalings, strict=True)]
    mean = (each[100] + each[101]) / 2
    expected = (0.7 * (each[3] - mean) - 1.5 * (each[50] - mean)) @ x[0]
    for kept in (None, 4):
        assert torch.allclose(made(x, with_general(coefficients, 2), kept)[0], expected, atol=1e-10)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("uniform", {}),
        ("fixed", {"weights": {"math": 0.5, "code": -0.25, "law": 1.0}}),
        ("layer", {}),
        ("mlp", {"mlp_layers": 0}),
    ],
)
def test_merging_gives_the_subtracted_mixture(experts, general, tmp_path, router, options):
    model = routed(experts, general, router, seed=4, **options)
    before, expected = logits(model), subtracted(experts, general)
    for name, layer in layers(model).items():
        coefficients = layer.router_of("default")(torch.zeros(1, layer.in_features)).double()
        mixed = sum(c * u for c, u in zip(coefficients, expected[name], strict=True))
        assert torch.allclose(layer.get_delta_weight("default").double(), mixed, atol=1e-5)
    assert model.to_lora(str(tmp_path / "one")) == 0
    one = PeftModel.from_pretrained(make_base(), tmp_path / "one").eval()
    assert torch.allclose(logits(one), before, atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload()), before, atol=1e-5)


def test_arrow_s_prototypes_are_of_the_subtracted_updates(experts, general):
    expected = subtracted(experts, general)
    for name, layer in layers(routed(experts, general)).items():
        for row, update in zip(
            layer.router_of("default").weight.double(), expected[name], strict=True
        ):
            top = torch.linalg.svd(update).Vh[0]
            assert abs(row @ top).item() == pytest.approx(1, abs=1e-6)


def test_a_cluster_s_prototype_is_of_its_subtracted_merge(experts, general):
    clusters = {"math": "a", "code": "a", "law": "b"}
    expected = subtracted(experts, general)
    for name, layer in layers(
        routed(experts, general, "hierarchical", clusters=clusters, init="arrow")
    ).items():
        math, code, law = expected[name]
        for row, update in zip(
            layer.router_of("default").weight.double(), (math + code, law), strict=True
        ):
            assert abs(row @ torch.linalg.svd(update).Vh[0]).item() == pytest.approx(1, abs=1e-6)


def test_an_expert_that_is_the_general_one_is_nothing(experts):
    model = routed(experts, {"same": experts["math"]}, "arrow", top_k=1)
    for layer in layers(model).values():
        weight = layer.router_of("default").weight
        assert weight[0].abs().max() == 0 and torch.allclose(weight[1:].norm(dim=1), torch.ones(2))
    alone = routed({"math": experts["math"]}, {"same": experts["math"]}, "uniform")
    assert torch.allclose(logits(alone), logits(make_base()), atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_gives_the_same_logits(experts, general, tmp_path, low_cpu_mem_usage):
    model = routed(experts, general, "arrow", top_k=2)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert list(loaded.peft_config["default"].general_experts) == ["wiki", "news"]
    assert loaded.peft_config["default"].general_experts["wiki"]["use_rslora"]
    assert (
        "(math, code, law), less the mean of wiki, news, and"
        in (tmp_path / "README.md").read_text()
    )


def test_all_come_out_as_they_came_in(experts, general, tmp_path):
    routed(experts, general).save_pretrained(str(tmp_path / "routed"))
    model = PeftModel.from_pretrained(make_base(), tmp_path / "routed")
    model.remove_expert("code")
    model.add_expert("code", experts["code"])
    model.export_experts(str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "code",
        "law",
        "math",
        "news",
        "wiki",
    ]
    for name, path in {**experts, **general}.items():
        before, after = read_tensors(tmp_path / path), read_tensors(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        assert all(
            before[key].dtype == after[key].dtype and torch.equal(before[key], after[key])
            for key in before
        )


def test_experts_come_and_go_and_the_general_ones_stay(experts, general):
    two = {name: experts[name] for name in ("math", "code")}
    for router, options in (("arrow", {}), ("uniform", {})):
        model = routed(two, general, router, **options)
        before = logits(model)
        model.add_expert("law", experts["law"])
        assert torch.equal(logits(model), logits(routed(experts, general, router, **options)))
        model.remove_expert("law")
        assert torch.equal(logits(model), before)
    for name in ("wiki", "math"):
        with pytest.raises(ValueError, match="there is an expert"):
            model.add_expert(name, experts["law"])
    with pytest.raises(ValueError, match="there is no expert 'wiki'"):
        model.remove_expert("wiki")


def test_what_cannot_be_is_refused(experts, general):
    with pytest.raises(
        ValueError, match="subtracted from updates, which mixing='low_rank' never forms"
    ):
        RoutedLoraConfig(experts=experts, general_experts=general, mixing="low_rank")
    with pytest.raises(ValueError, match="'math' names an expert and a general one"):
        RoutedLoraConfig(experts=experts, general_experts=["elsewhere/math"])
    with pytest.raises(ValueError, match="general_experts='wiki' is neither"):
        RoutedLoraConfig(experts=experts, general_experts="wiki")
    with pytest.raises(ValueError, match=r"top_k=4, but there are 3 experts"):
        RoutedLoraConfig(experts=experts, general_experts=general, top_k=4)
    with pytest.raises(FileNotFoundError, match="expert 'wiki'"):
        routed(experts, {"wiki": "./nowhere"})


def test_from_the_shell(experts, general, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_base().save_pretrained("base")
    named = [f"--expert={name}={path}" for name, path in experts.items()]
    subtract = [f"--general-expert={name}={path}" for name, path in general.items()]
    done = CliRunner().invoke(main, ["compose", "base", *named, *subtract, "-o", "routed"])
    assert (
        "3 experts (math, code, law) less the mean of wiki, news on 12 modules, router arrow, "
        "mixing full"
    ) in done.output
    loaded = PeftModel.from_pretrained(make_base(), "routed").eval()
    assert torch.equal(logits(loaded), logits(routed(experts, general)))
    done = CliRunner().invoke(main, ["export", "routed", "--base", "base", "-o", "out"])
    assert "out: math, code, law, wiki, news" in done.output
    done = CliRunner().invoke(
        main,
        ["compose", "base", *named, *subtract, f"--general-expert={experts['law']}", "-o", "x"],
    )
    assert "--general-expert: name all experts, or none" in done.output


@pytest.mark.parametrize("choose", [perplexity, task_vector])
def test_choosers_see_what_is_left_of_an_expert(experts, general, choose):
    ids = torch.tensor([[5, 17, 40, 8, 8, 61, 2, 33, 90]])
    model, base = routed(experts, general), make_base().double()
    expected = {
        name: updates
        for name, updates in subtracted(experts, general).items()
        if name in layers(model)
    }
    weights = {name: base.get_submodule(name).weight for name in expected}
    values = []
    if choose is task_vector:
        gradients = torch.autograd.grad(
            base(input_ids=ids, labels=ids).loss, list(weights.values())
        )
        gradient = torch.cat([part.flatten() for part in gradients])
        for i in range(len(experts)):
            update = torch.cat([updates[i].double().flatten() for updates in expected.values()])
            values.append(-functional.cosine_similarity(gradient, update, dim=0))
    for i in range(len(experts) if choose is perplexity else 0):
        one = copy.deepcopy(base)
        with torch.no_grad():
            for name, updates in expected.items():
                one.get_submodule(name).weight += updates[i].double()
            values.append(torch.exp(-one(input_ids=ids, labels=ids).loss))
    chosen = choose(model, ids)
    assert torch.allclose(
        chosen[0].double(), torch.softmax(torch.stack(values).detach().double(), dim=0), atol=1e-6
    )
    assert chosen[0].max() - chosen[0].min() > 1e-4
