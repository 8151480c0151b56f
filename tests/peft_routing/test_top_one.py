"""A router that keeps one expert is trained by a straight-through estimate: the values of the
choice, and the gradient of the chosen expert's probability.

The gradient is held to the chain rule, written out in float64: first that of the loss for
coefficients that are leaves of the graph, then that of the probabilities for the router's
parameters.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional

from peft_routing import RoutedLoraConfig
from tests.peft_routing.adapters import make_base, save_lora

IDS = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(0))
PREFIX = 4
LABELS = IDS.clone()
LABELS[:, :PREFIX] = -100  # what chooses per sequence is not learned from
CLUSTERS = {"math": "a", "code": "b", "law": "a"}
ROUTERS = {
    "layer": {},
    "linear": {"router_temperature": 0.5},
    "arrow": {},
    "hierarchical": {"clusters": CLUSTERS},
}
MODULE = "model.layers.0.mlp.down_proj"


def fresh_base():
    return make_base(dtype=torch.float64, initializer_range=0.1, num_hidden_layers=2)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Adapters of one module, in float64."""
    path = tmp_path_factory.mktemp("experts")
    base = {"base": fresh_base(), "target_modules": [MODULE]}
    return {
        name: str(save_lora(path / name, seed, **copy.deepcopy(base)))
        for seed, name in enumerate(CLUSTERS, 1)
    }


def routed(experts, router, **changes):
    """A model in float64 whose router is trained; its choices differ between tokens."""
    options = {"top_k": 1, "routing_tokens": PREFIX, **ROUTERS[router], **changes}
    config = RoutedLoraConfig(experts=experts, router=router, **options)
    model = get_peft_model(fresh_base(), config).double().train()
    generator = torch.Generator().manual_seed(5)
    for parameter in trained(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 2
    return model


def trained(model):
    """The router's parameters by their names in the router."""
    return {
        name.rpartition(".")[2]: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class ByHand:
    """The update of the one module, token by token."""

    def __init__(self, model, router, mixing, granularity):
        self.router, self.mixing, self.granularity = router, mixing, granularity
        self.parameters = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in trained(model).items()
        }
        site = model.get_submodule(f"base_model.model.{MODULE}").experts_of("default")
        self.factors = [
            (a, b * scaling)
            for (a, b), scaling in zip(site.factors(), site.site.scalings, strict=True)
        ]
        self.temperature = ROUTERS[router].get("router_temperature", 1.0)
        self.choices = []  # (a coefficient of 1, the probability of what it is for)

    def scores(self, token):
        if self.router == "layer":
            return self.parameters["logits"]
        products = self.parameters["weight"] @ token
        return products.abs() if self.router == "arrow" else products

    def coefficients(self, scores):
        """Of each expert, where the best of the scores counts 1 and all others 0."""
        probabilities = (scores / self.temperature).exp()
        probabilities = probabilities / probabilities.sum()
        best = int(probabilities.argmax())
        one = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.choices.append((one, probabilities[best]))
        if self.router != "hierarchical":
            return {best: one}
        members = [i for i, cluster in enumerate(CLUSTERS.values()) if cluster == "ab"[best]]
        shares = self.parameters["logits"][members].exp()
        shares = shares / shares.sum()
        return {member: one * share for member, share in zip(members, shares, strict=True)}

    def of_token(self, token, coefficients):
        if self.mixing == "full":
            return sum(
                c * (self.factors[i][1] @ (self.factors[i][0] @ token))
                for i, c in coefficients.items()
            )
        a = sum(c * self.factors[i][0] for i, c in coefficients.items())
        b = sum(c * self.factors[i][1] for i, c in coefficients.items())
        return b @ (a @ token)

    def __call__(self, x):
        rows = []
        for row in x:
            scores = [self.scores(token) for token in row]
            if self.granularity == "sequence":
                mean = sum(scores[:PREFIX]) / PREFIX
                coefficients = [self.coefficients(mean)] * len(row)
            else:
                coefficients = [self.coefficients(of_token) for of_token in scores]
            updates = [self.of_token(*pair) for pair in zip(row, coefficients, strict=True)]
            rows.append(torch.stack(updates))
        return torch.stack(rows)


def assert_alike(gradient, expected):
    """Equal but for the norms of this model, which are computed in float32."""
    largest = expected.abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(gradient, expected, atol=1e-5 * largest, rtol=0)


def by_hand_and_model(model, by_hand):
    """A pass of the model and one by hand, each with its loss and its embeddings, differentiated
    with coefficients that depend on nothing by hand.
    """
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, labels=LABELS).loss
    loss.backward()
    plain = fresh_base()
    plain.get_submodule(MODULE).register_forward_hook(
        lambda module, args, output: output + by_hand(args[0])
    )
    same = embeddings.detach().clone().requires_grad_()
    expected = plain(inputs_embeds=same, labels=LABELS).loss
    expected.backward(retain_graph=True)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    return embeddings, same


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_gradient_is_that_of_the_chosen_probability(experts, router, mixing, granularity):
    model = routed(experts, router, mixing=mixing, granularity=granularity)
    by_hand = ByHand(model, router, mixing, granularity)
    embeddings, same = by_hand_and_model(model, by_hand)
    sum(one.grad * probability for one, probability in by_hand.choices).backward()
    assert_alike(embeddings.grad, same.grad)
    for name, parameter in trained(model).items():
        assert_alike(parameter.grad, by_hand.parameters[name].grad)


