"""Training routers: with the Trainer as it is, and with `peft-route train`, one way of running
against another.
"""

import json
import math
import random
import shutil

import click
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from _mergekit_moe_ext_common import placement
from _mergekit_moe_ext_common import training as shared_training
from _mergekit_moe_ext_common.data import load, parse_sources, tokenise
from _mergekit_moe_ext_common.options import Reading
from peft_routing import RoutedLoraConfig
from peft_routing.cli import main
from peft_routing.config import Site
from peft_routing.inspection import inspect_adapter
from peft_routing.layer import Experts
from peft_routing.loading import load_routed
from peft_routing.training import Recipe, train
from tests.conftest import (
    INTERRUPTED,
    ON_CPU,
    SPLIT_ON_CPU,
    TWO_PROCESSES,
    every_other_layer,
    read_tensors,
    run,
)
from tests.peft_routing.adapters import make_base, save_experts, save_lora
from tests.tokenizers import save_tokenizer

READING = Reading(max_length=24, quiet=True)
CLUSTERS = {"math": 0, "code": 0, "law": 1}
LEARNED = {
    "global": {},
    "layer": {},
    "linear": {},
    "arrow": {"top_k": 2},
    "hierarchical": {"clusters": CLUSTERS},
    "mlp": {},
}
IDS = torch.randint(2, 96, (8, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


def routed(experts, router="linear", dtype=torch.float32, **changes):
    torch.manual_seed(1)
    config = RoutedLoraConfig(experts=experts, router=router, **{**LEARNED[router], **changes})
    return get_peft_model(make_base(dtype=dtype), config)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def with_trainer(model, path, rows=ROWS, **arguments):
    defaults = {
        "max_steps": 2,
        "learning_rate": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(path), disable_tqdm=True, **{**defaults, **arguments})
    Trainer(model, arguments, train_dataset=rows).train()
    return model


@pytest.mark.parametrize(
    ("router", "granularity", "reentrant"),
    [(router, granularity, False) for router in LEARNED for granularity in ("token", "sequence")]
    + [("linear", "token", True), ("linear", "sequence", True)],
)
def test_only_the_router_learns(experts, tmp_path, router, granularity, reentrant):
    changes = {"granularity": granularity, "routing_tokens": 4}
    before = state(routed(experts, router, **changes))
    plain = with_trainer(routed(experts, router, **changes), tmp_path)
    saving_memory = with_trainer(
        routed(experts, router, **changes),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    for model in (plain, saving_memory):
        changed = {
            name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])
        }
        assert changed and all("routed_lora_router" in name for name in changed)
        assert all(
            p.grad is None
            for name, p in model.named_parameters()
            if "routed_lora_router" not in name
        )
    for name, tensor in state(saving_memory).items():
        assert torch.allclose(tensor, state(plain)[name], atol=1e-5), name


def test_of_a_bfloat16_model_the_router_alone_is_float32(experts, tmp_path):
    model = with_trainer(routed(experts, dtype=torch.bfloat16), tmp_path, learning_rate=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.abs().max() > 0 for name, p in trained.items())  # it starts at 0


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
def test_gradients_are_those_of_finite_differences(mixing):
    generator = torch.Generator().manual_seed(0)
    inside = Experts(Site((2, 2, 2), (1.0, 0.5, 2.0)), 5, 4, mixing, torch.float64)
    inside.fill(
        [
            (
                torch.randn(2, 5, generator=generator).double(),
                torch.randn(4, 2, generator=generator).double(),
            )
            for _ in range(3)
        ]
    )
    x = torch.randn(3, 5, generator=generator).double().requires_grad_()
    coefficients = torch.rand(3, 3, generator=generator).double().requires_grad_()
    assert torch.autograd.gradcheck(inside, (x, coefficients))


def test_the_load_balancing_loss_by_hand(experts):
    plain, balanced = (
        routed(experts, top_k=2, init="arrow", score="abs", router_aux_loss_coef=c).train()
        for c in (0.0, 0.7)
    )
    for model in (plain, balanced):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "routed_lora_router" in name:
                    parameter.abs_().mul_(3)  # so that scores of positive inputs are positive

    seen = {}
    for name, module in balanced.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen.update({name: args[0].detach()})
            )
    mask = torch.ones_like(IDS)
    mask[:3, 9:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    with_loss = balanced(input_ids=IDS, attention_mask=mask, labels=labels).loss
    without = plain(input_ids=IDS, attention_mask=mask, labels=labels).loss
    by_hand = []
    for name, hidden in seen.items():
        weight = balanced.state_dict()[f"{name}.routed_lora_router.default.weight"]
        scores = (hidden[mask.bool()] @ weight.T).abs()
        probabilities = scores.softmax(-1)
        kept = probabilities * (scores >= scores.topk(2, dim=-1).values[:, 1:])
        chosen = kept / kept.sum(-1, keepdim=True)
        by_hand.append(3 * sum(chosen[:, i].mean() * probabilities[:, i].mean() for i in range(3)))
    assert torch.allclose(with_loss - without, 0.7 * torch.stack(by_hand).mean(), atol=1e-5)
    balanced.eval()
    assert torch.allclose(
        balanced(input_ids=IDS, attention_mask=mask, labels=labels).loss, without, atol=1e-6
    )


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def loss_with_balance_by_hand(model, weight):
    """The loss of a model without balancing plus the loss that balances, per token, top 2."""
    hidden = {}

    def keep(name):
        return lambda module, args: hidden.update({name: args[0]})

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            module.register_forward_pre_hook(keep(name))
    loss = model(input_ids=IDS, labels=IDS).loss
    parts = []
    for name, inputs in hidden.items():
        rows = model.get_parameter(f"{name}.routed_lora_router.default.weight")
        scores = (inputs.flatten(0, 1) @ rows.T).abs()
        probabilities = scores.softmax(-1)
        kept = probabilities * (scores >= scores.topk(2, dim=-1).values[:, 1:])
        chosen = (kept / kept.sum(-1, keepdim=True)).detach()
        parts.append(3 * (chosen.mean(0) * probabilities.mean(0)).sum())
    return loss + weight * torch.stack(parts).mean()


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_gradient_of_the_load_balancing_loss_by_hand(experts, reentrant, as_tuple):
    options = {"top_k": 2, "init": "arrow"}
    plain = routed(experts, **options).train()
    loss_with_balance_by_hand(plain, 7.0).mul(0.5).backward()
    balanced = routed(experts, router_aux_loss_coef=7.0, **options).train()
    if reentrant is not None:
        balanced.gradient_checkpointing_enable({"use_reentrant": reentrant})
        balanced.enable_input_require_grads()
    output = balanced(input_ids=IDS, labels=IDS, return_dict=not as_tuple)
    (output[0] * 0.5).backward()  # as a step of two batches does
    expected = gradients(plain)
    for name, gradient in gradients(balanced).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_balances_choices_per_sequence_alike(experts, reentrant):
    options = {"granularity": "sequence", "routing_tokens": 4, "router_aux_loss_coef": 7.0}
    plain, saving = (routed(experts, init="arrow", **options).train() for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    for model in (plain, saving):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = gradients(plain)
    for name, gradient in gradients(saving).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6, rtol=1e-4), name


def test_a_loss_that_is_not_balanced_is_said_to_be(experts, tmp_path):
    """The Trainer smooths labels in a loss of its own, and a loop may have one of its own."""
    model = routed(experts, init="arrow", router_aux_loss_coef=0.5).train()
    with pytest.warns(UserWarning, match="router_aux_loss_coef=0.5 has no effect.*label_smoothing"):
        with_trainer(model, tmp_path, max_steps=1, label_smoothing_factor=0.1)
    output = model(input_ids=IDS, labels=IDS)
    with pytest.warns(UserWarning, match="router_aux_loss_coef=0.5 has no effect"):
        output.logits.sum().backward()


def test_a_backward_pass_from_elsewhere_does_not_balance_again(experts):
    """Two losses of one pass, differentiated one after the other, as together."""
    grads = []
    for at_once in (True, False):
        model = routed(experts, init="arrow", router_aux_loss_coef=7.0).train()
        output = model(input_ids=IDS, labels=IDS)
        other = output.logits.square().mean()
        if at_once:
            (output.loss + other).backward()
        else:
            output.loss.backward(retain_graph=True)
            other.backward()
        grads.append(gradients(model))
    for name, gradient in grads[0].items():
        assert torch.allclose(gradient, grads[1][name], atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_the_load_balancing_loss_balances(experts, tmp_path, granularity):
    @torch.no_grad()
    def imbalance(model):
        found = []
        handles = [
            module.register_forward_pre_hook(
                lambda _, args: found.append(args[1].detach().flatten(0, -2).mean(0))
            )
            for module in model.modules()
            if isinstance(module, Experts)
        ]
        model(input_ids=IDS)
        for handle in handles:
            handle.remove()
        return sum(float((mean - 1 / 3).square().sum()) for mean in found)

    changes = {
        "init": "arrow",
        "granularity": granularity,
        "routing_tokens": 4,
        "router_temperature": 0.2,
    }
    after = [
        imbalance(
            with_trainer(routed(experts, router_aux_loss_coef=c, **changes), tmp_path, max_steps=10)
        )
        for c in (0.0, 30.0)
    ]
    assert after[1] < after[0] / 2


def test_accumulated_steps_weigh_the_load_balancing_loss_by_tokens(experts, tmp_path):
    def trained(**arguments):
        model = routed(experts, init="arrow", router_aux_loss_coef=0.5)
        return state(
            with_trainer(model, tmp_path, [ROWS[0]] * 8, max_steps=1, optim="sgd", **arguments)
        )

    whole = trained(per_device_train_batch_size=8)
    parts = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-6), name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, experts):
    path = tmp_path_factory.mktemp("prepared")
    make_base().save_pretrained(path / "base")
    save_tokenizer(path / "base", 96)
    model = get_peft_model(
        make_base(), RoutedLoraConfig(experts=experts, router="linear", init="arrow")
    )
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(path / "routed")
    words = random.Random(0)
    for name, size in (("news", 10), ("law", 60)):
        texts = []
        for _ in range(12):
            length = words.randrange(5, 20)
            texts.append(" ".join(f"w{words.randrange(size)}" for _ in range(length)))
        (path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, prepared):
    """A directory with a base model, a routed adapter and two sources of texts, to work in."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**changes):
    return Recipe(
        **{"num_train_epochs": 1, "held_out": 2, "per_device_train_batch_size": 4, **changes}
    )


def test_the_best_learning_rate_is_kept(here):
    results = train(
        "routed", "out", ["news.jsonl", "law.jsonl"], READING, recipe(), learning_rates=(1e-7, 3e-2)
    )
    assert [result.learning_rate for result in results] == [3e-2, 1e-7]
    assert results[0].mean < results[1].mean
    alone = train(
        "routed", "alone", ["news.jsonl", "law.jsonl"], READING, recipe(), learning_rates=(3e-2,)
    )
    assert alone[0].losses == results[0].losses
    best, same, before = (read_tensors(here / name) for name in ("out", "alone", "routed"))
    for name, tensor in best.items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, before[name]) == ("routed_lora_router" not in name)
    assert not (here / "out.checkpoints").exists()
    assert "learning rate 0.03 (of 0.03, 1e-07)" in (here / "out" / "README.md").read_text()


def test_the_length_of_a_training_is_said_by_what_ends_it():
    lengths = [recipe().length, recipe(num_train_epochs=2.5).length, recipe(max_steps=20).length]
    assert lengths == ["1 epoch", "2.5 epochs", "20 steps"]


def test_training_arrow_says_that_it_needs_none(here, caplog):
    routed(save_experts(here / "loras"), "arrow").save_pretrained(here / "arrow")
    for adapter, needs_none in (("arrow", True), ("routed", False)):
        caplog.clear()
        with pytest.raises(click.ClickException, match="does not exist"):
            train(adapter, "out", ["nowhere.jsonl"], READING, recipe(), base="./nowhere")
        assert ("needs no training" in caplog.text) == needs_none


def test_held_out_losses_are_means_over_tokens(here):
    (result,) = train(
        "routed", "out", ["law.jsonl"], READING, recipe(held_out=5), learning_rates=(3e-2,)
    )
    source = parse_sources(["law.jsonl"])[0]
    tokenizer = AutoTokenizer.from_pretrained("base")
    rows = load(source).train_test_split(test_size=5, seed=42)["test"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "out").eval()
    total = count = 0
    for row in tokenise(rows, source, tokenizer, max_length=24):
        ids = torch.tensor([row["input_ids"]])
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        )
        total, count = total + losses.item(), count + ids.shape[1] - 1
    assert result.losses["law"][1] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("granularity", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(here, granularity):
    config = json.loads((here / "routed" / "adapter_config.json").read_text())
    config |= {"granularity": granularity, "routing_tokens": 3}
    (here / "routed" / "adapter_config.json").write_text(json.dumps(config))
    options = ["--data", "news.jsonl", "--data", "law.jsonl", "--learning-rate", "0.01", "--quiet"]
    options += ["--num-train-epochs", "1", "--held-out", "2", "--per-device-train-batch-size"]
    one = run("peft-route", "train", "routed", *options, "4", "-o", "one", env=ON_CPU)
    assert one.returncode == 0, one.stderr
    two = run(
        *TWO_PROCESSES,
        "-m",
        "peft_routing",
        "train",
        "routed",
        *options,
        "2",
        "-o",
        "two",
        env=ON_CPU,
    )
    assert two.returncode == 0, two.stderr
    assert "2 processes" in (here / "two" / "README.md").read_text()
    expected, got, before = (read_tensors(here / name) for name in ("one", "two", "routed"))
    for name, tensor in expected.items():
        assert torch.allclose(tensor, got[name], atol=1e-5), name
        assert torch.equal(tensor, before[name]) == ("routed_lora_router" not in name)
    assert one.stdout == two.stdout


def test_a_split_model_that_was_interrupted_and_resumed_trains_as_a_whole_one(here):
    """Two learning rates; the second is interrupted after its checkpoint."""
    (here / "interrupted.py").write_text(INTERRUPTED)
    options = ["train", "routed", "--data", "news.jsonl", "--data", "law.jsonl", "--quiet"]
    options += ["--learning-rate", "0.01", "--learning-rate", "0.001", "--held-out", "2"]
    options += ["--max-steps", "3", "--per-device-train-batch-size"]
    one = run("peft-route", *options, "4", "-o", "one", env=ON_CPU)
    assert one.returncode == 0, one.stderr
    options += ["2", "-o", "two", "--save-steps", "2"]
    command = (*TWO_PROCESSES, "interrupted.py", "peft_routing", "6")
    stopped = run(*command, *options, env=SPLIT_ON_CPU)
    assert stopped.returncode != 0 and not (here / "two").exists()
    checkpoint = here / "two.checkpoints" / "lr-0.001" / "checkpoint-2"
    parts = [checkpoint / f"trained-{part}-of-2.safetensors" for part in (1, 2)]
    assert all(path.exists() for path in parts)
    two = run(*TWO_PROCESSES, "-m", "peft_routing", *options, "--resume", env=SPLIT_ON_CPU)
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout
    names = sorted(path.name for path in (here / "one").iterdir())
    assert names == sorted(path.name for path in (here / "two").iterdir())
    expected, got, before = (read_tensors(here / name) for name in ("one", "two", "routed"))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.allclose(tensor, got[name], atol=1e-5), name
        assert torch.equal(tensor, before[name]) == ("routed_lora_router" not in name)


def test_interrupted_and_resumed_equals_uninterrupted(here):
    settings = recipe(
        max_steps=6,
        save_steps=2,
        held_out=0,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    data = ["news.jsonl", "law.jsonl"]
    held_out = ["law.jsonl"]
    rates = (0.01, 0.001)

    def trained(output, **changes):
        options = {"learning_rates": rates, "eval_data": held_out, **changes}
        return train("routed", output, data, READING, settings, **options)

    trained("whole")
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if (
            len(calls) == 12 + 10
        ):  # in step 5 of the second learning rate, after the checkpoint of step 4
            raise KeyboardInterrupt
        return stock(self, *args, **kwargs)

    stock = shared_training.TokenTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shared_training.TokenTrainer, "training_step", interrupted)
        trained("out")
    assert not (here / "out").exists()
    with pytest.raises(click.ClickException, match="--resume goes on"):
        trained("out")
    with pytest.raises(click.ClickException, match="had another learning rates"):
        trained("out", learning_rates=(0.01, 0.1), resume=True)
    # What was measured on other texts, or with another base, is not compared.
    with pytest.raises(click.ClickException, match="had another held out data"):
        trained("out", eval_data=["news.jsonl"], resume=True)
    weights = here / "base" / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(kept[:-64] + bytes(64))
    with pytest.raises(click.ClickException, match="had another base weights"):
        trained("out", resume=True)
    weights.write_bytes(kept)
    result = here / "out.checkpoints" / "lr-0.01" / "result.json"
    whole = result.read_text()
    result.write_text(whole[:-5])
    with pytest.raises(click.ClickException, match=r"result.json is damaged: .*; remove it, and"):
        trained("out", resume=True)
    result.write_text(whole)
    before = len(calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shared_training.TokenTrainer,
            "training_step",
            lambda *a, **k: (calls.append(a), stock(*a, **k))[1],
        )
        trained("out", resume=True)
    assert len(calls) - before == 4  # two steps of two passes
    expected, got = read_tensors(here / "whole"), read_tensors(here / "out")
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    assert not (here / "out.checkpoints").exists()


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"bf16": True}], ids=lambda c: next(iter(c))
)
def test_ways_to_save_memory_train_the_same(here, changes):
    for name, more in (("plain", {}), ("saving", changes)):
        train(
            "routed",
            name,
            ["news.jsonl"],
            READING,
            recipe(router_aux_loss=0.1, **more),
            learning_rates=(0.001,),
        )
    before, expected, got = (read_tensors(here / name) for name in ("routed", "plain", "saving"))
    moved, same = (
        torch.cat([(after[n] - before[n]).flatten() for n in sorted(before) if "router" in n])
        for after in (expected, got)
    )
    assert torch.cosine_similarity(moved, same, dim=0) > (0.8 if "bf16" in changes else 0.9999)


def test_a_spread_base_model_trains_the_same(here, monkeypatch):
    """Each of several learning rates starts anew, and computes in bfloat16."""
    monkeypatch.setattr(
        placement, "_device_map", lambda model, _: every_other_layer(model, torch.device("cpu"))
    )
    results = {}
    for output, device_map in (("whole", None), ("spread", "auto")):
        results[output] = train(
            "routed",
            output,
            ["news.jsonl"],
            READING,
            recipe(bf16=True),
            learning_rates=(0.01, 0.001),
            device_map=device_map,
        )
    assert results["spread"] == results["whole"]
    before, expected, got = (read_tensors(here / name) for name in ("routed", "whole", "spread"))
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor)
        assert torch.equal(got[name], before[name]) == ("routed_lora_router" not in name)


def test_completions_only(here):
    tokenizer = AutoTokenizer.from_pretrained("base")
    (here / "pairs.jsonl").write_text(json.dumps({"input": "w1 w2 w3", "target": "w4 w5"}) + "\n")
    source = parse_sources(["pairs.jsonl"])[0]
    row = tokenise(load(source), source, tokenizer, max_length=10, completions_only=True)[0]
    assert tokenizer.decode(row["input_ids"]) == "w1 w2 w3 w4 w5 </s>"
    assert row["labels"] == [-100] * 3 + row["input_ids"][3:]
    tokenizer.chat_template = (
        "{% for m in messages %}w9 {{ m['content'] }} w8 {% endfor %}{% if "
        "add_generation_prompt %}w9 {% endif %}"
    )
    chat = [
        {"role": r, "content": c}
        for r, c in (("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5"))
    ]
    (here / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    source = parse_sources(["chats.jsonl"])[0]
    row = tokenise(load(source), source, tokenizer, max_length=24, completions_only=True)[0]
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "w4 w5 w8"
    assert tokenizer.decode(row["input_ids"]) == "w9 w1 w8 w9 w2 w8 w9 w3 w8 w9 w4 w5 w8"
    (here / "many.jsonl").write_text((here / "pairs.jsonl").read_text() * 4)
    train(
        "routed",
        "out",
        ["many.jsonl"],
        READING,
        recipe(completions_only=True, held_out=0),
        learning_rates=(0.01,),
    )
    with pytest.raises(click.ClickException, match="completions need input and target"):
        train(
            "routed",
            "no",
            ["news.jsonl"],
            READING,
            recipe(completions_only=True),
            learning_rates=(0.01,),
        )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["base", "--data", "news.jsonl"], "has no adapter_config.json"),
        (
            ["nowhere", "--data", "news.jsonl"],
            "nowhere does not exist: name a directory that",
        ),
        (["routed", "--data", "missing.jsonl"], "does not exist"),
        (["routed", "--data", "news.jsonl", "--held-out", "0"], "give one --learning-rate"),
        (["routed", "--data", "news.jsonl", "--held-out", "2", "--resume"], "no checkpoint"),
        (["routed", "--data", "news.jsonl", "-o", "base"], "is not empty"),
        (["routed", "--data", "news.jsonl", "--weight", "lwa=2"], "there is no such source"),
        (["routed", "--data", "news.jsonl", "--base", "./nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_found_before_work_starts(here, arguments, complaint):
    result = CliRunner().invoke(main, ["train", *arguments])
    assert result.exit_code == 1
    assert complaint in result.output
    assert sorted(path.name for path in here.iterdir()) == [
        "base",
        "law.jsonl",
        "news.jsonl",
        "routed",
    ]


def test_a_router_without_parameters_is_not_trained(here, experts):
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=experts, router="uniform"))
    model.save_pretrained("uniform")
    with pytest.raises(click.ClickException, match="nothing to learn"):
        train("uniform", "out", ["news.jsonl"], READING, recipe(), base="base")


def test_the_trainer_s_loss_per_sequence_is_that_of_the_tokens_after_the_prefix(experts, tmp_path):
    model = routed(experts, granularity="sequence", routing_tokens=8)
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=8
    )
    measured = Trainer(model, arguments, eval_dataset=ROWS).evaluate()["eval_loss"]
    logits = model.eval()(input_ids=IDS).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, 7:-1].flatten(0, 1), IDS[:, 8:].flatten()
    )
    assert measured == pytest.approx(expected.item(), abs=1e-4)


def test_an_encoder_decoder_is_trained_and_inspected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    t5 = AutoConfig.for_model(
        "t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained("base")
    save_tokenizer(tmp_path / "base", 96)
    for seed in (1, 2):
        base = AutoModelForSeq2SeqLM.from_pretrained("base")
        save_lora(
            tmp_path / f"e{seed}", seed, base, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
        )
    config = RoutedLoraConfig(experts=["e1", "e2"], router="linear", init="arrow")
    get_peft_model(AutoModelForSeq2SeqLM.from_pretrained("base"), config).save_pretrained("routed")
    rows = [{"input": f"w1 w2 w{i}", "target": f"w{i} w{i} w4 w5"[: 3 + i]} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = train(
        "routed", "out", ["pairs.jsonl"], READING, recipe(), base="base", learning_rates=(0.003,)
    )
    assert result.losses["pairs"][1] < result.losses["pairs"][0]
    before, after = read_tensors(tmp_path / "routed"), read_tensors(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "routed_lora_router" in name
    }
    one, many = (
        inspect_adapter("out", ["pairs.jsonl"], READING, base="base", batch_size=size).tasks[
            "pairs"
        ]
        for size in (1, 10)
    )
    for module, means in one.items():
        assert means == pytest.approx(many[module], abs=1e-5), module


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about training on a CPU")
def test_four_bits_on_a_cpu_are_refused(here, monkeypatch):
    def four_bits(*args, **kwargs):
        model = load_routed(*args, **kwargs)
        model.get_base_model().is_loaded_in_4bit = True
        return model

    monkeypatch.setattr("peft_routing.training.load_routed", four_bits)
    with pytest.raises(click.ClickException, match="lets no gradient through 4-bit layers"):
        train("routed", "out", ["news.jsonl"], READING, recipe())
    assert not (here / "out").exists()


def test_a_diverged_learning_rate_is_not_kept(here):
    results = train("routed", "out", ["news.jsonl"], READING, recipe(), learning_rates=(1e38, 1e-3))
    assert [result.learning_rate for result in results] == [1e-3, 1e38] and math.isnan(
        results[1].mean
    )
    with pytest.raises(click.ClickException, match="diverged at every learning rate"):
        train("routed", "no", ["news.jsonl"], READING, recipe(), learning_rates=(1e38,))
    assert not (here / "no").exists()


def test_checkpoints_of_another_training_are_left_alone(here):
    other = here / "out.checkpoints" / "lr-0.5" / "checkpoint-9"
    other.mkdir(parents=True)
    (other / "trainer_state.json").write_text("{}")
    with pytest.raises(click.ClickException, match="unfinished training"):
        train("routed", "out", ["news.jsonl"], READING, recipe(), learning_rates=(0.01,))
    (other / "trainer_state.json").rename(here / "out.checkpoints" / "notes.txt")
    train("routed", "out", ["news.jsonl"], READING, recipe(), learning_rates=(0.01,))
    assert other.exists() and (here / "out.checkpoints" / "notes.txt").exists()


def test_a_base_that_does_not_fit_is_explained(here):
    make_base(num_hidden_layers=2).save_pretrained("short")
    save_tokenizer(here / "short", 96)
    make_base(hidden_size=16).save_pretrained("narrow")
    save_tokenizer(here / "narrow", 96)
    for base in ("short", "narrow"):
        with pytest.raises(click.ClickException, match=f"routed does not fit {base}"):
            train(
                "routed",
                "out",
                ["news.jsonl"],
                READING,
                recipe(),
                base=base,
                learning_rates=(0.01,),
            )
