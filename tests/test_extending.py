"""The files that `docs/extending.md` shows, each used as the page says."""

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from peft_routing import RoutedLoraConfig, Router, UserError
from peft_routing.routers.base import _ROUTERS
from tests.conftest import document, make_model, merge, read_tensors, run
from tests.mergekit_moe_ext.mixtures.test_usage import make_moe
from tests.peft_routing.adapters import make_base, save_lora
from tests.test_autoload import ROOT

TOKENS = torch.arange(1, 41).reshape(2, 20) * 7 % 96
EXAMPLES = ("extending_router", "extending_family", "extending_method")


pytestmark = pytest.mark.usefixtures("examples")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_the_page_names_the_files_that_run_here() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    assert set(re.findall(r"examples/(extending_\w+)\.py", page)) == set(EXAMPLES)


# A router


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    return {
        name: str(save_lora(tmp_path / name, seed)) for seed, name in enumerate(("math", "code"))
    }


def route(experts: dict[str, str], **config: Any) -> Any:
    importlib.import_module("extending_router")
    config = {"router": "cosine", **config}
    return get_peft_model(make_base(), RoutedLoraConfig(experts=experts, **config)).eval()


def test_the_router_computes_cosines(experts: dict[str, str]) -> None:
    model = route(experts, router_options={"sharpness": 4.0})
    layer = next(module for module in model.modules() if hasattr(module, "routed_lora_router"))
    router = layer.routed_lora_router["default"]
    hidden = torch.randn(3, 5, router.in_features)
    expected = torch.stack(
        [functional.cosine_similarity(hidden, row, dim=-1) for row in router.weight], dim=-1
    )
    assert router.weight.abs().sum() > 0
    torch.testing.assert_close(router(hidden), torch.softmax(4 * expected, dim=-1))


def test_the_router_s_option_is_saved_and_read_back(
    experts: dict[str, str], tmp_path: Path
) -> None:
    model = route(experts, router_options={"sharpness": 4.0})
    assert not torch.allclose(logits(model), logits(route(experts)), atol=1e-4)
    model.save_pretrained(tmp_path / "routed")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "routed")
    assert loaded.peft_config["default"].router_options == {"sharpness": 4.0}
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sharpnes": 2.0},
            "sharpnes is not an option of router='cosine'; did you mean 'sharpness'",
        ),
        ({"sharpness": "high"}, "sharpness='high': input should be a valid number"),
        ({"sharpness": -1}, "sharpness=-1.0 is not above 0"),
    ],
)
def test_a_wrong_option_of_the_router_is_named(
    experts: dict[str, str], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        route(experts, router_options=options)


def test_the_file_of_the_router_is_a_command(experts: dict[str, str], tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "own-base")
    adapters = [f"--expert={name}={path}" for name, path in experts.items()]
    chosen = ["--router", "cosine", "--router-option", "sharpness=4", "--router-option", "top_k=1"]
    script = ROOT / "examples" / "extending_router.py"
    command = ["python", script, "compose", "own-base", *adapters, *chosen, "-o", "routed"]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = route(experts, router_options={"sharpness": 4.0, "top_k": 1})
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "routed")
    config = loaded.peft_config["default"]
    assert config.router_options == {"sharpness": 4.0} and config.top_k == 1
    assert torch.equal(logits(loaded), logits(expected))
    # A word is not a number, and nothing is written.
    command[-1] = "other"
    done = run(*command, "--router-option", "router_temperature=warm", cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "other").exists()
    assert "router_temperature='warm' is not of the type float | None" in done.stderr


class Dots(Router):
    """A router by products with rows; what is wrong with one below, it changes. It has no name."""

    def __init__(self, config: Any, experts: Any, in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.weight = nn.Parameter(torch.zeros(len(experts), in_features))

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight)


class OneTooMany(Dots):
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().scores(hidden)[..., None]


class OneForAll(Dots):
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().scores(hidden)[..., :1]


class Normalised(Dots):
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        norms = self.weight.norm(dim=-1, keepdim=True)
        return functional.linear(hidden, self.weight / norms)


