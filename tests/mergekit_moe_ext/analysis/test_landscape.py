"""Loss landscapes: against weights put together and losses added up one prediction at a time."""

import copy
import math

import pytest
import torch
from torch import nn

from mergekit_moe_ext.analysis.landscape import loss_landscape
from tests.mergekit_moe_ext.ensembles import FAMILIES, inputs_of, padded

SCALES = (-1.0, 0.0, 0.5, 1.0)


def models_of(family, classes=(4, 6)):
    """A base and two fine-tunes; classifiers have heads of their own."""
    stock_class, config = FAMILIES[family]
    torch.manual_seed(0)
    base = stock_class(config).eval()
    sources = {}
    for seed, (task, number) in enumerate(zip(("sun", "cars"), classes, strict=True)):
        source = copy.deepcopy(base)
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        for head in ("classifier", "score"):
            if hasattr(source, head):
                setattr(source, head, nn.Linear(16, number, bias=head == "classifier"))
        sources[task] = source
    return base, sources


def batches_of(family):
    """Per task two batches, of 3 and 2 inputs; texts are padded."""
    batches = {}
    for seed, (task, classes) in enumerate((("sun", 4), ("cars", 6))):
        batches[task] = [inputs_of(family, samples, seed=5 * seed + samples) for samples in (3, 2)]
        for batch in batches[task]:
            if "input_ids" in batch:
                batch.update(padded(batch, "right"))
            if family == "t5":
                batch["labels"] = batch.pop("decoder_input_ids")
                batch["labels"][0, -2:] = -100
            elif family not in ("llama", "gpt2"):
                batch["labels"] = torch.arange(
                    len(batch["input_ids" if "input_ids" in batch else "pixel_values"])
                )
                batch["labels"] += classes - 3
    return batches


def naive_loss(model, family, batches):
    """The mean of -log p of what is right, input by input and token by token."""
    losses = []
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            sample = {name: value[row : row + 1] for name, value in batch.items()}
            if family in ("llama", "gpt2"):
                real = int(sample["attention_mask"].sum())
                ids = sample["input_ids"][:, :real]
                chances = model(input_ids=ids).logits[0].double().softmax(-1)
                losses += [-math.log(chances[t, ids[0, t + 1]]) for t in range(real - 1)]
            elif family == "t5":
                chances = model(**sample).logits[0].double().softmax(-1)
                labels = sample["labels"][0].tolist()
                losses += [
                    -math.log(chances[t, label]) for t, label in enumerate(labels) if label != -100
                ]
            else:
                label = sample.pop("labels").item()
                losses.append(-math.log(model(**sample).logits[0].double().softmax(-1)[label]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "vit", "llama-classifier"])
@torch.no_grad()
def test_against_weights_put_together(family):
    base, sources = models_of(family)
    batches = batches_of(family)
    before = {name: p.clone() for name, p in base.named_parameters()}
    found = loss_landscape(base, sources, batches, SCALES)
    assert found.tasks == ("sun", "cars") and found.losses[0].shape == (4, 4)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    by_name = [dict(source.named_parameters()) for source in sources.values()]
    for row, l_1 in enumerate(SCALES):
        for column, l_2 in enumerate(SCALES):
            for losses, (task, source) in zip(found.losses, sources.items(), strict=True):
                model = copy.deepcopy(source)  # with its head
                for name, parameter in model.named_parameters():
                    if not name.startswith(("classifier", "score")):
                        one, other = (parameters[name] - before[name] for parameters in by_name)
                        parameter.copy_(before[name] + l_1 * one + l_2 * other)
                wanted = naive_loss(model, family, batches[task])
                assert losses[row, column].item() == pytest.approx(wanted, abs=1e-4)
                assert (
                    found.joint[row, column]
                    == found.losses[0][row, column] + found.losses[1][row, column]
                )


@torch.no_grad()
def test_the_corners_are_the_models_themselves():
    """Bit for bit, and in bfloat16, too."""
    base, sources = models_of("llama")
    for model in (base, *sources.values()):
        model.bfloat16()
    batches = {task: of_task[:1] for task, of_task in batches_of("llama").items()}
    found = loss_landscape(base, sources, batches, (0.0, 1.0))
    for losses, of_task in zip(found.losses, batches.values(), strict=True):
        corners = {(0, 0): base, (1, 0): sources["sun"], (0, 1): sources["cars"]}
        for place, model in corners.items():
            alone = loss_landscape(
                model, {"a": model, "b": model}, {"a": of_task, "b": of_task}, (0.0,)
            )
            assert losses[place] == alone.losses[0][0, 0]


def test_the_lowest_point():
    base, sources = models_of("vit")
    found = loss_landscape(base, sources, batches_of("vit"), SCALES)
    for losses in (*found.losses, found.joint):
        l_1, l_2, loss = found.lowest(losses)
        assert (
            loss == losses[SCALES.index(l_1), SCALES.index(l_2)] == min(losses.flatten().tolist())
        )


def test_what_has_no_landscape():
    base, sources = models_of("vit")
    batches = batches_of("vit")
    other = FAMILIES["vit"][0](
        FAMILIES["vit"][1].__class__(**{**FAMILIES["vit"][1].to_dict(), "patch_size": 6})
    )
    without = {}
    for task, of_task in batches.items():
        without[task] = [{"pixel_values": batch["pixel_values"]} for batch in of_task]
    for given, inputs, message in (
        ({"sun": base}, batches, "two fine-tunes, not of 1"),
        (sources, {"sun": []}, "there are sources sun, cars, and inputs of sun"),
        (
            {**sources, "cars": other},
            batches,
            "cars is not a fine-tune of the base: vit.embeddings",
        ),
        (sources, {**batches, "cars": []}, "'cars' have nothing to predict"),
        (sources, without, "'sun' have no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_landscape(base, given, inputs, (0.0,))
