"""A router for several modules: the one that is called first is read, and the others follow."""

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, CompileConfig, Trainer, TrainingArguments

from peft_routing import RoutedLoraConfig, UserError
from tests.conftest import read_tensors
from tests.peft_routing.adapters import TARGETS, make_base, make_routed, save_experts, save_lora

pytestmark = pytest.mark.hosts

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(7))
MASK = torch.ones_like(IDS).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))
SHARED = ["block", "model"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(tmp_path_factory.mktemp("experts"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "routed_lora_experts")]


def by_hand(routed: Any, granularity: str, where: str) -> Tensor:
    """The logits of the base model with hooks, which take nothing from the package but tensors."""
    base = make_base().double()
    names = [layer.key for layer in layers(routed)]
    factors = {layer.key: layer.experts_of("default").factors() for layer in layers(routed)}
    rows = {}  # of the first module of each group
    for name in names:
        rows.setdefault(name.split(".self")[0].split(".mlp")[0] if where == "block" else "", name)
    chosen: dict[str, Tensor] = {}

    def hook(module: Any, args: Any, output: Tensor, name: str) -> Tensor:
        group = name.split(".self")[0].split(".mlp")[0] if where == "block" else ""
        x = args[0]
        if rows[group] == name:
            layer = next(layer for layer in layers(routed) if layer.key == name)
            scores = (x @ layer.router_of("default").weight.double().T).abs()
            if granularity == "sequence":
                real = MASK[..., None].double()
                prefix = real * (real.cumsum(1) <= 4)
                scores = ((scores * prefix).sum(1) / prefix.sum(1))[:, None]
            chosen[group] = torch.softmax(scores, dim=-1)
        update = torch.zeros_like(output)
        for index, (a, b) in enumerate(factors[name]):
            weight = chosen[group][..., index : index + 1]
            update = update + weight * 2.0 * (x @ a.double().T @ b.double().T)
        return output + update

    for name in names:
        base.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: hook(module, args, output, name)
        )
    return logits(base)


