"""LoRA adapters with random factors, as directories that PEFT reads."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules by name, without the output layer."""
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            modules[name] = module
    return modules


@contextmanager
def random_adapters(
    model: nn.Module, count: int, rank: int, scale: float = 0.02
) -> Iterator[list[str]]:
    """The directories of so many adapters for all linear modules of a model, until the block
    ends.
    """
    generator = torch.Generator().manual_seed(0)
    modules = linear_modules(model)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    with tempfile.TemporaryDirectory() as root:
        for index in range(count):
            folder = Path(root) / f"expert{index}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps(config))
            tensors = {}
            for name, module in modules.items():
                shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
                for factor, shape in shapes.items():
                    values = torch.randn(shape, generator=generator) * scale
                    tensors[f"base_model.model.{name}.lora_{factor}.weight"] = values
            save_file(tensors, folder / "adapter_model.safetensors")
        yield [str(Path(root) / f"expert{index}") for index in range(count)]