class Transposed(Dots):
    def __init__(self, config: Any, experts: Any, in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.weight = nn.Parameter(torch.zeros(in_features, len(experts)))

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight


class WithSubmodule(Dots):
    def __init__(self, config: Any, experts: Any, in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.net = nn.Linear(in_features, len(experts))

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.net(hidden)


WRONG_ROUTERS = {
    OneTooMany: r"scores have the shape \(2, 3, 2, 1\) .* \(2, 3, 2\) would be right",
    OneForAll: r"scores have the shape \(2, 3, 1\) .* \(2, 3, 2\) would be right",
    Normalised: "scores are NaN",
    Transposed: r"weight has a row per expert, which are 2, and its shape is \(32, 2\)",
    WithSubmodule: "net.weight lies in a submodule",
}


@pytest.fixture
def registered() -> Iterator[Callable[..., str]]:
    """Registers a router under a name, as a user's file would, until the test is over."""
    names = []

    def register(router: type[Router], **attributes: Any) -> str:
        names.append("wrong")
        type("Wrong", (router,), {"name": "wrong", "__module__": __name__, **attributes})
        return "wrong"

    yield register
    for name in set(names):
        _ROUTERS.pop(name, None)


@pytest.mark.parametrize("router", WRONG_ROUTERS, ids=lambda router: router.__name__)
def test_a_router_is_tried_when_it_is_composed(
    experts: dict[str, str], registered: Callable[..., str], router: type[Router]
) -> None:
    name = registered(router)
    with pytest.raises(UserError, match=f"router 'wrong': .*{WRONG_ROUTERS[router]}"):
        get_peft_model(make_base(), RoutedLoraConfig(experts=experts, router=name))


@pytest.mark.parametrize(
    ("rows", "right"),
    [
        (("centres", "scale"), r"{'centres': 'expert', 'scale': 'expert'}"),
        ("weight", r"{'weight': 'expert'}"),
        ({"centres": "experts"}, r"{'centres': 'expert'}"),
        (None, r"{'weight': 'expert'}"),
    ],
)
def test_rows_of_another_form_are_refused_where_the_class_is_defined(
    registered: Callable[..., str], rows: Any, right: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"write rows = {right}")):
        registered(Dots, rows=rows)
    assert "wrong" not in _ROUTERS


def test_a_router_without_scores_is_refused_where_it_is_defined(
    registered: Callable[..., str],
) -> None:
    with pytest.raises(UserError, match=r"has no method `scores\(self, hidden\)`"):
        registered(Router)


def test_the_card_says_which_file_must_be_imported(experts: dict[str, str], tmp_path: Path) -> None:
    route(experts).save_pretrained(tmp_path / "own")
    route(experts, router="arrow").save_pretrained(tmp_path / "ours")
    own, ours = ((tmp_path / name / "README.md").read_text() for name in ("own", "ours"))
    assert "\nimport extending_router  # the router 'cosine'\n" in own
    assert "import extending_router" not in ours
    for card in (own, ours):  # before PEFT's template
        assert 0 < card.index("## Routed LoRA") < card.index("# Model Card")


def test_a_new_process_loads_what_the_page_shows(experts: dict[str, str], tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    route(experts).save_pretrained(tmp_path / "routed")
    page = (ROOT / "docs" / "extending.md").read_text()
    (script,) = re.findall(r"```python\n(from peft import PeftModel.*?)```", page, re.DOTALL)
    (tmp_path / "load.py").write_text(script)
    (tmp_path / "extending_router.py").write_text(
        (ROOT / "examples" / "extending_router.py").read_text()
    )
    done = run("python", "load.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# A family


def make_lfm2(path: Path, **config: Any) -> None:
    layers = {"num_hidden_layers": 3, "full_attn_idxs": [1], "conv_L_cache": 3, "pad_token_id": 0}
    make_model(path, 1, family="lfm2", block_multiple_of=8, **layers, **config)


@pytest.mark.parametrize(
    "config", [{}, {"block_auto_adjust_ff_dim": False}, {"tie_word_embeddings": False}], ids=str
)
def test_equal_sources_of_the_family_give_the_dense_model(here: Path, config: dict) -> None:
    importlib.import_module("extending_family")
    make_lfm2(here / "lfm2", **config)
    out = merge(document("moe_ties", ["lfm2"] * 3, base="./lfm2"))
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(loaded).__name__ == "Lfm2MoeForCausalLM" and not any(info.values()), info
    dense = AutoModelForCausalLM.from_pretrained("lfm2")
    torch.testing.assert_close(logits(loaded), logits(dense), atol=1e-5, rtol=0)


# A structural method


def make_mixtrals(here: Path) -> None:
    for seed, name in enumerate(("one", "two"), 1):
        make_moe(here / name, "mixtral", seed=seed, num_local_experts=2 + seed)


def test_one_pooled_model_is_that_model(here: Path) -> None:
    importlib.import_module("extending_method")
    make_mixtrals(here)
    out = merge(document("pool", ["one"], base=None))
    pooled, alone = (AutoModelForCausalLM.from_pretrained(path) for path in (out, "one"))
    assert torch.equal(logits(pooled), logits(alone))


def test_pooled_experts_are_those_of_the_sources(here: Path) -> None:
    importlib.import_module("extending_method")
    make_mixtrals(here)
    parameters = {"experts_per_token": 3}
    out = merge(document("pool", ["one", "two"], base=None, parameters=parameters))
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert (config.num_local_experts, config.num_experts_per_tok) == (7, 3)
    tensors, one, two = (read_tensors(Path(path)) for path in (out, "one", "two"))
    moe = "model.layers.1.block_sparse_moe"
    gate = f"{moe}.gate.weight"
    assert torch.equal(tensors[gate], torch.cat([one[gate], two[gate]]))
    for index, (source, of_source) in enumerate([(one, 0), (one, 1), (one, 2), (two, 0), (two, 1)]):
        name = f"{moe}.experts.{{}}.w2.weight"
        assert torch.equal(tensors[name.format(index)], source[name.format(of_source)])
    norm = "model.layers.1.input_layernorm.weight"
    torch.testing.assert_close(tensors[norm], (one[norm] + two[norm]) / 2)


@pytest.mark.parametrize(
    ("models", "parameters", "message"),
    [
        (["base"], {}, "pool takes Mixtrals"),
        (["one"], {"experts_per_tokens": 2}, "did you mean `experts_per_token`"),
        (["one"], {"experts_per_token": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes_in_pooling_are_named(
    here: Path, models: list, parameters: dict, message: str
) -> None:
    importlib.import_module("extending_method")
    make_mixtrals(here)
    with pytest.raises(click.ClickException, match=message):
        merge(document("pool", models, base=None, parameters=parameters))
    assert not (here / "out").exists()


def test_the_file_of_the_method_is_a_command(here: Path) -> None:
    make_mixtrals(here)
    (here / "config.yml").write_text(
        "merge_method: pool\nmodels:\n- model: ./one\n- model: ./two\n"
    )
    done = run("python", ROOT / "examples" / "extending_method.py", "config.yml", "out", cwd=here)
    assert done.returncode == 0, done.stderr
    assert (here / "out" / "model.safetensors").exists()
