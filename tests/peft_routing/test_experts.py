"""Which adapters, options and models can be routed, and what is said of those that cannot."""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from peft_routing import RoutedLoraConfig
from tests.peft_routing.adapters import (
    has_native_adapters,
    make_base,
    save_experts,
    save_lora,
    skip_without_native_adapters,
)

IDS = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(7))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def state(model: Any) -> dict[str, Any]:
    """Everything that composing could change, and the logits."""
    hooks: list[Any] = []
    for module in model.modules():
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": hooks,
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "configs": dict(getattr(model, "peft_config", {})),
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "logits": logits(model),
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for part in ("modules", "hooks", "trained", "configs"):
        assert first[part] == second[part], part
    assert first["tensors"].keys() == second["tensors"].keys()
    assert all(
        torch.equal(first["tensors"][name], second["tensors"][name]) for name in first["tensors"]
    )
    assert torch.equal(first["logits"], second["logits"])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(tmp_path_factory.mktemp("good"), ("math", "code"))


# Adapters that cannot be routed


def edited(path: Path, **values: Any) -> Path:
    """An adapter whose configuration says something else."""
    save_lora(path, 5)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return path


def reweighted(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """An adapter whose weights were changed."""
    save_lora(path, 5)
    save_file(
        change(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors"
    )
    return path


def overwritten(path: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    save_lora(path, 5)
    (path / name).write_bytes(change((path / name).read_bytes()))
    return path


def without(path: Path, name: str) -> Path:
    save_lora(path, 5)
    (path / name).unlink()
    return path


def ia3(path: Path) -> Path:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(make_base(), config).save_pretrained(path)
    return path


def routed(path: Path) -> Path:
    config = RoutedLoraConfig(
        experts=save_experts(path / "experts", ("math", "code")), router="layer"
    )
    get_peft_model(make_base(), config).save_pretrained(path / "routed")
    return path / "routed"


def narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[:, :3].contiguous() if "lora_B" in name else t for name, t in tensors.items()}


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("0.self_attn.q_proj.lora_B.weight")
    }


def on_the_embedding(path: Path) -> Path:
    edited(path, target_modules=["embed_tokens", "q_proj", "v_proj", "down_proj"])
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name in list(tensors):
        moved = name.replace("layers.0.self_attn.q_proj", "embed_tokens")
        tensors[moved] = tensors.pop(name)
    save_file(tensors, weights)
    return path


def convolutional(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[..., None, None] for name, tensor in tensors.items()}


WEIGHTS_FILE = "adapter_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "DoRA": (
        lambda path: save_lora(path, 5, use_dora=True),
        ValueError,
        "use_dora.*norm of the merged weight",
    ),
    "bias": (
        lambda path: save_lora(path, 5, bias="all"),
        ValueError,
        "bias is 'all'; biases are not routed",
    ),
    "modules_to_save": (
        lambda path: save_lora(path, 5, modules_to_save=["lm_head"]),
        ValueError,
        "modules_to_save is .*lm_head.*heads are not mixed",
    ),
    "embeddings": (
        lambda path: save_lora(path, 5, target_modules=["q_proj", "embed_tokens"]),
        ValueError,
        "embed_tokens.*embeddings have no hidden state",
    ),
    "target_parameters": (
        lambda path: save_lora(path, 5, target_parameters=["self_attn.o_proj.weight"]),
        ValueError,
        "target_parameters is .*o_proj.*parameters, not of linear modules",
    ),
    "trainable tokens": (
        lambda path: save_lora(path, 5, trainable_token_indices=[3, 4]),
        ValueError,
        "trainable_token_indices is .*embeddings",
    ),
    "layer replication": (
        lambda path: edited(path, layer_replication=[[0, 2], [1, 3]]),
        ValueError,
        "layer_replication is .*not those of the base model",
    ),
    "pissa": (
        lambda path: edited(path, init_lora_weights="pissa"),
        ValueError,
        "'pissa', which changes the base",
    ),
    "pissa by iterations": (
        lambda path: edited(path, init_lora_weights="pissa_niter_4"),
        ValueError,
        "'pissa_niter_4', which changes the base",
    ),
    "IA3": (ia3, ValueError, "peft_type is IA3; only LORA"),
    "a routed adapter": (routed, ValueError, "peft_type is ROUTED_LORA; only LORA"),
    "no config": (
        lambda path: without(path, "adapter_config.json"),
        FileNotFoundError,
        "has no adapter_config.json",
    ),
    "no weights": (
        lambda path: without(path, WEIGHTS_FILE),
        FileNotFoundError,
        "has no adapter_model.safetensors$",
    ),
    "no directory": (lambda path: path, FileNotFoundError, "no such directory"),
    "no repository": (
        lambda path: "someone/odd-lora",
        FileNotFoundError,
        "no such directory.*on the Hub",
    ),
    "cut short": (
        lambda path: overwritten(path, WEIGHTS_FILE, lambda old: old[:-100]),
        ValueError,
        "damaged",
    ),
    "garbage": (
        lambda path: overwritten(path, WEIGHTS_FILE, lambda old: b"\xff" * 100),
        ValueError,
        "damaged",
    ),
    "an empty file": (
        lambda path: overwritten(path, WEIGHTS_FILE, lambda old: b""),
        ValueError,
        "is empty",
    ),
    "a damaged config": (
        lambda path: overwritten(path, "adapter_config.json", lambda old: old[:-30]),
        ValueError,
        "adapter_config.json",
    ),
    "no tensors": (
        lambda path: reweighted(path, lambda tensors: {}),
        ValueError,
        "holds no LoRA factors",
    ),
    "half a pair": (
        lambda path: reweighted(path, half),
        ValueError,
        "layers.0.self_attn.q_proj has lora_A but not the other",
    ),
    "A and B differ": (
        lambda path: reweighted(path, narrower),
        ValueError,
        r"A is \(4, .*B is \(.*, 3\)",
    ),
    "a convolution": (
        lambda path: reweighted(path, convolutional),
        ValueError,
        "4 dimensions; only linear",
    ),
    "on the embedding": (
        on_the_embedding,
        ValueError,
        "embed_tokens is an? Embedding; only linear",
    ),
    "another rank": (
        lambda path: edited(path, r=8),
        ValueError,
        "has rank 4, and adapter_config.json says 8",
    ),
    "another rank by pattern": (
        lambda path: edited(path, rank_pattern={"v_proj": 2}),
        ValueError,
        "v_proj has rank 4, and adapter_config.json says 2",
    ),
    "another size": (
        lambda path: save_lora(path, 5, base=make_base(hidden_size=64)),
        ValueError,
        r"odd\) does not fit the base model: .* maps 48 to 64, and 48 to 32 in the base",
    ),
    "another depth": (
        lambda path: save_lora(path, 5, base=make_base(num_hidden_layers=4)),
        ValueError,
        r"does not fit the base model: .*layers\.3\..* is not in the base model",
    ),
    "another family": (
        lambda path: save_lora(path, 5, base=make_base("gpt2"), target_modules=["c_attn"]),
        ValueError,
        "c_attn is not in the base model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_routed(good: dict[str, str], case: str, tmp_path: Path) -> None:
    make, error, reason = BROKEN[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = str(make(tmp_path / "odd"))

    base = make_base()
    before = state(base)
    config = RoutedLoraConfig(experts={**good, "odd": odd}, router="layer")
    with pytest.raises(error, match=f"'odd'.*{reason}"):
        get_peft_model(base, config)
    assert_same(state(base), before)

    model = get_peft_model(base, RoutedLoraConfig(experts=good, router="layer"))
    reference = get_peft_model(make_base(), RoutedLoraConfig(experts=good, router="layer"))
    assert torch.equal(logits(model), logits(reference))
    assert not torch.equal(logits(model), before["logits"])

    working = state(model)
    with pytest.raises(error, match=f"'odd'.*{reason}"):
        model.add_adapter("second", RoutedLoraConfig(experts={**good, "odd": odd}, router="layer"))
    assert_same(state(model), working)
    with pytest.raises(error, match=f"'odd'.*{reason}"):
        model.add_expert("odd", odd)
    assert_same(state(model), working)

    model.add_adapter("second", RoutedLoraConfig(experts=good, router="uniform"))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(reference))


def test_an_adapter_for_another_model_is_refused(good: dict[str, str], tmp_path: Path) -> None:
    get_peft_model(make_base(), RoutedLoraConfig(experts=good, router="layer")).save_pretrained(
        tmp_path
    )
    base = make_base(num_hidden_layers=2)
    before = state(base)
    with pytest.raises(
        ValueError, match=r"another model: 3 of its 9 modules .* model\.layers\.2\."
    ):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same(state(base), before)


NAMED = "experts were trained on another"


def test_another_name_of_the_base_is_a_warning(tmp_path: Path) -> None:
    for name in ("here", "there"):
        make_base().save_pretrained(tmp_path / name)
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    experts = {
        name: str(save_lora(tmp_path / name, seed, base=AutoModelForCausalLM.from_pretrained(base)))
        for seed, (name, base) in enumerate({"math": here, "code": there}.items())
    }
    config = RoutedLoraConfig(experts=experts, router="uniform")
    with pytest.warns(
        UserWarning, match=f"{re.escape(here)}, but 1 of 2 {NAMED}: 'code' on {re.escape(there)}"
    ):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(here), config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NAMED}")
        unnamed = get_peft_model(make_base(), config)
        alone = RoutedLoraConfig(experts={"math": experts["math"]}, router="uniform")
        get_peft_model(AutoModelForCausalLM.from_pretrained(here), alone)
    assert torch.equal(logits(model), logits(unnamed))


