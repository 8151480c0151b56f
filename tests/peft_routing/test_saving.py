"""A routed adapter that is saved, moved, loaded, copied, changed or pushed stays the same adapter:
by its logits.
"""

import copy
import gc
import json
import logging
import pickle
import re
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import peft_routing
from _mergekit_moe_ext_common.errors import UserError
from peft_routing import RoutedLoraConfig
from peft_routing.layer import RoutedLoraLinear
from peft_routing.routers import all_routers
from tests.conftest import read_tensors, run, same_files
from tests.peft_routing.adapters import (
    NAMES,
    make_base,
    save_experts,
    save_lora,
    skip_without_native_adapters,
)

pytestmark = pytest.mark.hosts

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
WEIGHTS = {"math": 0.7, "code": -0.2, "law": 0.4}
CLUSTERS = {"math": "b", "code": "a", "law": "b"}
ROUTERS: dict[str, dict[str, Any]] = {
    "uniform": {"router": "uniform"},
    "fixed": {"router": "fixed", "weights": WEIGHTS},
    "fixed-list": {"router": "fixed", "weights": [0.1, 0.2, 0.9]},
    "global": {"router": "global"},
    "layer": {"router": "layer", "router_temperature": 0.5},
    "linear": {"router": "linear", "top_k": 2},
    "linear-full": {"router": "linear", "mixing": "full"},
    "linear-arrow": {"router": "linear", "init": "arrow"},
    "linear-sequence": {"router": "linear", "granularity": "sequence", "routing_tokens": 4},
    "arrow": {"router": "arrow", "top_k": 2},
    "hierarchical": {"router": "hierarchical", "clusters": CLUSTERS},
    "mlp": {"router": "mlp"},
    "mlp-0": {"router": "mlp", "mlp_layers": 0},
}
LEARNED = [
    label for label, options in ROUTERS.items() if options["router"] not in ("uniform", "fixed")
]
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(7))
MASK = torch.ones_like(IDS).index_put((torch.tensor(1), torch.arange(9, 12)), torch.tensor(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def loss(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss


def learn(model: Any, seed: int = 1) -> Any:
    """Give every parameter of the routers a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routed_lora_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def layers(model: Any) -> list[RoutedLoraLinear]:
    return [module for module in model.modules() if isinstance(module, RoutedLoraLinear)]


def factors(model: Any, adapter: str = "default") -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Copies of A and B by module and expert."""
    names = list(model.peft_config[adapter].experts)
    copies = {}
    for layer in layers(model):
        of_experts = layer.experts_of(adapter).factors()
        for name, (a, b) in zip(names, of_experts, strict=True):
            copies[layer.key, name] = (a.clone(), b.clone())
    return copies


def rows(model: Any, adapter: str = "default") -> dict[tuple[str, str, str], Tensor]:
    """What the routers have learned, by module, parameter and expert (or cluster), copied."""
    config = model.peft_config[adapter]
    clusters = sorted(set((config.clusters or {}).values()))
    learned = {}
    for layer in layers(model):
        for name, parameter in layer.router_of(adapter).named_parameters():
            labels = (
                clusters
                if config.router == "hierarchical" and name == "weight"
                else list(config.experts)
            )
            if name in ("weight_in", "bias_in"):
                learned[layer.key, name, ""] = parameter.detach().clone()
            else:
                assert len(labels) == len(parameter)
                learned.update(
                    {
                        (layer.key, name, of): row.detach().clone()
                        for of, row in zip(labels, parameter, strict=True)
                    }
                )
    return learned


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[Any, Any], second: dict[Any, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def as_dtype(adapter: str, out: Path, dtype: torch.dtype) -> str:
    """The same LoRA adapter, saved in another dtype."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        out / "adapter_model.safetensors",
    )
    return str(out)


@dataclass(frozen=True)
class Place:
    root: Path
    experts: dict[str, str]
    first: Any

    def base(self) -> Any:
        """A copy: loading it each time would take longer."""
        return copy.deepcopy(self.first)

    def compose(
        self, label: str, names: tuple[str, ...] = NAMES, *, learned: bool = False, **changes: Any
    ) -> Any:
        options = {**ROUTERS[label], **changes}
        for option in ("weights", "clusters"):
            if isinstance(options.get(option), dict):
                options[option] = {name: options[option][name] for name in names}
        experts = {name: self.experts[name] for name in names}
        model = get_peft_model(
            self.base(), RoutedLoraConfig(**{"experts": experts, **options})
        ).eval()
        return learn(model) if learned else model

    def load(self, path: Path, **kwargs: Any) -> Any:
        return PeftModel.from_pretrained(self.base(), path, **kwargs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("saving")
    make_base().save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    # of one A, so that those routers that mix in low rank by default do
    return Place(root, save_experts(root / "experts", a_seed=4), base)


@dataclass(frozen=True)
class Saved:
    path: Path
    logits: Tensor


@pytest.fixture(scope="module")
def saved(place: Place) -> dict[str, Saved]:
    """Every router's adapter with its logits: moved since it was saved, and its experts deleted."""
    lent = place.root / "lent"
    shutil.copytree(place.root / "experts", lent)
    there = replace(place, experts={name: str(lent / name) for name in NAMES})
    made = {}
    for label in ROUTERS:
        model = there.compose(label, learned=True)
        model.save_pretrained(place.root / "saved" / label)
        made[label] = Saved(place.root / "moved" / label, logits(model))
    shutil.rmtree(lent)
    shutil.move(place.root / "saved", place.root / "moved")
    return made


@pytest.fixture(scope="module")
def narrow(place: Place) -> Saved:
    """Another adapter, with other experts, targets and ranks; its router is `global`."""
    experts = save_experts(
        place.root / "narrow", ("bio", "art"), target_modules=["k_proj", "v_proj"], r=2
    )
    model = learn(
        get_peft_model(place.base(), RoutedLoraConfig(experts=experts, router="global")), seed=2
    )
    model.save_pretrained(place.root / "narrow" / "routed")
    return Saved(place.root / "narrow" / "routed", logits(model))


def test_every_router_is_here() -> None:
    ours = {
        name
        for name, router in all_routers().items()
        if router.__module__.startswith("peft_routing.")
    }
    assert {options["router"] for options in ROUTERS.values()} == ours


def test_routers_differ_in_logits(place: Place, saved: dict[str, Saved], narrow: Saved) -> None:
    kinds = [logits(place.base()), narrow.logits, *(adapter.logits for adapter in saved.values())]
    for index, one in enumerate(kinds):
        assert all((one - other).abs().max() > 1e-3 for other in kinds[:index])


# Loading

FRESH = """
import sys
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root, out = map(Path, sys.argv[1:])
inputs = load_file(out / "inputs.safetensors")
adapters = sorted((root / "moved").iterdir())

def base():
    return AutoModelForCausalLM.from_pretrained(root / "base")

logits = {path.name: PeftModel.from_pretrained(base(), path)(**inputs).logits for path in adapters}
save_file(logits, out / "logits.safetensors")
"""


@pytest.fixture(scope="module")
def fresh(place: Place, saved: dict[str, Saved]) -> Path:
    """Every adapter's logits in a new process, which imports nothing of ours."""
    out = place.root / "fresh"
    out.mkdir()
    save_file({"input_ids": IDS, "attention_mask": MASK}, out / "inputs.safetensors")
    process = run(sys.executable, "-c", FRESH, place.root, out)
    assert process.returncode == 0, process.stderr
    return out


def test_a_fresh_process_gives_equal_logits(saved: dict[str, Saved], fresh: Path) -> None:
    theirs = load_file(fresh / "logits.safetensors")
    assert theirs.keys() == saved.keys()
    assert [label for label in saved if not torch.equal(theirs[label], saved[label].logits)] == []


def native(place: Place, path: Path, **kwargs: Any) -> Any:
    model = place.base()
    model.load_adapter(str(path), **kwargs)
    return model


def by_auto_class(place: Place, path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def beside_another(place: Place, path: Path) -> Any:
    model = place.load(place.root / "moved" / "global", adapter_name="first")
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model


def by_state_dict(place: Place, path: Path) -> Any:
    model = get_peft_model(place.base(), PeftConfig.from_pretrained(path))
    loaded = set_peft_model_state_dict(model, load_peft_weights(str(path)))
    assert not loaded.unexpected_keys
    return model


WAYS: dict[str, Callable[[Place, Path], Any]] = {
    "from_pretrained": lambda place, path: place.load(path),
    "trainable": lambda place, path: place.load(path, is_trainable=True),
    "low_cpu_mem_usage": lambda place, path: place.load(path, low_cpu_mem_usage=True),
    "adapter_name": lambda place, path: place.load(path, adapter_name="other"),
    "named_0": lambda place, path: place.load(path, adapter_name="0"),
    "subfolder": lambda place, path: place.load(path.parent, subfolder=path.name),
    "config": lambda place, path: place.load(path, config=PeftConfig.from_pretrained(path)),
    "state_dict": by_state_dict,
    "beside_another": beside_another,
    "auto": lambda place, path: AutoPeftModelForCausalLM.from_pretrained(path),
    "auto_low_cpu": lambda place, path: AutoPeftModelForCausalLM.from_pretrained(
        path, low_cpu_mem_usage=True
    ),
    "native": by_auto_class,
    "load_adapter": native,
    "load_adapter_low_cpu": lambda place, path: native(place, path, low_cpu_mem_usage=True),
    "load_adapter_name": lambda place, path: native(place, path, adapter_name="other"),
    "load_adapter_trainable": lambda place, path: native(place, path, is_trainable=True),
}


@pytest.mark.parametrize("label", ROUTERS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_gives_equal_logits(
    place: Place, saved: dict[str, Saved], way: str, label: str
) -> None:
    assert torch.equal(logits(WAYS[way](place, saved[label].path).eval()), saved[label].logits)


def test_loading_warns_of_no_missing_key(place: Place, saved: dict[str, Saved]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        for adapter in saved.values():
            place.load(adapter.path)


def damaged(saved: Saved, path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the adapter whose tensors `change` has changed."""
    shutil.copytree(saved.path, path)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def dropping(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize("label", ["linear", "global", "hierarchical"])
def test_an_adapter_that_lacks_a_tensor_is_refused(
    place: Place, saved: dict[str, Saved], label: str, tmp_path: Path
) -> None:
    names = sorted(read_tensors(saved[label].path))
    of_experts = next(name for name in names if "routed_lora_experts" in name)
    of_router = next(name for name in names if "routed_lora_router" in name)
    for number, name in enumerate((of_experts, of_router)):
        path = damaged(saved[label], tmp_path / str(number), dropping(name))
        module, _, tensor = name.rpartition(".")
        with pytest.raises(UserError, match=rf"lacks {re.escape(module)}\.default\.{tensor}"):
            place.load(path)
        # What was loaded before under another name is not taken for it.
        model = place.load(saved[label].path, adapter_name="first")
        with pytest.raises(UserError, match=rf"'second' lacks {re.escape(module)}\.second"):
            model.load_adapter(path, "second")


def test_an_adapter_with_other_tensors_or_nan_is_refused(
    place: Place, saved: dict[str, Saved], tmp_path: Path
) -> None:
    name = next(iter(read_tensors(saved["linear"].path)))

    def extend(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.9.mlp.down_proj.routed_lora_experts.A"] = torch.ones(
            2
        )

    with pytest.raises(UserError, match=r"holds base_model\.model\.model\.layers\.9"):
        place.load(damaged(saved["linear"], tmp_path / "more", extend))
    path = damaged(saved["linear"], tmp_path / "nan", lambda each: each[name].fill_(torch.nan))
    with pytest.raises(UserError, match="holds NaN or infinity"):
        place.load(path)


# Saving


@pytest.mark.parametrize("label", ROUTERS)
def test_files_are_named_as_peft_names_them(saved: dict[str, Saved], label: str) -> None:
    assert {path.name for path in saved[label].path.iterdir()} == FILES


@pytest.mark.parametrize("label", ROUTERS)
def test_a_loaded_adapter_is_saved_bit_equal(
    place: Place, saved: dict[str, Saved], label: str, tmp_path: Path
) -> None:
    place.load(saved[label].path).save_pretrained(tmp_path)
    assert same(read_tensors(tmp_path), read_tensors(saved[label].path))
    assert same_files(tmp_path, saved[label].path)


def test_tensors_are_named_after_the_modules(saved: dict[str, Saved]) -> None:
    modules = []
    for i in range(3):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            modules.append(f"base_model.model.model.layers.{i}.{module}")
    of_experts = {f"{module}.routed_lora_experts.A" for module in modules}
    of_experts |= {f"{module}.routed_lora_experts.B" for module in modules}
    assert read_tensors(saved["uniform"].path).keys() == of_experts
    of_routers = {f"{module}.routed_lora_router.weight" for module in modules}
    assert read_tensors(saved["linear"].path).keys() == of_experts | of_routers
    of_router = {"base_model.model.model.layers.0.self_attn.q_proj.routed_lora_router.logits"}
    assert read_tensors(saved["global"].path).keys() == of_experts | of_router


def test_saved_tensors_do_not_depend_on_the_adapters_name(
    place: Place, saved: dict[str, Saved], tmp_path: Path
) -> None:
    for name in ("other", "0", "A", "B", "weight", "lora", "routed", "model", "layers"):
        model = place.load(saved["linear"].path, adapter_name=name)
        assert torch.equal(logits(model), saved["linear"].logits)
        model.save_pretrained(tmp_path)
        assert same(read_tensors(tmp_path / name), read_tensors(saved["linear"].path))


def test_a_pickled_adapter_loads(place: Place, saved: dict[str, Saved], tmp_path: Path) -> None:
    place.load(saved["linear"].path).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(logits(place.load(tmp_path)), saved["linear"].logits)


@pytest.mark.parametrize("label", ROUTERS)
def test_the_config_survives(place: Place, saved: dict[str, Saved], label: str) -> None:
    model = place.compose(label)
    written, read = model.peft_config["default"], PeftConfig.from_pretrained(saved[label].path)
    assert type(read) is RoutedLoraConfig
    assert list(read.experts) == list(written.experts) == list(NAMES)
    assert read.inference_mode and not written.inference_mode
    differing = [f.name for f in fields(read) if getattr(read, f.name) != getattr(written, f.name)]
    assert set(differing) <= {"inference_mode", "base_model_name_or_path"}
    assert read.base_model_name_or_path == str(place.root / "base")


def test_a_config_is_saved_before_it_is_composed(place: Place, tmp_path: Path) -> None:
    for options in ROUTERS.values():
        config = RoutedLoraConfig(experts=place.experts, **options)
        config.save_pretrained(str(tmp_path))
        read = PeftConfig.from_pretrained(tmp_path)
        assert read == config
        assert list(read.experts) == list(NAMES)
        assert not read.is_composed


def test_experts_keep_what_their_own_configs_say(saved: dict[str, Saved]) -> None:
    for config in PeftConfig.from_pretrained(saved["linear"].path).experts.values():
        assert config["peft_type"] == "LORA"
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]


def lines(card: Path) -> list[str]:
    return card.read_text(encoding="utf-8").splitlines()


def test_the_card_says_how_to_load_once(place: Place, tmp_path: Path) -> None:
    model = place.compose("linear")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert lines(tmp_path / "README.md").count("from peft import PeftModel") == 1
    place.load(tmp_path).save_pretrained(tmp_path)
    assert lines(tmp_path / "README.md").count("from peft import PeftModel") == 1
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_the_card_of_a_named_adapter_says_how_to_load(
    place: Place, saved: dict[str, Saved], tmp_path: Path
) -> None:
    place.load(saved["linear"].path, adapter_name="other").save_pretrained(tmp_path)
    assert lines(tmp_path / "README.md").count("from peft import PeftModel") == 1


def test_the_card_lists_the_experts_that_are_there(place: Place, tmp_path: Path) -> None:
    model = place.compose("linear", ("math", "code"))
    model.save_pretrained(tmp_path)
    assert "law" not in (tmp_path / "README.md").read_text()
    model.add_expert("law", place.experts["law"])
    model.save_pretrained(tmp_path)
    assert "math, code, law" in (tmp_path / "README.md").read_text()
    assert lines(tmp_path / "README.md").count("from peft import PeftModel") == 1


def test_the_users_config_can_be_used_again(place: Place) -> None:
    config = RoutedLoraConfig(experts=place.experts, router="arrow")
    first = get_peft_model(place.base(), config)
    assert first.peft_config["default"] is config
    second = get_peft_model(place.base(), config)
    assert second.peft_config["default"] == config
    assert second.peft_config["default"] is not config  # which is the first model's
    assert torch.equal(logits(first), logits(second))
    assert not torch.equal(logits(first), logits(place.base()))
    first.unload()
    third = get_peft_model(place.base(), config)
    assert torch.equal(logits(third), logits(second))


@pytest.mark.parametrize("stated", [None, "CAUSAL_LM"])
def test_composing_and_loading_give_the_same_class(
    place: Place, tmp_path: Path, stated: str | None
) -> None:
    config = RoutedLoraConfig(experts=place.experts, router="arrow", task_type=stated)
    model = get_peft_model(place.base(), config)
    assert type(model) is PeftModelForCausalLM and config.task_type == "CAUSAL_LM"
    model.save_pretrained(tmp_path)
    assert type(place.load(tmp_path)) is PeftModelForCausalLM


def test_experts_without_a_common_task_leave_it_open(place: Place, tmp_path: Path) -> None:
    other = save_lora(tmp_path / "other", 7, task_type=None)
    experts = {**place.experts, "other": str(other)}
    model = get_peft_model(place.base(), RoutedLoraConfig(experts=experts, router="uniform"))
    assert type(model) is PeftModel and model.peft_config["default"].task_type is None
    model.save_pretrained(tmp_path / "routed")
    assert type(place.load(tmp_path / "routed")) is PeftModel


def test_a_configuration_is_made_without_reading_experts() -> None:
    experts = {"math": "nowhere/", "code": "./neither"}
    assert RoutedLoraConfig(experts=experts).task_type is None
    assert RoutedLoraConfig(experts=experts, task_type="SEQ_CLS").task_type == "SEQ_CLS"


def test_several_adapters_are_saved_each_on_its_own(
    place: Place, saved: dict[str, Saved], narrow: Saved, tmp_path: Path
) -> None:
    model = several(place, saved, narrow)
    model.save_pretrained(tmp_path)
    for name, path in {
        "default": tmp_path,
        "shared": tmp_path / "shared",
        "narrow": tmp_path / "narrow",
    }.items():
        assert torch.equal(logits(place.load(path)), expected(saved, narrow)[name])


# Several adapters on one model


def several(place: Place, saved: dict[str, Saved], narrow: Saved) -> Any:
    model = place.load(saved["linear"].path)
    model.load_adapter(saved["global"].path, "shared")
    model.load_adapter(narrow.path, "narrow")
    return model


def several_native(place: Place, saved: dict[str, Saved], narrow: Saved) -> Any:
    skip_without_native_adapters()
    model = place.base()
    model.load_adapter(str(saved["linear"].path))
    model.load_adapter(str(saved["global"].path), "shared")
    model.load_adapter(str(narrow.path), "narrow")
    return model


def expected(saved: dict[str, Saved], narrow: Saved) -> dict[str, Tensor]:
    return {
        "default": saved["linear"].logits,
        "shared": saved["global"].logits,
        "narrow": narrow.logits,
    }


@pytest.mark.parametrize("make", [several, several_native])
def test_each_adapter_is_what_it_is_alone(
    place: Place, saved: dict[str, Saved], narrow: Saved, make: Callable[..., Any]
) -> None:
    model = make(place, saved, narrow)
    for name in ("shared", "default", "narrow", "shared"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected(saved, narrow)[name])


def test_a_loaded_adapter_is_not_yet_active(
    place: Place, saved: dict[str, Saved], narrow: Saved
) -> None:
    assert torch.equal(logits(several(place, saved, narrow)), saved["linear"].logits)


@pytest.mark.parametrize("label", ROUTERS)
def test_disabled_is_the_base(place: Place, saved: dict[str, Saved], label: str) -> None:
    model, base = place.load(saved[label].path), place.base()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
        assert torch.equal(loss(model), loss(base))
    assert torch.equal(logits(model), saved[label].logits)


def test_disabled_is_the_base_natively(
    place: Place, saved: dict[str, Saved], narrow: Saved
) -> None:
    model = several_native(place, saved, narrow)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(place.base()))
    model.enable_adapters()
    model.set_adapter("narrow")
    assert torch.equal(logits(model), narrow.logits)


def test_an_inactive_adapter_leaves_the_loss_alone(place: Place, saved: dict[str, Saved]) -> None:
    model = place.load(saved["layer"].path)
    alone = loss(model)
    model.load_adapter(saved["linear-sequence"].path, "sequence")
    assert torch.equal(loss(model), alone)
    model.set_adapter("sequence")
    assert not torch.equal(loss(model), alone)


@pytest.mark.parametrize("make", [several, several_native])
def test_deleting_an_adapter_leaves_the_others(
    place: Place, saved: dict[str, Saved], narrow: Saved, make: Callable[..., Any]
) -> None:
    model = make(place, saved, narrow)
    model.set_adapter("narrow")
    for name in ("default", "shared"):
        model.delete_adapter(name)
        assert torch.equal(logits(model), narrow.logits)
    assert set(model.peft_config) == {"narrow"}
    assert not [name for name in model.state_dict() if ".default." in name or ".shared." in name]


def test_deleting_an_adapter_frees_its_memory(
    place: Place, saved: dict[str, Saved], narrow: Saved
) -> None:
    model = several(place, saved, narrow)
    model.set_adapter("default")
    loss(model)
    parts = []
    for name, module in model.named_modules():
        if name.endswith((".routed_lora_experts.default", ".routed_lora_router.default")):
            parts.append(weakref.ref(module))
    del module
    model.delete_adapter("default")
    gc.collect()
    assert parts and all(part() is None for part in parts)


@pytest.mark.parametrize("make", [several, several_native])
def test_deleting_the_active_adapter_activates_another(
    place: Place, saved: dict[str, Saved], narrow: Saved, make: Callable[..., Any]
) -> None:
    model = make(place, saved, narrow)
    model.set_adapter("default")
    model.delete_adapter("narrow")
    model.delete_adapter("default")
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    assert active == ["shared"]
    assert torch.equal(logits(model), saved["global"].logits)


def test_without_adapters_it_is_the_base(
    place: Place, saved: dict[str, Saved], narrow: Saved
) -> None:
    model = several(place, saved, narrow)
    for name in ("default", "shared", "narrow"):
        model.delete_adapter(name)
    assert torch.equal(logits(model.base_model.model), logits(place.base()))


def test_without_adapters_it_is_the_base_natively(
    place: Place, saved: dict[str, Saved], narrow: Saved
) -> None:
    model = several_native(place, saved, narrow)
    model.delete_adapter(["default", "shared", "narrow"])
    assert torch.equal(logits(model), logits(place.base()))
    model.load_adapter(str(narrow.path))
    assert torch.equal(logits(model), narrow.logits)


@pytest.mark.parametrize("first", ["global", "linear"])
@pytest.mark.parametrize("second", ["global", "arrow"])
def test_a_name_can_be_used_again(
    place: Place, saved: dict[str, Saved], narrow: Saved, first: str, second: str
) -> None:
    model = place.load(saved[first].path, adapter_name="kept")
    model.load_adapter(narrow.path, "again")
    model.delete_adapter("again")
    model.load_adapter(saved[second].path, "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), saved[second].logits)
    model.set_adapter("kept")
    assert torch.equal(logits(model), saved[first].logits)


def test_an_adapter_composed_beside_another(place: Place, saved: dict[str, Saved]) -> None:
    model = place.load(saved["global"].path)
    model.add_adapter("arrow", RoutedLoraConfig(experts=place.experts, **ROUTERS["arrow"]))
    assert torch.equal(logits(model), saved["global"].logits)
    model.set_adapter("arrow")
    assert torch.equal(logits(model), logits(place.compose("arrow")))


def test_an_adapter_named_0_beside_another(
    place: Place, saved: dict[str, Saved], narrow: Saved
) -> None:
    model = place.load(saved["linear"].path)
    model.load_adapter(narrow.path, "0")
    for name, alone in {"0": narrow.logits, "default": saved["linear"].logits}.items():
        model.set_adapter(name)
        assert torch.equal(logits(model), alone)
    model.delete_adapter("0")
    assert torch.equal(logits(model), saved["linear"].logits)


def test_an_ordinary_lora_beside_it_natively(place: Place, saved: dict[str, Saved]) -> None:
    skip_without_native_adapters()
    plain = save_lora(place.root / "plain", 9, target_modules=["k_proj", "q_proj"])
    model = native(place, saved["linear"].path)
    model.load_adapter(str(plain), "plain")
    model.set_adapter("plain")
    alone = place.base()
    alone.load_adapter(str(plain))
    assert torch.equal(logits(model), logits(alone))
    model.set_adapter("default")
    assert torch.equal(logits(model), saved["linear"].logits)


def test_native_adapters_are_composed_and_saved(place: Place, tmp_path: Path) -> None:
    skip_without_native_adapters()
    model = place.base()
    for label in ("global", "linear"):
        model.add_adapter(RoutedLoraConfig(experts=place.experts, **ROUTERS[label]), label)
    learn(model)
    for label in ("global", "linear"):
        model.set_adapter(label)
        model.save_pretrained(tmp_path / label)
        assert torch.equal(logits(place.load(tmp_path / label)), logits(model))


# Dtypes


@pytest.fixture(scope="module")
def in_dtype(place: Place) -> dict[torch.dtype, dict[str, str]]:
    root = place.root / "bfloat16"
    halves = {
        name: as_dtype(path, root / name, torch.bfloat16) for name, path in place.experts.items()
    }
    return {torch.float32: place.experts, torch.bfloat16: halves}


def dtypes(model: Any) -> dict[str, set[torch.dtype]]:
    found: dict[str, set[torch.dtype]] = {"experts": set(), "router": set(), "base": set()}
    for name, parameter in model.named_parameters():
        part = next(
            (part for part in ("experts", "router") if f"routed_lora_{part}" in name), "base"
        )
        found[part].add(parameter.dtype)
    return found


@pytest.mark.parametrize("of_base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_experts", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_kept_in_float32(
    place: Place,
    in_dtype: dict[torch.dtype, dict[str, str]],
    of_base: torch.dtype,
    of_experts: torch.dtype,
    tmp_path: Path,
) -> None:
    wanted = {"experts": {torch.float32}, "router": {torch.float32}, "base": {of_base}}
    make_base(dtype=of_base).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=of_base).eval()

    config = RoutedLoraConfig(experts=in_dtype[of_experts], router="linear")
    model = learn(get_peft_model(base(), config))
    assert dtypes(model) == wanted
    model.save_pretrained(tmp_path / "routed")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "routed").values()} == {
        torch.float32
    }
    loaded = [
        PeftModel.from_pretrained(base(), tmp_path / "routed", low_cpu_mem_usage=low)
        for low in (False, True)
    ]
    loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path / "routed", dtype=of_base))
    loaded.append(base())
    loaded[-1].load_adapter(str(tmp_path / "routed"))
    for other in loaded:
        assert dtypes(other) == wanted
        assert logits(other).dtype == of_base
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_without_autocast_an_adapter_has_the_dtype_of_its_base(
    place: Place, half: torch.dtype, low: bool, tmp_path: Path
) -> None:
    config = RoutedLoraConfig(experts=place.experts, router="linear")
    model = get_peft_model(make_base(dtype=half), config, autocast_adapter_dtype=False)
    wanted = {"experts": {half}, "router": {half}, "base": {half}}
    assert dtypes(learn(model)) == wanted
    model.save_pretrained(tmp_path / "routed")
    loaded = PeftModel.from_pretrained(
        make_base(dtype=half),
        tmp_path / "routed",
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=low,
    )
    assert dtypes(loaded) == wanted
    assert torch.equal(logits(loaded), logits(model))


def test_a_stated_dtype_is_kept(place: Place, tmp_path: Path) -> None:
    config = RoutedLoraConfig(experts=place.experts, router="linear", expert_dtype="bfloat16")
    model = learn(get_peft_model(make_base(dtype=torch.bfloat16), config))
    wanted = {"experts": {torch.bfloat16}, "router": {torch.float32}, "base": {torch.bfloat16}}
    assert dtypes(model) == wanted
    model.save_pretrained(tmp_path / "routed")
    loaded = PeftModel.from_pretrained(make_base(dtype=torch.bfloat16), tmp_path / "routed")
    assert dtypes(loaded) == wanted
    assert torch.equal(logits(loaded), logits(model))


# Copies


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("label", ROUTERS)
def test_copies_are_equal_and_independent(
    place: Place, saved: dict[str, Saved], label: str, load: str, duplicate: Callable[[Any], Any]
) -> None:
    model = WAYS[load](place, saved[label].path)
    other = duplicate(model)
    assert torch.equal(logits(other), saved[label].logits)
    learn(other, seed=3)
    assert torch.equal(logits(other), saved[label].logits) == (label not in LEARNED)
    assert torch.equal(logits(other), logits(learn(WAYS[load](place, saved[label].path), seed=3)))
    assert torch.equal(logits(model), saved[label].logits)


@pytest.mark.parametrize("label", ["global", "linear-sequence"])
def test_a_copy_is_unloaded_alone(place: Place, saved: dict[str, Saved], label: str) -> None:
    model = place.load(saved[label].path)
    bare = copy.deepcopy(model).unload()
    assert torch.equal(logits(bare), logits(place.base()))
    assert torch.equal(logits(model), saved[label].logits)


def test_a_copy_is_saved_with_its_own_router(
    place: Place, saved: dict[str, Saved], tmp_path: Path
) -> None:
    other = learn(copy.deepcopy(place.load(saved["global"].path)), seed=3)
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(place.load(tmp_path)), logits(other))


# Adding and removing experts


def joining(label: str) -> dict[str, Any]:
    """What `add_expert` needs for law."""
    needs: dict[str, dict[str, Any]] = {
        "fixed": {"weight": WEIGHTS["law"]},
        "fixed-list": {"weight": 0.9},
        "hierarchical": {"cluster": "b"},
    }
    return needs.get(label, {})


def reloaded(place: Place, model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    return place.load(path)


def pair(place: Place, label: str, **options: Any) -> Any:
    """Of math and code."""
    changes: dict[str, Any] = {"weights": [0.1, 0.2]} if label == "fixed-list" else {}
    return place.compose(label, ("math", "code"), **changes, **options)


DETERMINED = [
    label for label in ROUTERS if label != "mlp"
]  # with hidden layers it starts at random


@pytest.mark.parametrize("label", DETERMINED)
def test_adding_is_composing_all_at_once(place: Place, label: str, tmp_path: Path) -> None:
    model = reloaded(place, pair(place, label), tmp_path)
    model.add_expert("law", place.experts["law"], **joining(label))
    at_once = logits(place.compose(label))
    torch.testing.assert_close(logits(model), at_once, atol=1e-6, rtol=0)
    if label != "linear":  # of equal scores, its two largest are the first two
        assert (logits(pair(place, label)) - at_once).abs().max() > 1e-3
    assert model.peft_config["default"].names == ["math", "code", "law"]


@pytest.mark.parametrize("gone", NAMES)
@pytest.mark.parametrize("label", [label for label in DETERMINED if label != "fixed-list"])
def test_removing_is_composing_without(place: Place, label: str, gone: str, tmp_path: Path) -> None:
    model = reloaded(place, place.compose(label), tmp_path)
    model.remove_expert(gone)
    left = tuple(name for name in NAMES if name != gone)
    torch.testing.assert_close(logits(model), logits(place.compose(label, left)), atol=1e-6, rtol=0)
    assert model.peft_config["default"].names == list(left)


@pytest.mark.parametrize("label", ROUTERS)
def test_adding_leaves_the_others_bit_equal(place: Place, label: str, tmp_path: Path) -> None:
    model = reloaded(place, pair(place, label, learned=True), tmp_path / "pair")
    of_experts, learned = factors(model), rows(model)
    model.add_expert("law", place.experts["law"], **joining(label))
    after, learned_after = factors(model), rows(model)
    assert after.keys() - of_experts.keys() == {(layer.key, "law") for layer in layers(model)}
    for key, (a, b) in of_experts.items():
        assert torch.equal(after[key][0], a) and torch.equal(after[key][1], b)
    assert same({key: learned_after[key] for key in learned}, learned)
    for name, tensor in load_file(Path(place.experts["law"]) / "adapter_model.safetensors").items():
        module, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        assert torch.equal(after[module, "law"][factor == "lora_B"], tensor)
    assert torch.equal(logits(reloaded(place, model, tmp_path / "three")), logits(model))


@pytest.mark.parametrize("label", ROUTERS)
def test_removing_leaves_the_others_bit_equal(
    place: Place, saved: dict[str, Saved], label: str, tmp_path: Path
) -> None:
    model, gone = place.load(saved[label].path), NAMES[list(ROUTERS).index(label) % 3]
    of_experts, learned = factors(model), rows(model)
    model.remove_expert(gone)
    after, learned_after = factors(model), rows(model)
    assert after.keys() == {key for key in of_experts if key[1] != gone}
    for key, (a, b) in after.items():
        assert torch.equal(a, of_experts[key][0]) and torch.equal(b, of_experts[key][1])
    assert learned_after.keys() <= learned.keys()
    assert same(learned_after, {key: learned[key] for key in learned_after})
    assert {name for _, _, name in learned_after} <= {*NAMES, "a", "b", ""} - {gone}
    assert torch.equal(logits(reloaded(place, model, tmp_path)), logits(model))


@pytest.mark.parametrize("label", ROUTERS)
def test_adding_and_removing_is_nothing(place: Place, label: str) -> None:
    model = pair(place, label, learned=True)
    before = logits(model)
    model.add_expert("law", place.experts["law"], **joining(label))
    assert not torch.equal(logits(model), before)
    model.remove_expert("law")
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def odd(place: Place) -> str:
    """An expert with another rank, and with other targets."""
    return str(save_lora(place.root / "odd", 8, r=2, target_modules=["q_proj", "k_proj"]))


def test_experts_of_other_ranks_and_targets_join(place: Place, odd: str, tmp_path: Path) -> None:
    model = reloaded(place, place.compose("linear-full"), tmp_path / "three")
    model.add_expert("odd", odd)
    experts = {**place.experts, "odd": odd}
    at_once = get_peft_model(
        place.base(), RoutedLoraConfig(experts=experts, router="linear", mixing="full")
    )
    torch.testing.assert_close(logits(model), logits(at_once), atol=1e-6, rtol=0)
    learn(model)
    assert torch.equal(logits(reloaded(place, model, tmp_path / "four")), logits(model))
    model.remove_expert("odd")
    again = reloaded(place, model, tmp_path / "three again")
    assert torch.equal(logits(again), logits(model))
    assert not [name for name in read_tensors(tmp_path / "three again") if "k_proj" in name]


def test_a_module_that_one_expert_brought_goes_with_it(place: Place, odd: str) -> None:
    model = place.compose("linear-full", learned=True)
    before = logits(model)
    model.add_expert("odd", odd)
    model.remove_expert("odd")
    assert torch.equal(logits(model), before)


def unchanged(model: Any, change: Callable[[], Any], error: Any, match: str) -> None:
    """The change is refused, and leaves the model as it was."""
    config, state, before = model.peft_config["default"], snapshot(model), logits(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=match):
        change()
    assert model.peft_config["default"] is config
    assert same(snapshot(model), state)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(logits(model), before)


def test_stated_low_rank_mixing_refuses_another_rank(
    place: Place, odd: str, tmp_path: Path
) -> None:
    model = reloaded(place, place.compose("linear", mixing="low_rank", learned=True), tmp_path)
    unchanged(model, lambda: model.add_expert("odd", odd), ValueError, "low_rank.*law 4, odd 0")


@pytest.mark.parametrize("newcomer", ["odd", "stranger"])
def test_low_rank_by_default_falls_back_to_full(
    place: Place, odd: str, newcomer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The trained router stays, also after the adapter was saved: by hand, the same rows in an
    adapter that was composed with full mixing.
    """
    paths = {"odd": odd, "stranger": str(save_lora(tmp_path / "stranger", 8))}
    model = reloaded(place, place.compose("linear", learned=True), tmp_path / "three")
    assert model.peft_config["default"].mixing == "low_rank"
    learned = rows(model)
    with caplog.at_level(logging.WARNING, logger="peft_routing"):
        model.add_expert("new", paths[newcomer])
    assert ["mixing is now full, and was low_rank" in line for line in caplog.messages] == [True]
    by_hand = place.compose("linear-full", top_k=2)
    with torch.no_grad():
        for layer in layers(by_hand):
            for expert, row in zip(NAMES, layer.router_of("default").weight, strict=True):
                row.copy_(learned[layer.key, "weight", expert])
    by_hand.add_expert("new", paths[newcomer])
    assert torch.equal(logits(model), logits(by_hand))
    again = reloaded(place, model, tmp_path / "four")
    assert torch.equal(logits(again), logits(model))
    again.remove_expert("new")
    assert again.peft_config["default"].mixing == "full"


def test_the_last_expert_stays(place: Place, saved: dict[str, Saved]) -> None:
    model = place.load(saved["layer"].path)
    model.remove_expert("math")
    model.remove_expert("law")
    unchanged(model, lambda: model.remove_expert("code"), ValueError, "needs experts")


REFUSED: dict[str, tuple[str, Callable[[Any, Place], Any], Any, str]] = {
    "no weight": (
        "fixed",
        lambda m, p: m.add_expert("new", p.experts["law"]),
        ValueError,
        "weight=",
    ),
    "no cluster": (
        "hierarchical",
        lambda m, p: m.add_expert("new", p.experts["law"]),
        ValueError,
        "cluster=",
    ),
    "a weight": (
        "linear",
        lambda m, p: m.add_expert("new", p.experts["law"], weight=0.5),
        ValueError,
        "weight",
    ),
    "a cluster": (
        "linear",
        lambda m, p: m.add_expert("new", p.experts["law"], cluster="a"),
        ValueError,
        "cluster",
    ),
    "no number": (
        "fixed",
        lambda m, p: m.add_expert("new", p.experts["law"], weight=float("nan")),
        ValueError,
        "finite",
    ),
    "a name twice": (
        "linear",
        lambda m, p: m.add_expert("law", p.experts["law"]),
        ValueError,
        "'law' already",
    ),
    "nothing there": (
        "linear",
        lambda m, p: m.add_expert("new", "/nowhere"),
        FileNotFoundError,
        "'new'.*/nowhere",
    ),
    "no such expert": (
        "linear",
        lambda m, p: m.remove_expert("new"),
        ValueError,
        "'new'.*math, code, law",
    ),
    "no such adapter": (
        "linear",
        lambda m, p: m.remove_expert("law", "second"),
        (KeyError, ValueError),
        "second",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_change_changes_nothing(place: Place, saved: dict[str, Saved], case: str) -> None:
    label, change, error, match = REFUSED[case]
    model = place.load(saved[label].path)
    unchanged(model, lambda: change(model, place), error, match)


def test_too_few_experts_for_top_k_are_refused(place: Place, saved: dict[str, Saved]) -> None:
    model = place.load(saved["linear"].path)
    model.remove_expert("math")
    unchanged(model, lambda: model.remove_expert("law"), ValueError, "top_k=2")


def test_experts_join_the_adapter_that_is_named(
    place: Place, saved: dict[str, Saved], narrow: Saved
) -> None:
    model = several(place, saved, narrow)
    model.remove_expert("math", "shared")
    model.add_expert("bio", place.experts["math"], adapter_name="shared")
    for name in ("default", "narrow"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected(saved, narrow)[name])
    model.set_adapter("shared")
    alone = place.load(saved["global"].path)
    alone.remove_expert("math")
    alone.add_expert("bio", place.experts["math"])
    assert torch.equal(logits(model), logits(alone))
    assert model.peft_config["shared"].names == ["code", "law", "bio"]


# The Hub


def test_what_is_pushed_loads(
    place: Place, saved: dict[str, Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Url(str):
        repo_id = "someone/routed"

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> Url:
        assert repo_id == "someone/routed"
        return Url("https://huggingface.co/someone/routed")

    def create_commit(self: HfApi, repo_id: str, operations: Any, **kwargs: Any) -> None:
        for operation in operations:
            target = tmp_path / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    def no_card(*args: Any, **kwargs: Any) -> None:
        raise EntryNotFoundError("there is no README.md yet")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model = place.load(saved["global"].path)
    with monkeypatch.context() as without_card:
        without_card.setattr("transformers.utils.hub.ModelCard.load", no_card)
        model.push_to_hub("someone/routed")
    pushed = tmp_path / "someone" / "routed"
    assert {path.name for path in pushed.iterdir()} == FILES
    assert torch.equal(logits(place.load(pushed)), saved["global"].logits)


# Gradients and status


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_router(model: Any, adapter: str = "default") -> set[str]:
    return {
        name for name, _ in model.named_parameters() if f"routed_lora_router.{adapter}." in name
    }


@pytest.mark.parametrize("label", LEARNED)
def test_only_the_router_is_trained(place: Place, saved: dict[str, Saved], label: str) -> None:
    for model in (place.compose(label), place.load(saved[label].path, is_trainable=True)):
        assert trained(model) == of_router(model) != set()
        model.add_expert("more", place.experts["law"], **joining(label))
        assert trained(model) == of_router(model) != set()
    model = place.load(saved[label].path)
    assert trained(model) == set()
    model.add_expert("more", place.experts["law"], **joining(label))
    assert trained(model) == set()


@pytest.mark.parametrize("label", LEARNED)
def test_the_active_router_alone_is_trained(
    place: Place, saved: dict[str, Saved], label: str
) -> None:
    model = place.load(saved["layer"].path, is_trainable=True)
    model.load_adapter(saved[label].path, "second", is_trainable=True)
    model.set_adapter("second")
    assert trained(model) == of_router(model, "second") != set()
    model.set_adapter("default")
    assert trained(model) == of_router(model, "default") != set()
    model.set_adapter("second", inference_mode=True)
    assert trained(model) == set()


@pytest.mark.parametrize("label", ROUTERS)
def test_status_and_counts(place: Place, label: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = place.compose(label)
    status = model.get_model_status()
    counted = sum(p.numel() for name, p in model.named_parameters() if "routed_lora_router" in name)
    assert status.peft_types == {"default": "ROUTED_LORA"}
    assert status.num_adapter_layers == 9
    assert status.enabled is True
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.trainable_params == counted
    assert (counted > 0) == (label in LEARNED)
    model.print_trainable_parameters()
    assert f"trainable params: {counted:,d} ||" in capsys.readouterr().out


# Mixed batches and unloading


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
def test_adapter_names_are_refused(place: Place, saved: dict[str, Saved], way: str) -> None:
    model = WAYS[way](place, saved["linear"].path)
    with pytest.raises(ValueError, match="adapter_names"):
        model(IDS, adapter_names=["default", "__base__"])
    assert torch.equal(logits(model), saved["linear"].logits)
    with pytest.raises(ValueError, match="adapter_names"):
        place.load(saved["linear"].path).generate(IDS, adapter_names=["default", "__base__"])


def hooks(model: Any) -> Iterator[Any]:
    for module in model.modules():
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()


@pytest.mark.parametrize("label", ROUTERS)
def test_unloading_leaves_nothing_of_ours(
    place: Place, saved: dict[str, Saved], label: str
) -> None:
    model = place.load(saved[label].path)
    model.load_adapter(saved["global"].path, "second")
    bare = model.unload()
    base = place.base()
    assert [(name, type(module)) for name, module in bare.named_modules()] == [
        (name, type(module)) for name, module in base.named_modules()
    ]
    assert list(hooks(bare)) == []
    assert not hasattr(bare, "peft_config")
    assert torch.equal(logits(bare), logits(base))
    assert torch.equal(loss(bare), loss(base))
    again = learn(get_peft_model(bare, RoutedLoraConfig(experts=place.experts, **ROUTERS[label])))
    assert torch.equal(logits(again), saved[label].logits)


def test_saving_is_whole_or_not_at_all(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = place.compose("linear")
    expected = logits(model)

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("peft.peft_model.safe_save_file", stopped)
        peft_routing.save(model, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    peft_routing.save(model, str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert torch.equal(logits(place.load(tmp_path / "out")), expected)
    with pytest.raises(peft_routing.UserError, match="not empty and nothing in it is overwritten"):
        peft_routing.save(model, str(tmp_path / "out"))


def test_the_card_has_names_escaped_and_no_path(place: Place, tmp_path: Path) -> None:
    name = "a`b|<i>*"
    experts = {name: place.experts["math"], "code": place.experts["code"]}
    model = get_peft_model(place.base(), RoutedLoraConfig(experts=experts, router="uniform"))
    model.get_base_model().config._name_or_path = str(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "(a\\`b\\|\\<i\\>\\*, code)" in card
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    model.get_base_model().config._name_or_path = "owner/base"
    model.save_pretrained(tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "owner/base"


@pytest.mark.parametrize("name", ["A", "B", "weight", "routed_lora_experts"])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_adapter_beside_others_is_not_called_like_their_tensors(
    tmp_path: Path, name: str, is_first: bool
) -> None:
    """PEFT tells by any part of a key whose it is, and leaves out those of other adapters."""
    experts = save_experts(tmp_path)
    names = (name, "other") if is_first else ("other", name)
    config = RoutedLoraConfig(experts=experts, router="linear")
    model = get_peft_model(make_base(), config, adapter_name=names[0])
    with pytest.raises(UserError, match=f"an adapter beside others cannot be called '{name}'"):
        model.add_adapter(names[1], RoutedLoraConfig(experts=experts))
    model.save_pretrained(str(tmp_path / "saved"))
    place = tmp_path / "saved" if names[0] == "default" else tmp_path / "saved" / names[0]
    loaded = PeftModel.from_pretrained(make_base(), place)
    ids = torch.arange(2, 10)[None]
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
