"""Options of routers: those that have a field of their own, and those that a router alone
declares."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_routing import RoutedLoraConfig, Router
from peft_routing.routers import RouterOptions
from peft_routing.routers.base import _ROUTERS
from peft_routing.routers.options import options_of_names, value_of_text
from tests.peft_routing.adapters import make_base, save_lora

TOKENS = torch.arange(2, 20)[None]
PATHS = {"math": "math/", "code": "code/"}


@dataclass(frozen=True)
class TiltedOptions(RouterOptions):
    tilt: float = 1.0
    sides: tuple[int, ...] = (1, 2)
    way: Literal["up", "down"] = "up"


@dataclass(frozen=True)
class StrictOptions:
    depth: int

    def __post_init__(self) -> None:
        if self.depth > 3:
            raise ValueError(f"depth={self.depth} is above 3")


def tilted(name: str, options: Any) -> type[Router]:
    """A router without parameters, whose scores grow with the expert's index, by `tilt`."""

    class Tilted(Router):
        rows = {}  # noqa: RUF012

        def __init__(self, config: Any, experts: Any, in_features: int) -> None:
            super().__init__(config, experts, in_features)
            self.tilt = getattr(self.options_of(config), "tilt", None) or 0.0

        def scores(self, hidden: torch.Tensor) -> torch.Tensor:
            steps = torch.arange(len(self.experts), device=hidden.device)
            return (self.tilt * steps).expand(*hidden.shape[:-1], -1)

    return type(name.title(), (Tilted,), {"name": name, "options": options, "__module__": __name__})


@pytest.fixture(autouse=True)
def routers() -> Iterator[None]:
    tilted("tilted", TiltedOptions)
    tilted("strict", StrictOptions)
    tilted("loose", ("top_k", "tilt"))
    yield
    for name in ("tilted", "strict", "loose"):
        del _ROUTERS[name]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("experts")
    return {
        name: str(save_lora(root / name, seed)) for seed, name in enumerate(("math", "code", "law"))
    }


def config_of(**options: Any) -> RoutedLoraConfig:
    return RoutedLoraConfig(**{"experts": dict(PATHS), **options})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


BOTH_WAYS: dict[str, dict[str, Any]] = {
    "arrow": {"top_k": 1, "router_temperature": 0.5},
    "linear": {"init": "arrow", "score": "abs"},
    "fixed": {"weights": {"math": 0.5, "code": 0.25}},
    "hierarchical": {"clusters": {"math": "a", "code": "b"}},
    "mlp": {"mlp_layers": 1, "init_lambda": 0.5, "top_k": 1},
}


@pytest.mark.parametrize("router", BOTH_WAYS)
def test_a_field_and_router_options_say_the_same(router: str) -> None:
    options = BOTH_WAYS[router]
    field, other = (
        config_of(router=router, **options),
        config_of(router=router, router_options=options),
    )
    assert field == other == config_of(router=router, router_options=options, **options)
    assert {name: getattr(other, name) for name in options} == options
    assert other.router_options == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2.0}, {"top_k": 2}),
        ({"top_k": "1", "router_temperature": "0.5"}, {"top_k": 1, "router_temperature": 0.5}),
        ({"routing_tokens": 8.0}, {"routing_tokens": 8}),
        (
            {"router": "mlp", "mlp_layers": "1", "init_lambda": 1},
            {"mlp_layers": 1, "init_lambda": 1.0},
        ),
        ({"router": "tilted", "router_options": {"tilt": "2"}}, {"tilt": 2.0}),
    ],
)
def test_a_value_is_taken_for_what_it_says(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = config_of(**options)
    for name, value in expected.items():
        held = config.router_options.get(name, getattr(config, name, None))
        assert held == value and type(held) is type(value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt option": (
        {"tlit": 1.0},
        r"tlit is not an option of router='tilted'; did you mean 'tilt'\?",
    ),
    "an option of others": (
        {"mlp_layers": 1},
        "mlp_layers is not an option of router='tilted'; it is one of mlp",
    ),
    "nothing like it": (
        {"colour": 1},
        "its options are top_k, router_temperature, tilt, sides, way",
    ),
    "a word for a number": ({"tilt": "steep"}, "tilt='steep': input should be a valid number"),
    "a part of an expert": ({"top_k": 1.5}, "top_k=1.5: input should be a valid integer"),
    "none of the words": ({"way": "left"}, "way='left' is none of 'up', 'down'"),
    "below 1": ({"top_k": 0}, "top_k=0 is below 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_named(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        config_of(router="tilted", router_options=options)


def test_other_mistakes_are_named() -> None:
    for options, message in (
        ({"router": "strict"}, "router='strict' needs depth"),
        (
            {"router": "strict", "router_options": {"depth": 4}},
            "router='strict': depth=4 is above 3",
        ),
        (
            {"router": "uniform", "router_options": {"tilt": 1}},
            "tilt is not an option of .*; it is one of loose, tilted",
        ),
        (
            {"router": "uniform", "router_options": {"colour": 1}},
            "colour is not an option of .*; it has none",
        ),
        (
            {"top_k": 1, "router_options": {"top_k": 2}},
            "top_k=1, and 2 in router_options: give it once",
        ),
        ({"router_options": ["top_k"]}, r"router_options=\['top_k'\] is no dictionary"),
        ({"router": "fixed", "weights": ["a", "b"]}, "give a finite number for each of math, code"),
        ({"routing_tokens": "few"}, "routing_tokens='few': input should be a valid integer"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(**options)


def test_names_alone_take_any_value() -> None:
    config = config_of(router="loose", top_k="1", router_options={"tilt": [1, "b"]})
    assert config.router_options == {"tilt": [1, "b"]} and config.top_k == 1
    assert config_of(router="loose").router_options == {"tilt": None}
    with pytest.raises(ValueError, match="did you mean 'tilt'"):
        config_of(router="loose", router_options={"tilted": 1})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tilt", "2", 2.0),
        ("tilt", "1e3", 1000.0),
        ("sides", "[3, 4]", (3, 4)),
        ("way", "down", "down"),
        ("top_k", "2", 2),
        ("top_k", "null", None),
    ],
)
def test_a_text_is_read_in_the_type_that_is_declared(name: str, text: str, expected: Any) -> None:
    value = value_of_text(TiltedOptions, name, text)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("tilt", "steep", "float"),
        ("top_k", "1.5", "int | None"),
        ("sides", "3, 4", "tuple[int, ...]"),
        ("way", "left", "Literal['up', 'down']"),
    ],
)
def test_a_text_of_another_type_is_named_with_the_type(name: str, text: str, kind: str) -> None:
    message = re.escape(f"{name}={text!r} is not of the type {kind}")
    with pytest.raises(ValueError, match=message):
        value_of_text(TiltedOptions, name, text)