@pytest.mark.parametrize("spelling", ["base", "./base", "base/", "../here/base", "~/base", None])
def test_one_base_has_many_names(
    spelling: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    make_base().save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base")
    trained_on = str(Path("base").resolve()) if spelling is None else spelling
    save_lora(Path("math"), 1, base=copy.deepcopy(base))
    config = json.loads(Path("math/adapter_config.json").read_text())
    config["base_model_name_or_path"] = trained_on
    Path("math/adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NAMED}")
        get_peft_model(base, RoutedLoraConfig(experts={"math": "math"}, router="uniform"))


# Where experts lie


def test_an_expert_on_the_hub(good: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {
        ("someone/math", None, None): good["math"],
        ("someone/loras", "v2/code", "a1b2c3"): good["code"],
    }

    def download(repository: str, name: str, subfolder: str | None, revision: str | None) -> str:
        return str(Path(stored[repository, subfolder, revision]) / name)

    monkeypatch.setattr("peft_routing.adapter_files.hf_hub_download", download)
    there = RoutedLoraConfig(
        experts={"math": "someone/math", "code": "someone/loras/v2/code@a1b2c3"}, router="arrow"
    )
    here = RoutedLoraConfig(experts=good, router="arrow")
    assert torch.equal(
        logits(get_peft_model(make_base(), there)), logits(get_peft_model(make_base(), here))
    )


def test_an_expert_at_home_or_here(good: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(good["math"]).parent
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.chdir(root)
    there = RoutedLoraConfig(experts={"math": "~/math", "code": "code"}, router="arrow")
    here = RoutedLoraConfig(experts=good, router="arrow")
    assert torch.equal(
        logits(get_peft_model(make_base(), there)), logits(get_peft_model(make_base(), here))
    )


def test_an_expert_that_transformers_saved(tmp_path: Path) -> None:
    skip_without_native_adapters()
    native = make_base()
    native.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape))
    native.save_pretrained(tmp_path)
    model = get_peft_model(
        make_base(), RoutedLoraConfig(experts={"native": str(tmp_path)}, router="layer")
    )
    torch.testing.assert_close(logits(model), logits(native.eval()), atol=1e-5, rtol=0)
    assert (logits(model) - logits(make_base())).abs().max() > 1e-2


# Options

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such router": (
        {"router": "arow"},
        "'arow'; there are arrow.*fixed.*global.*hierarchical.*layer.*linear.*mlp",
    ),
    "top_k above": ({"router": "arrow", "top_k": 3}, "top_k=3, but there are 2"),
    "top_k 0": ({"router": "arrow", "top_k": 0}, "top_k=0 is below 1"),
    "top_k below 0": ({"router": "linear", "top_k": -1}, "top_k=-1 is below 1"),
    "top_k of uniform": (
        {"router": "uniform", "top_k": 1},
        "top_k is not an option of router='uniform'.*arrow.*mlp",
    ),
    "weights of linear": (
        {"router": "linear", "weights": [0.5, 0.5]},
        "weights is not .*'linear'.* fixed",
    ),
    "clusters of arrow": (
        {"clusters": {"math": 0, "code": 1}},
        "clusters is not .*'arrow'.* hierarchical",
    ),
    "init of arrow": ({"init": "uniform"}, "init is not .*'arrow'.*hierarchical, linear"),
    "score of mlp": (
        {"router": "mlp", "score": "abs"},
        "score is not .*'mlp'.*hierarchical, linear",
    ),
    "layers of arrow": ({"mlp_layers": 1}, "mlp_layers is not .*'arrow'.* mlp"),
    "lambda of layer": (
        {"router": "layer", "init_lambda": 0.3},
        "init_lambda is not .*'layer'.* mlp",
    ),
    "temperature of mlp": (
        {"router": "mlp", "router_temperature": 2.0},
        "router_temperature is not .*'mlp'.*arrow",
    ),
    "arrow's rows and signs": (
        {"router": "linear", "init": "arrow", "score": "dot"},
        "init='arrow' is score='abs'",
    ),
    "no rows and no signs": (
        {"router": "linear", "score": "abs", "init": "uniform"},
        "score='abs' has no gradient",
    ),
    "the same in clusters": (
        {
            "router": "hierarchical",
            "clusters": {"math": 0, "code": 1},
            "init": "arrow",
            "score": "dot",
        },
        "init='arrow' is score='abs'",
    ),
    "no weights": ({"router": "fixed"}, "needs weights"),
    "a weight is missing": (
        {"router": "fixed", "weights": {"math": 1.0}},
        "for each of math, code",
    ),
    "too many weights": ({"router": "fixed", "weights": [1.0, 2.0, 3.0]}, "for each of math, code"),
    "a weight of no expert": (
        {"router": "fixed", "weights": {"math": 1.0, "code": 1.0, "law": 1.0}},
        "no expert 'law'; there are math, code",
    ),
    "an infinite weight": ({"router": "fixed", "weights": [1.0, float("inf")]}, "finite"),
    "no clusters": ({"router": "hierarchical"}, "needs clusters"),
    "a cluster is missing": (
        {"router": "hierarchical", "clusters": {"math": 0}},
        "clusters must name exactly the experts; 'code'",
    ),
    "a cluster of no expert": (
        {"router": "hierarchical", "clusters": {"math": 0, "code": 1, "law": 1}},
        "clusters must name exactly the experts; 'law'",
    ),
    "top_k above the clusters": (
        {"router": "hierarchical", "clusters": {"math": 0, "code": 0}, "top_k": 2},
        "top_k=2 counts clusters, and there are 1",
    ),
    "temperature 0": ({"router_temperature": 0.0}, "router_temperature=0.0 is not above 0"),
    "temperature below 0": ({"router_temperature": -1.0}, "router_temperature=-1.0 is not above 0"),
    "temperature NaN": ({"router_temperature": float("nan")}, "router_temperature=nan"),
    "granularity": (
        {"granularity": "tokens"},
        "granularity='tokens' is none of 'token', 'sequence'",
    ),
    "mixing": ({"mixing": "lowrank"}, "mixing='lowrank' is none of 'full', 'low_rank'"),
    "init": ({"router": "linear", "init": "zero"}, "init='zero' is none of 'uniform', 'arrow'"),
    "score": ({"router": "linear", "score": "cosine"}, "score='cosine' is none of 'dot', 'abs'"),
    "no prefix": ({"granularity": "sequence", "routing_tokens": 0}, "routing_tokens=0 is below 1"),
    "too many layers": ({"router": "mlp", "mlp_layers": 3}, "mlp_layers=3 is not 0, 1 or 2"),
    "balance of what is fixed": (
        {"router": "uniform", "router_aux_loss_coef": 0.1},
        "'uniform' has no load",
    ),
    "balance of what is free": (
        {"router": "mlp", "router_aux_loss_coef": 0.1},
        "'mlp' has no load",
    ),
    "balance below 0": ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
    "no experts": ({"experts": {}}, "needs experts"),
    "an empty list": ({"experts": []}, "needs experts"),
    "one directory": ({"experts": "math/"}, "experts='math/' is neither a dict .* nor a list"),
    "no experts at all": ({"experts": None}, "experts=None is neither"),
    "a number": ({"experts": 2}, "experts=2 is neither"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        RoutedLoraConfig(**{"experts": {"math": "math/", "code": "code/"}, **options})


RIGHT: dict[str, dict[str, Any]] = {
    "top_k of all": {"router": "arrow", "top_k": 2},
    "arrow's rows": {"router": "linear", "init": "arrow", "score": "abs"},
    "signs": {"router": "linear", "init": "uniform", "score": "dot"},
    "weights in another order": {"router": "fixed", "weights": {"code": -1.0, "math": 0.0}},
    "one cluster": {"router": "hierarchical", "clusters": {"code": "a", "math": "a"}, "top_k": 1},
    "no layers": {"router": "mlp", "mlp_layers": 0, "init_lambda": 0.0},
    "balance": {"router": "linear", "router_aux_loss_coef": 0.1},
}


@pytest.mark.parametrize("case", RIGHT)
def test_options_just_inside(good: dict[str, str], case: str) -> None:
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=good, **RIGHT[case]))
    assert logits(model).isfinite().all()


