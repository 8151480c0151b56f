"""Routing weights of weight-ensembling models: against loops over single inputs."""

import math
import statistics

import pytest
import torch

from mergekit_moe_ext.analysis.coefficients import ensemble_routing
from tests.mergekit_moe_ext.ensembles import EXPERTS, build, inputs_of, padded


def batches_of(family, seed):
    """Two batches of one task, of 3 and 2 inputs."""
    batches = [inputs_of(family, samples, seed=seed + samples) for samples in (3, 2)]
    return [padded(batch, "right") for batch in batches] if "input_ids" in batches[0] else batches


def one_by_one(model, batches):
    """The coefficients of each input, alone in its batch: as lists, by group and expert."""
    coefficients = []
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            coefficients.append(model.coefficients(**alone)[0].double().tolist())
    return coefficients


@pytest.mark.parametrize("family", ["vit", "bert", "llama", "gpt2"])
def test_against_a_loop_over_inputs(family):
    model = build(family, routing_tokens=5)
    batches = {"cars": batches_of(family, 0), "sun": batches_of(family, 10)}
    found = ensemble_routing(model, batches)
    assert found.tasks == ("cars", "sun") and found.experts == EXPERTS and found.samples == (5, 5)
    assert found.groups == tuple(model.ensembling.groups)
    for task, name in enumerate(found.tasks):
        coefficients = one_by_one(model, batches[name])
        for group in range(len(found.groups)):
            firsts = [
                max(range(3), key=lambda expert, c=c, g=group: c[g][expert]) for c in coefficients
            ]
            for expert, called in enumerate(EXPERTS):
                values = [c[group][expert] for c in coefficients]
                assert found.mean[task, group, expert].item() == pytest.approx(
                    statistics.mean(values), abs=1e-5
                )
                assert found.spread[task, group, expert].item() == pytest.approx(
                    statistics.pstdev(values), abs=1e-5
                )
                share = found.first_choice[task, group, expert].item()
                assert share == pytest.approx(firsts.count(expert) / 5)
                if called == name:
                    assert found.own_expert()[task, group].item() == share


def test_constants_and_ties():
    """Of 0 layers coefficients are the same for all inputs; where two are highest, each is half a
    first choice.
    """
    model = build("vit", router_layers=0)
    with torch.no_grad():
        for router in model.routers.values():
            router.bias.copy_(torch.tensor([0.25, 0.5, 0.5]))
    found = ensemble_routing(
        model, {"dtd": [inputs_of("vit", 4)], "elsewhere": [inputs_of("vit", 1)]}
    )
    assert found.samples == (4, 1) and (found.spread == 0).all()
    assert found.mean[0].tolist() == found.mean[1].tolist() == [[0.25, 0.5, 0.5]] * 2
    assert (found.first_choice == torch.tensor([0.0, 0.5, 0.5])).all()
    own = found.own_expert().tolist()
    assert own[0] == [0.5, 0.5] and all(math.isnan(value) for value in own[1])


def test_a_head_per_task_has_no_part_in_it():
    with_heads = build(
        "vit",
        heads={"sun": list("abc"), "cars": list("abcd"), "dtd": list("ab")},
        head="classifier",
    )
    without = build("vit")
    without.load_state_dict(
        {k: v for k, v in with_heads.state_dict().items() if "classifier" not in k}, strict=False
    )
    batches = {"cars": [inputs_of("vit")], "unseen": [inputs_of("vit", seed=1)]}
    found, wanted = (ensemble_routing(model, batches) for model in (with_heads, without))
    assert torch.equal(found.mean, wanted.mean) and torch.equal(
        found.first_choice, wanted.first_choice
    )


def test_what_has_no_coefficients_per_input():
    with pytest.raises(ValueError, match="running means"):
        ensemble_routing(build("llama", mode="running"), {"sun": [inputs_of("llama")]})
    with pytest.raises(ValueError, match="no inputs of 'sun'"):
        ensemble_routing(build("vit"), {"sun": []})
    broken = build("vit")
    with torch.no_grad():
        broken.routers["1"].bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        ensemble_routing(broken, {"sun": [inputs_of("vit")]})
