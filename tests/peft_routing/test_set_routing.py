"""What can be changed of an adapter in a model, and which routers learn with one expert left."""

import copy
import re
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch.nn import functional

from peft_routing import Reading, RoutedLoraConfig, Router, UserError
from peft_routing.training import Recipe, train
from tests.peft_routing.adapters import make_base, save_experts

IDS = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(0))
CLUSTERS = {"math": 0, "code": 0, "law": 1}
ROUTERS = {
    "layer": {},
    "linear": {"init": "arrow"},
    "arrow": {},
    "hierarchical": {"init": "arrow", "clusters": CLUSTERS},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


def routed(experts, router="linear", **changes):
    options = {**ROUTERS.get(router, {}), **changes}
    torch.manual_seed(1)
    return get_peft_model(
        make_base(), RoutedLoraConfig(experts=experts, router=router, **options)
    ).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_it_is_as_if_composed_so_and_is_saved(experts, tmp_path, router, granularity):
    options = {"granularity": granularity, "routing_tokens": 4}
    model = routed(experts, router, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    changed = {"top_k": 1, "router_temperature": 0.3}
    expected = routed(experts, router, **options, **changed)
    before = logits(model)
    model.set_routing(top_k=1)
    model.set_routing(router_temperature=0.3)
    assert torch.equal(logits(model), logits(expected))
    if router != "layer":  # whose logits are all alike, so that its first one is kept either way
        assert not torch.allclose(logits(model), before, atol=1e-4)
    assert all(
        one is other
        for one, other in zip(
            trained, [p for p in model.parameters() if p.requires_grad], strict=True
        )
    )
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(expected))
    assert again.peft_config["default"].top_k == 1


def test_it_changes_the_adapter_that_is_named(experts):
    model = routed(experts)
    model.add_adapter("other", RoutedLoraConfig(experts=experts, router="arrow"))
    model.set_routing(top_k=1, adapter_name="other")
    assert torch.equal(logits(model), logits(routed(experts)))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(routed(experts, "arrow", top_k=1)))
    copied = copy.deepcopy(model)
    copied.set_routing(top_k=3)
    assert torch.equal(logits(model), logits(routed(experts, "arrow", top_k=1)))
    assert torch.equal(logits(copied), logits(routed(experts, "arrow", top_k=3)))


@pytest.mark.parametrize(
    ("router", "arguments", "message"),
    [
        ("linear", {}, "give top_k= or router_temperature="),
        ("linear", {"top_k": 4}, "top_k=4, but there are 3 experts"),
        ("linear", {"router_temperature": 0.0}, "router_temperature=0.0 is not above 0"),
        ("linear", {"top_k": 1, "adapter_name": "no"}, "there is no adapter 'no'"),
        ("uniform", {"top_k": 1}, "top_k is not an option of router='uniform'"),
    ],
)
def test_what_does_not_fit_changes_nothing(experts, router, arguments, message):
    model = routed(experts, router)
    before, config = logits(model), model.peft_config["default"].to_dict()
    with pytest.raises(UserError, match=re.escape(message)):
        model.set_routing(**arguments)
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].to_dict() == config


def test_a_merged_adapter_is_left_alone(experts):
    model = routed(experts, "layer")
    model.merge_adapter()
    with pytest.raises(UserError, match="is merged: unmerge it first"):
        model.set_routing(top_k=1)


@pytest.mark.parametrize(
    ("name", "value", "how"),
    [
        ("top_k", 1, "use model.set_routing(top_k=1)"),
        ("router_temperature", 0.5, "use model.set_routing(router_temperature=0.5)"),
        ("granularity", "sequence", "before it is loaded"),
        ("routing_tokens", 4, "before it is loaded"),
        ("router_aux_loss_coef", 0.1, "before it is loaded"),
        ("mixing", "low_rank", "before it is loaded"),
    ],
)
def test_an_assignment_that_would_have_no_effect_is_refused(experts, tmp_path, name, value, how):
    model = routed(experts)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "saved")
    for config in (
        model.peft_config["default"],
        loaded.peft_config["default"],
        copy.deepcopy(model).peft_config["default"],
    ):
        with pytest.raises(UserError, match=re.escape(how)):
            setattr(config, name, value)
        config.base_model_name_or_path = "elsewhere"  # is PEFT's, and only written
    with pytest.raises(UserError, match=f"{name}= is not taken when an adapter is loaded"):
        PeftModel.from_pretrained(make_base(), tmp_path / "saved", **{name: value})
    # What the message says: before it is loaded a configuration is as open as ever.
    config = PeftConfig.from_pretrained(tmp_path / "saved")
    setattr(config, name, value)
    changed = PeftModel.from_pretrained(make_base(), tmp_path / "saved", config=config)
    assert getattr(changed.peft_config["default"], name) == value


class Switching(Router):
    """Keeps one expert with its probability, as Switch does, which has a gradient."""

    name = "switching"

    def __init__(self, config, experts, in_features):
        super().__init__(config, experts, in_features)
        self.weight = torch.nn.Parameter(torch.randn(len(experts), in_features))

    def scores(self, hidden):
        return functional.linear(hidden, self.weight)

    def coefficients(self, scores):
        probabilities = scores.softmax(-1)
        return probabilities * (probabilities == probabilities.amax(-1, keepdim=True))


def test_one_expert_alone_is_said_to_have_nothing_to_learn(experts, tmp_path):
    message = "has nothing to learn: there is one expert"
    model = routed({"math": experts["math"]})
    for training in (True, False):  # a loop may forget that
        with pytest.warns(UserWarning, match=message):
            model.train(training)(input_ids=IDS, labels=IDS).loss.backward()
    saved, out = str(tmp_path / "saved"), str(tmp_path / "out")
    model.save_pretrained(saved)
    frozen = PeftModel.from_pretrained(make_base(), saved).train()
    frozen.enable_input_require_grads()  # for what lies before the model
    coefficients = torch.ones(1, requires_grad=True)  # are trained, and the router is not asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen(input_ids=IDS, labels=IDS).loss.backward()
        model(input_ids=IDS, labels=IDS, coefficients=coefficients).loss.backward()
    with pytest.raises(UserError, match=message):
        train(saved, out, ["no/such/file.jsonl"], Reading(), Recipe())


@pytest.mark.parametrize(
    ("router", "options"),
    [
        *((router, {"top_k": 1}) for router in ROUTERS),
        ("mlp", {"top_k": 1, "mlp_layers": 1}),
        ("switching", {"top_k": 1}),
        ("hierarchical", {"clusters": dict.fromkeys(CLUSTERS, 0)}),  # merges within the cluster
    ],
)
def test_routers_learn_that_keep_one(experts, router, options):
    model = routed(experts, router, **options).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(gradient.abs().max() > 0 for gradient in grads)