# Names

LISTS: dict[tuple[str, ...], list[str]] = {
    ("math", "code"): ["math", "code"],
    ("runs/math/", "/data/code"): ["math", "code"],
    ("runs/math/final", "runs/code/final"): ["math-final", "code-final"],
    ("me/lora", "you/lora"): ["me-lora", "you-lora"],
    ("a/x/last", "a/y/last", "b/x/last"): ["a-x-last", "a-y-last", "b-x-last"],
    ("math", "math"): ["math-0", "math-1"],
    ("./math", "../math"): ["math-0", "math-1"],
}


@pytest.mark.parametrize("paths", LISTS, ids=", ".join)
def test_a_list_is_named_by_its_directories(paths: tuple[str, ...]) -> None:
    config = RoutedLoraConfig(experts=list(paths), router="uniform")
    assert list(config.experts) == LISTS[paths]
    assert list(config.experts.values()) == list(paths)


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "a-b", ".", "..", "a-0"]), min_size=1).map("/".join),
        min_size=1,
    )
)
def test_no_expert_of_a_list_is_lost(paths: list[str]) -> None:
    assert list(RoutedLoraConfig(experts=paths, router="uniform").experts.values()) == paths


@pytest.mark.parametrize(
    "options",
    [
        {"router": "fixed", "weights": {1: 0.2, 2: 0.8}},
        {"router": "hierarchical", "clusters": {1: 0, 2: 1}},
    ],
    ids=["fixed", "hierarchical"],
)
def test_experts_can_be_numbered(good: dict[str, str], options: dict[str, Any]) -> None:
    numbered = RoutedLoraConfig(experts={1: good["math"], 2: good["code"]}, **options)
    named: dict[str, Any] = {
        name: {"math": of[1], "code": of[2]} if isinstance(of, dict) else of
        for name, of in options.items()
    }
    model = get_peft_model(make_base(), numbered)
    assert torch.equal(
        logits(model), logits(get_peft_model(make_base(), RoutedLoraConfig(experts=good, **named)))
    )


