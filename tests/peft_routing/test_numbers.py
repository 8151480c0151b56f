"""What is kept and computed in which dtype, against float64 and beside PEFT's own LoRA."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_routing import RoutedLoraConfig
from peft_routing.layer import RoutedLoraLayer
from peft_routing.routers.linear import LinearRouter
from tests.peft_routing.adapters import make_base, save_experts, save_lora

IDS = torch.arange(24).reshape(2, 12)
HALVES = [torch.bfloat16, torch.float16]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, str]:
    """One LoRA, its file in three dtypes."""
    root = tmp_path_factory.mktemp("loras")
    paths = {}
    for dtype in (torch.float32, *HALVES):
        directory = save_lora(root / str(dtype), 1)
        file = directory / "adapter_model.safetensors"
        rounded = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(rounded, file)
        paths[dtype] = str(directory)
    return paths


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(tmp_path_factory.mktemp("experts"))


def one_as_two(base: Any, path: str, **options: Any) -> Any:
    """A routed adapter that is this LoRA, whatever its router chooses."""
    config = RoutedLoraConfig(experts={"one": path, "other": path}, **options)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize(
    ("of_base", "stated"),
    [
        (torch.float32, "auto"),
        (torch.float16, "auto"),
        (torch.bfloat16, "auto"),
        (torch.bfloat16, "bfloat16"),
    ],
)
@pytest.mark.parametrize("of_file", [torch.float32, *HALVES], ids=str)
def test_no_further_from_float64_than_twice_a_lora(
    loras: dict[torch.dtype, str], of_base: torch.dtype, of_file: torch.dtype, stated: str
) -> None:
    base, path = make_base(dtype=of_base), loras[of_file]
    exact = logits(PeftModel.from_pretrained(copy.deepcopy(base).double(), path).double())
    of_lora = logits(PeftModel.from_pretrained(copy.deepcopy(base), path))
    found = logits(one_as_two(base, path, expert_dtype=stated))
    assert found.dtype == of_lora.dtype
    assert (found.double() - exact).norm() <= 2 * (of_lora.double() - exact).norm()


@pytest.mark.parametrize("autocast", [None, *HALVES], ids=str)
@pytest.mark.parametrize("cast", [torch.float32, *HALVES], ids=str)
def test_casts_and_autocast_are_no_further_than_twice_a_lora(
    loras: dict[torch.dtype, str], cast: torch.dtype, autocast: torch.dtype | None
) -> None:
    """A model that is cast with its adapter on it, in and out of autocast."""
    path = loras[torch.float32]
    exact = logits(PeftModel.from_pretrained(make_base().double(), path).double())
    lora = PeftModel.from_pretrained(make_base(), path).to(cast)
    routed = one_as_two(make_base(), path, router="linear").to(cast)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        of_lora, found = logits(lora), logits(routed)
    assert found.dtype == of_lora.dtype
    assert (found.double() - exact).norm() <= 2 * (of_lora.double() - exact).norm()


def test_what_bfloat16_holds_and_float16_does_not_is_finite(tmp_path: Path) -> None:
    path = str(save_lora(tmp_path / "lora", 1, lora_alpha=1))
    file = Path(path) / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    model = one_as_two(make_base(), path)
    layer = next(module for module in model.modules() if isinstance(module, RoutedLoraLayer))
    x = torch.full((1, 3, layer.in_features), 1e6)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("router", ["arrow", "linear", "mlp"])
def test_a_cast_of_the_model_leaves_routers_in_float32(
    experts: dict[str, str], router: str, half: torch.dtype
) -> None:
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=experts, router=router)).eval()
    exact = logits(model)
    cast = model.to(half)
    for name, parameter in cast.named_parameters():
        kept = torch.float32 if "routed_lora_router" in name else half
        assert parameter.dtype == kept
    found = logits(cast)
    assert found.dtype == half
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    assert (logits(cast.double()) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_float32_under_autocast(inside: torch.dtype) -> None:
    config = RoutedLoraConfig(experts={"a": "a", "b": "b"}, router="linear")
    router = LinearRouter(config, config.names, 64)
    nn.init.normal_(router.weight)
    hidden = torch.randn(5, 64).to(inside)
    with torch.autocast("cpu", torch.bfloat16):
        scores = router.scores(hidden)
        assert router(hidden).dtype == torch.float32
    assert torch.allclose(scores.double(), hidden.double() @ router.weight.double().T, atol=1e-5)


@pytest.mark.parametrize("router", ["arrow", "mlp"])
def test_a_cast_after_a_compiled_run(experts: dict[str, str], router: str) -> None:
    model = get_peft_model(make_base(), RoutedLoraConfig(experts=experts, router=router)).eval()
    layer = next(module for module in model.modules() if isinstance(module, RoutedLoraLayer))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, layer.in_features)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
            model.to(dtype)
            # Compiled or not, choices are those of float32: what differs is rounding alone.
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            found, expected = compiled(x.to(dtype)), layer(x.to(dtype))
            assert found.dtype == expected.dtype == dtype
            assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
