"""Print how far routed experts and PEFT's LoRA are from float64, by the dtypes of base and adapter.

    python benchmarks/routed_lora_dtypes.py         # seconds
    python benchmarks/routed_lora_dtypes.py --device cuda

Both experts are one and the same adapter, so that the routed adapter must give what PEFT's own LoRA
of it gives, whatever the router chooses. An error is the norm of the difference of the logits from
those of the same rounded weights in float64, divided by the norm of these. The model is a small
Llama with random weights.
"""

import copy
import itertools
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_routing import RoutedLoraConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = torch.arange(48).reshape(2, 24)


def small_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def save_lora(directory: Path, dtype: torch.dtype) -> None:
    """Write a LoRA with random factors, its file in a dtype."""
    model = get_peft_model(small_llama(), LoraConfig(r=8, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})


@torch.no_grad()
def logits(model: Any, device: str) -> torch.Tensor:
    return model.to(device).eval()(input_ids=TOKENS.to(device)).logits.double().cpu()


@click.command()
@click.option("--device", default="cpu", show_default=True, help="Device, as torch names it.")
def main(device: str) -> None:
    """Print a table: relative errors by the dtypes of the base model and of the adapter's file."""
    click.echo(f"torch {torch.__version__}, {device}")
    click.echo("| base | adapter's file | PEFT's LoRA | routed | `expert_dtype=\"bfloat16\"` |")
    click.echo("|---|---|---|---|---|")
    for of_base, of_file in itertools.product(DTYPES, DTYPES):
        with tempfile.TemporaryDirectory() as root:
            save_lora(Path(root), of_file)
            base = small_llama().to(of_base)
            exact = PeftModel.from_pretrained(copy.deepcopy(base).double(), root)
            right = logits(exact, device)
            models = [PeftModel.from_pretrained(copy.deepcopy(base), root)]
            for dtype in ("auto", "bfloat16"):
                config = RoutedLoraConfig(experts={"one": root, "other": root}, expert_dtype=dtype)
                models.append(get_peft_model(copy.deepcopy(base), config))
            cells = [str(of_base).removeprefix("torch."), str(of_file).removeprefix("torch.")]
            for model in models:
                error = (logits(model, device) - right).norm() / right.norm()
                cells.append(f"{error:.1e}")
            click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