def test_a_list_of_directories_is_composed(good: dict[str, str]) -> None:
    as_list = RoutedLoraConfig(experts=[Path(path) for path in good.values()], router="arrow")
    as_dict = RoutedLoraConfig(experts=good, router="arrow")
    assert as_list.experts == as_dict.experts == good
    assert torch.equal(
        logits(get_peft_model(make_base(), as_list)), logits(get_peft_model(make_base(), as_dict))
    )


def test_a_list_keeps_its_order(good: dict[str, str]) -> None:
    config = RoutedLoraConfig(experts=list(good.values()), router="fixed", weights=[0.0, 1.0])
    alone = PeftModel.from_pretrained(make_base(), good["code"])
    assert (logits(get_peft_model(make_base(), config)) - logits(alone)).abs().max() < 1e-5
    assert (logits(alone) - logits(make_base())).abs().max() > 1e-2


# Models


@dataclass(frozen=True)
class Family:
    model: Any
    config: dict[str, Any]
    targets: list[str]
    inputs: dict[str, Tensor]
    adapted: int
    task_type: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def base(self) -> Any:
        torch.manual_seed(0)
        made = self.model.from_config(AutoConfig.for_model(**self.config, **self.options)).eval()
        with torch.no_grad():  # most families start their biases at 0 and their weights close to it
            for parameter in made.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        return made

    def output(self, model: Any) -> Tensor:
        with torch.no_grad():
            out = model(**self.inputs)
        return out.logits if "logits" in out else out.last_hidden_state


BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
PADDED = torch.ones_like(IDS).index_put((torch.tensor(1), torch.arange(6, 10)), torch.tensor(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
FAMILIES: dict[str, Family] = {
    "llama": Family(
        AutoModelForCausalLM,
        {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 96,
        },
        ["o_proj", "gate_proj"],
        {"input_ids": IDS},
        4,
        "CAUSAL_LM",
    ),
    "gpt2": Family(
        AutoModelForCausalLM,
        {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 96,
            "n_positions": 32,
        },
        ["c_attn", "mlp.c_proj"],
        {"input_ids": IDS},
        4,
        "CAUSAL_LM",
    ),
    "t5": Family(
        AutoModelForSeq2SeqLM,
        {
            "model_type": "t5",
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 96,
            "decoder_start_token_id": 0,
        },
        ["q", "v", "wo"],
        {"input_ids": IDS, "attention_mask": PADDED, "decoder_input_ids": IDS.flip(1)[:, :5]},
        16,
        "SEQ_2_SEQ_LM",
    ),
    "bert": Family(
        AutoModel,
        BERT,
        ["query", "attention.output.dense"],
        {"input_ids": IDS, "attention_mask": PADDED},
        4,
        "FEATURE_EXTRACTION",
    ),
    "bert classifier": Family(
        AutoModelForSequenceClassification,
        BERT,
        ["value", "intermediate.dense"],
        {"input_ids": IDS, "attention_mask": PADDED},
        4,
    ),
    "vit": Family(
        AutoModel,
        {
            "model_type": "vit",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        ["q_proj", "fc2"],
        {"pixel_values": PIXELS},
        4,
    ),
}


@pytest.fixture(scope="module")
def of_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Three experts per family, with ranks, scalings and targets of their own."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for name, family in FAMILIES.items():
        first, *others = family.targets
        kinds: dict[str, dict[str, Any]] = {
            "plain": {},
            "rooted": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": [first]},
            "patterned": {"rank_pattern": {others[-1]: 3}, "alpha_pattern": {first: 5}},
        }
        found[name] = {
            kind: str(
                save_lora(
                    root / name / kind,
                    seed,
                    base=family.base(),
                    **{"target_modules": family.targets, "task_type": family.task_type, **config},
                )
            )
            for seed, (kind, config) in enumerate(kinds.items(), 1)
        }
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_uniform_adds_the_mean_of_the_updates(
    of_family: dict[str, dict[str, str]], name: str
) -> None:
    family, experts = FAMILIES[name], of_family[name]
    expected = family.base()
    with torch.no_grad():
        for path in experts.values():
            for key, layer in (
                PeftModel.from_pretrained(family.base(), path).get_base_model().named_modules()
            ):
                if isinstance(layer, LoraLayer):
                    expected.get_submodule(key).weight += layer.get_delta_weight("default") / len(
                        experts
                    )
    model = get_peft_model(
        family.base(), RoutedLoraConfig(experts=experts, router="uniform", mixing="full")
    )
    assert model.get_model_status().num_adapter_layers == family.adapted
    torch.testing.assert_close(family.output(model), family.output(expected), atol=1e-5, rtol=1e-5)
    assert (family.output(expected) - family.output(family.base())).abs().max() > 1e-2
    torch.testing.assert_close(
        family.output(model.merge_and_unload()), family.output(expected), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"router": "arrow", "top_k": 2}, {"router": "mlp"}, {"router": "uniform"}], ids=str
)
def test_every_family_is_saved_and_loaded(
    of_family: dict[str, dict[str, str]], name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    family = FAMILIES[name]
    lent = tmp_path / "lent"
    shutil.copytree(Path(of_family[name]["plain"]).parent, lent)
    experts = {kind: str(lent / kind) for kind in of_family[name]}
    model = get_peft_model(family.base(), RoutedLoraConfig(experts=experts, **options)).eval()
    shutil.rmtree(lent)
    output = family.output(model)
    model.save_pretrained(tmp_path / "routed")
    ways = [PeftModel.from_pretrained(family.base(), tmp_path / "routed")]
    if has_native_adapters():
        ways.append(family.base())
        ways[-1].load_adapter(str(tmp_path / "routed"))
    for loaded in ways:
        assert torch.equal(family.output(loaded), output)
    assert (output - family.output(family.base())).abs().max() > 1e-2
    assert torch.equal(family.output(model.unload()), family.output(family.base()))


@pytest.mark.parametrize("name", ["bert", "bert classifier", "vit"])
def test_encoders_are_routed_by_the_whole_input(
    of_family: dict[str, dict[str, str]], name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    config = RoutedLoraConfig(
        experts=of_family[name], router="arrow", top_k=1, granularity="sequence", routing_tokens=1
    )
    model = get_peft_model(family.base(), config).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        family.output(PeftModel.from_pretrained(family.base(), tmp_path)), family.output(model)
    )
    per_token = get_peft_model(
        family.base(), RoutedLoraConfig(experts=of_family[name], router="arrow", top_k=1)
    )
    assert (family.output(model) - family.output(per_token.eval())).abs().max() > 1e-3


def test_a_classifier_head_is_not_routed(tmp_path: Path) -> None:
    family = FAMILIES["bert classifier"]
    path = save_lora(tmp_path, 5, base=family.base(), target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"'odd'.*modules_to_save is .*classifier"):
        get_peft_model(
            family.base(), RoutedLoraConfig(experts={"odd": str(path)}, router="uniform")
        )


def test_an_encoder_decoder_has_no_prefix(
    of_family: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    family = FAMILIES["t5"]
    options: dict[str, Any] = {"experts": of_family["t5"], "router": "arrow"}
    base = family.base()
    modules, output = list(base.named_modules()), family.output(base)
    config = RoutedLoraConfig(**options, granularity="sequence")
    with pytest.raises(ValueError, match=r"granularity='sequence'.*granularity='token'"):
        get_peft_model(base, config)
    assert list(base.named_modules()) == modules
    assert torch.equal(family.output(base), output)
    model = get_peft_model(base, RoutedLoraConfig(**options)).eval()
    routed = family.output(model)
    with pytest.raises(ValueError, match="granularity='sequence'"):
        model.add_adapter("second", config)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(family.output(model), routed)


@pytest.mark.parametrize("router", ["arrow", "uniform"])
def test_an_expert_in_float8_is_composed_with_others(tmp_path, router):
    """PyTorch promotes float8 to no other dtype."""
    experts = save_experts(tmp_path)
    for file in Path(experts["math"]).glob("*.safetensors"):
        rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
        save_file(rounded, file)
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=experts, router=router)).eval()
    ids = torch.arange(2, 12)[None]
    for index, path in enumerate(experts.values()):
        alone = PeftModel.from_pretrained(make_base(), path).eval()
        one_hot = torch.nn.functional.one_hot(torch.tensor([index]), 3).float()
        got = model(ids, coefficients=one_hot).logits
        torch.testing.assert_close(got, alone(ids).logits, atol=1e-5, rtol=1e-5)