@pytest.mark.parametrize("where", SHARED)
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_the_first_module_chooses(experts: dict[str, str], where: str, granularity: str) -> None:
    routed = make_routed(
        experts,
        "linear",
        router_granularity=where,
        granularity=granularity,
        routing_tokens=4,
        mixing="full",
    )
    expected = by_hand(routed, granularity, where)
    torch.testing.assert_close(logits(routed).double(), expected, atol=1e-4, rtol=0)
    alone = make_routed(experts, "linear", granularity=granularity, mixing="full")
    assert (logits(routed) - logits(alone)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("where", "router"),
    [
        *((where, router) for where in SHARED for router in ("arrow", "hierarchical", "mlp")),
        ("block", "layer"),
        ("model", "layer"),
        ("model", "global"),
    ],
)
def test_saved_and_loaded(experts: dict[str, str], where: str, router: str, tmp_path: Path) -> None:
    if router in ("layer", "global"):
        config = RoutedLoraConfig(experts=experts, router=router, router_granularity=where)
        model = get_peft_model(make_base(), config).eval()
        for name, parameter in model.named_parameters():
            if "routed_lora_router" in name:
                torch.nn.init.normal_(parameter)
    else:
        model = make_routed(experts, router, router_granularity=where)
    model.save_pretrained(tmp_path)
    at = {name.split(".routed")[0] for name in read_tensors(tmp_path) if "lora_router" in name}
    first = "base_model.model.model.layers.{}.self_attn.q_proj"
    count = make_base().config.num_hidden_layers if where == "block" else 1
    assert at == {first.format(index) for index in range(count)}
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))
    loaded.set_routing(**({"router_temperature": 2.0} if router != "mlp" else {"top_k": 1}))
    assert not torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("longformer", {"router_granularity": "block"}, "sequences and tokens change places"),
        ("longformer", {"granularity": "sequence"}, "see tokens in the place of sequences"),
        ("xlnet", {"granularity": "sequence"}, "see tokens in the place of sequences"),
    ],
)
def test_models_that_turn_sequences_and_tokens_over(
    tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    """A batch of as many sequences as tokens would be taken for its transpose."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": 30, "attention_window": 4}
    if kind == "xlnet":
        sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 30}
    target = {"longformer": "query", "xlnet": "layer_1"}[kind]
    base = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
    path = str(save_lora(tmp_path, 1, copy.deepcopy(base), target_modules=[target], task_type=None))
    config = RoutedLoraConfig(experts=[path, path], router="linear", **options)
    with pytest.raises(UserError, match=message):
        get_peft_model(copy.deepcopy(base), config)
    get_peft_model(base, RoutedLoraConfig(experts=[path, path], router="linear"))


def test_an_older_adapter_with_one_router(experts: dict[str, str], tmp_path: Path) -> None:
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=experts, router="global")).eval()
    for name, parameter in model.named_parameters():
        if "routed_lora_router" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config.pop("router_granularity") == "model"
    file.write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("where", ["module", *SHARED])
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_generation(experts: dict[str, str], where: str, granularity: str) -> None:
    """With a static cache, whose mask is of another shape, and compiled, as with a dynamic one."""
    model = make_routed(experts, "arrow", router_granularity=where, granularity=granularity)

    def generate(**kwargs: Any) -> Tensor:
        return model.generate(
            input_ids=IDS,
            attention_mask=MASK,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )

    def step_logits(generated: Any) -> Tensor:
        return torch.stack(generated.logits)

    expected = step_logits(generate())
    static = step_logits(generate(cache_implementation="static"))
    torch.testing.assert_close(static, expected, atol=1e-5, rtol=0)
    row = model.generate(
        input_ids=IDS[:1, 3:], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(row[0, 6:], generate().sequences[0, 9:])  # padding has no part in it
    torch._dynamo.reset()
    whole = granularity == "token"
    compiling = CompileConfig(fullgraph=whole, backend="eager", mode=None)
    compiling._compile_all_devices = True
    compiled = generate(cache_implementation="static", compile_config=compiling)
    torch.testing.assert_close(step_logits(compiled), expected, atol=1e-5, rtol=0)
    if not whole:
        compiling.fullgraph = True
        with pytest.raises(ValueError, match="cannot be compiled with fullgraph=True"):
            generate(cache_implementation="static", compile_config=compiling)
        with pytest.raises(ValueError, match="needs one of shape"):
            model.generate(input_ids=IDS, attention_mask=MASK[:, None, None], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("where", SHARED)
def test_compiled_whole_and_in_parts(experts: dict[str, str], where: str) -> None:
    options = {"router_granularity": where, "router_aux_loss_coef": 0.1}
    model = make_routed(experts, "arrow", **options)
    expected = logits(model)
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(whole), expected, atol=1e-6, rtol=0)
    # a graph that is broken within every block
    for layer in model.get_base_model().model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    torch._dynamo.reset()
    torch.testing.assert_close(
        logits(torch.compile(model, backend="eager")), expected, atol=1e-6, rtol=0
    )


def gradients(model: Any, **checkpointing: Any) -> list[Tensor]:
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    model.zero_grad()
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("where", SHARED)
@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_gradients_through_checkpoints(
    experts: dict[str, str], where: str, granularity: str, balance: float
) -> None:
    model = make_routed(
        experts,
        "linear",
        router_granularity=where,
        granularity=granularity,
        routing_tokens=4,
        router_aux_loss_coef=balance,
    )
    plain = gradients(model)
    assert len(plain) == (make_base().config.num_hidden_layers if where == "block" else 1)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    kinds = [False, True] if where == "block" else [False]
    for use_reentrant in kinds:
        checkpointed = gradients(copy.deepcopy(model), use_reentrant=use_reentrant)
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)
    if where == "model":
        with pytest.raises(ValueError, match="'use_reentrant': False"):
            gradients(model, use_reentrant=True)


def test_the_trainer_trains_one_per_block(experts: dict[str, str], tmp_path: Path) -> None:
    model = make_routed(experts, "linear", router_granularity="block")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.1, report_to=[], use_cpu=True, save_steps=9
    )
    Trainer(model, arguments, train_dataset=rows).train()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [name for name in before if "lora_router" in name]
    assert len(changed) == make_base().config.num_hidden_layers
    model.eval().save_pretrained(tmp_path / "routed")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "routed")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("where", SHARED)
def test_a_part_of_the_model_can_be_called(experts: dict[str, str], where: str) -> None:
    model = make_routed(experts, "arrow", router_granularity=where)
    inner = model.get_base_model()
    with torch.no_grad():
        hidden = inner.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert torch.equal(inner.lm_head(hidden), logits(model))
    with pytest.raises(ValueError, match=r"q_proj was called alone, .* call of model"):
        inner.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 32))


def test_threads_and_adapters_do_not_mix(experts: dict[str, str]) -> None:
    model = make_routed(experts, "arrow", router_granularity="block")
    two = {name: experts[name] for name in ("law", "math")}
    config = RoutedLoraConfig(experts=two, router="arrow", router_granularity="model", top_k=1)
    model.add_adapter("other", config)
    expected = [logits(model)]
    model.set_adapter("other")
    expected.append(logits(model))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 and all(torch.equal(one, both) for one in seen)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected[0])
    base = model.unload()
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert torch.equal(logits(base), logits(make_base()))


def test_experts_come_and_go(experts: dict[str, str], tmp_path: Path) -> None:
    model = make_routed(experts, "linear", router_granularity="block", mixing="full")
    before = logits(model)
    model.add_expert("new", str(save_lora(tmp_path / "new", 9)))
    assert not torch.equal(logits(model), before)
    model.remove_expert("new")
    assert torch.equal(logits(model), before)


def test_a_trained_router_keeps_its_input(tmp_path: Path) -> None:
    paths = {
        "down": str(save_lora(tmp_path / "down", 1, target_modules=["down_proj"])),
        "up": str(save_lora(tmp_path / "up", 2, target_modules=["up_proj", "down_proj"])),
    }
    config = {"router": "linear", "router_granularity": "block", "mixing": "full"}
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=paths, **config)).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=r"reads the input of .*up_proj.*down_proj"):
        model.remove_expert("up")
    assert torch.equal(logits(model), before)


def refused(experts: dict[str, str], base: Any, match: str, **options: Any) -> None:
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, RoutedLoraConfig(experts=experts, **options))
    assert [name for name, _ in base.named_modules()] == before


def test_what_is_refused(experts: dict[str, str], tmp_path: Path) -> None:
    block = {"router": "linear", "router_granularity": "block"}
    with pytest.raises(ValueError, match="'module', 'block', 'model'"):
        RoutedLoraConfig(experts=experts, router_granularity="layer")
    with pytest.raises(ValueError, match="use router='layer'"):
        RoutedLoraConfig(experts=experts, router="global", router_granularity="block")
    head = {"head": str(save_lora(tmp_path / "head", 3, target_modules=[*TARGETS, "lm_head"]))}
    refused(head, make_base(), "one stack", router="linear", router_granularity="model")
    get_peft_model(make_base(), RoutedLoraConfig(experts=head, **block))
    late = {**experts, "late": str(save_lora(tmp_path / "late", 3, target_modules=["down_proj"]))}
    options = {"router": "arrow", "router_granularity": "block"}
    refused(late, make_base(), "expert 'late' has no update there", **options)
    get_peft_model(make_base(), RoutedLoraConfig(experts=late, **block))