def test_a_text_for_any_value_is_json_where_it_can_be() -> None:
    options = options_of_names("Loose", ("tilt",))
    assert value_of_text(options, "tilt", '[1, "b"]') == [1, "b"]
    assert value_of_text(options, "tilt", "steep") == "steep"


def test_options_are_not_taken_out_of_the_user_s_dictionary() -> None:
    options = {"top_k": 1, "tilt": 2.0}
    config_of(router="tilted", router_options=options)
    assert options == {"top_k": 1, "tilt": 2.0}


def test_options_are_saved_and_read_back(experts: dict[str, str], tmp_path: Path) -> None:
    options = {"tilt": 3.0, "sides": (4,)}
    config = RoutedLoraConfig(experts=experts, router="tilted", router_options=options)
    model = get_peft_model(make_base(), config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["router_options"]
    assert saved == {"tilt": 3.0, "sides": [4], "way": "up"}  # what was not stated, too
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    held = loaded.peft_config["default"]
    assert held.router_class.options_of(held) == TiltedOptions(tilt=3.0, sides=(4,))
    assert torch.equal(logits(loaded), logits(model))
    flat = RoutedLoraConfig(experts=experts, router="tilted", router_options={"tilt": 0.0})
    assert not torch.allclose(logits(model), logits(get_peft_model(make_base(), flat)), atol=1e-4)


def test_infinity_survives(tmp_path: Path) -> None:
    config = config_of(router="tilted", router_options={"tilt": math.inf})
    config.save_pretrained(str(tmp_path))
    assert RoutedLoraConfig.from_pretrained(str(tmp_path)).router_options["tilt"] == math.inf


def test_options_stay_when_experts_come_and_go(experts: dict[str, str]) -> None:
    law = experts["law"]
    others = {name: path for name, path in experts.items() if name != "law"}
    model = get_peft_model(
        make_base(), RoutedLoraConfig(experts=others, router="tilted", router_options={"tilt": 3.0})
    )
    before = logits(model)
    model.add_expert("law", law)
    config = RoutedLoraConfig(experts=experts, router="tilted", router_options={"tilt": 3.0})
    torch.testing.assert_close(logits(model), logits(get_peft_model(make_base(), config)))
    model.remove_expert("law")
    assert model.peft_config["default"].router_options["tilt"] == 3.0
    assert torch.equal(logits(model), before)


def test_a_file_from_before_there_were_router_options_loads(
    experts: dict[str, str], tmp_path: Path
) -> None:
    config = RoutedLoraConfig(experts=experts, router="arrow", top_k=2, router_temperature=0.5)
    model = get_peft_model(make_base(), config)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written.pop("router_options") == {}
    path.write_text(json.dumps(written))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert loaded.peft_config["default"].top_k == 2
    assert torch.equal(logits(loaded), logits(model))