def test_a_frozen_router_has_the_exact_gradient(experts):
    """A choice does not change with the input, almost everywhere."""
    model = routed(experts, "linear")
    by_hand = ByHand(model, "linear", "full", "token")
    model.requires_grad_(False)
    embeddings, same = by_hand_and_model(model, by_hand)
    assert_alike(embeddings.grad, same.grad)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_values_are_those_of_the_choice_alone(experts, router, granularity):
    model = routed(experts, router, granularity=granularity)
    learning = model(input_ids=IDS).logits
    model.requires_grad_(False)
    assert torch.equal(learning, model(input_ids=IDS).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(experts, reentrant):
    gradients = []
    for saves_memory in (False, True):
        model = routed(experts, "linear", router_aux_loss_coef=0.1)
        if saves_memory:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=LABELS).loss.backward()
        gradients.append(trained(model)["weight"].grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("start", ["uniform", "arrow"])
def test_it_learns_which_inputs_are_whose(tmp_path, start):
    """Three kinds of inputs, each with an expert that is right for it, and a plain loop."""
    torch.manual_seed(0)
    centres = torch.eye(3, 16) * 4
    kinds = torch.arange(300) % 3
    x = centres[kinds] + torch.randn(300, 16) * 0.3
    base = torch.nn.Sequential(torch.nn.Linear(16, 16)).eval()
    paths = {
        name: str(
            save_lora(
                tmp_path / name,
                seed,
                copy.deepcopy(base),
                r=2,
                target_modules=["0"],
                task_type=None,
            )
        )
        for seed, name in enumerate("abc")
    }
    outputs = []
    for path in paths.values():
        alone = PeftModel.from_pretrained(copy.deepcopy(base), path)
        outputs.append(alone(x).detach())
    target = torch.stack(outputs)[kinds, torch.arange(300)]

    config = RoutedLoraConfig(experts=paths, router="linear", top_k=1, init=start)
    model = get_peft_model(base, config).train()
    optimiser = torch.optim.Adam(trained(model).values(), lr=0.02)
    before = functional.mse_loss(model(x), target).item()
    for _ in range(150):
        optimiser.zero_grad()
        functional.mse_loss(model(x), target).backward()
        optimiser.step()
    chosen = x @ trained(model)["weight"].T
    chosen = (chosen.abs() if start == "arrow" else chosen).argmax(dim=-1)
    assert (chosen == kinds).float().mean() > 0.98
    assert functional.mse_loss(model(x), target).item() < 0.05 * before
