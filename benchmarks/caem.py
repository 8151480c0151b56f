"""Time `caem` against mergekit's `linear` and the physical limit, and planning with many experts.

    python benchmarks/caem.py            # three bfloat16 Mixtrals of 1.00 GB
    python benchmarks/caem.py --layers 2 # a quick look

All merge the same mixtures of experts. `linear` averages all tensors, experts too, so it computes
more; `caem` copies the experts that it takes. The limit reads every input once and writes as many
bytes as the output has. Planning is timed on tiny mixtures with very many experts, where a cost
that grows with their square would show; there the limit is to read the headers alone.
"""

import sys
import tempfile
import time
from pathlib import Path

import click
import torch
import yaml
from merge import BIN, IMPORT, in_turn, report
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors import safe_open
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import mergekit_moe_ext  # noqa: F401  (registers caem)
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.planner import prepare, structural_method
from mergekit_moe_ext.merging.preflight import read_job
from mergekit_moe_ext.mixtures.routers import routers_of
from mergekit_moe_ext.mixtures.usage import LayerUsage, TaskUsage, Usage

NAMES = ("news", "squad", "xsum")


def make_sources(root: Path, model_class: type, config: PretrainedConfig, experts: int) -> None:
    """Writes three random mixtures, and usage files with random counts: counting is not timed."""
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.bfloat16)
        model.save_pretrained(root / name)
        routers = routers_of(model)
        layers = {}
        for router in routers:
            counts = torch.randint(1, 1000, (experts,)).tolist()
            layers[router] = LayerUsage(
                tokens=sum(counts), counts=counts, weights=[float(n) for n in counts]
            )
        Usage(
            model=name,
            checkpoint=checkpoint_fingerprint(
                ModelReference.model_validate(str(root / name)), MergeOptions()
            ),
            architecture=model_class.__name__,
            experts_per_token=2,
            tasks={name: TaskUsage(data="made up", fingerprint="", samples=1, layers=layers)},
        ).write(root / f"{name}.usage.json")


def write_configs(root: Path) -> None:
    """Writes a configuration for each merge method."""
    listed = [
        {"model": str(root / name), "parameters": {"usage": str(root / f"{name}.usage.json")}}
        for name in NAMES
    ]
    (root / "caem.yml").write_text(
        yaml.safe_dump({"merge_method": "caem", "models": listed, "dtype": "bfloat16"})
    )
    plain = [{"model": str(root / name), "parameters": {"weight": 1.0}} for name in NAMES]
    (root / "linear.yml").write_text(
        yaml.safe_dump({"merge_method": "linear", "models": plain, "dtype": "bfloat16"})
    )


def whole_merges(layers: int, repeats: int) -> str:
    """A report of whole merges, each in a process of its own."""
    config = MixtralConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=1792,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_local_experts=8,
    )
    tools: dict[str, list[str | Path]] = {
        "caem": [BIN / "mergekit-yaml", "caem.yml", "out", "--quiet"],
        "linear": [BIN / "mergekit-yaml", "linear.yml", "out", "--quiet"],
        IMPORT: [sys.executable, "-c", "import mergekit.scripts.run_yaml"],
    }
    with tempfile.TemporaryDirectory(prefix="caem-benchmark-") as directory:
        root = Path(directory)
        make_sources(root, MixtralForCausalLM, config, 8)
        write_configs(root)
        inputs: list[Path] = []
        for name in NAMES:
            inputs += (root / name).glob("*.safetensors")
        bytes_read = sum(path.stat().st_size for path in inputs)
        runs, copies = in_turn(tools, root, inputs, repeats)
    return f"read {bytes_read / 1e9:.2f} GB; {repeats} runs each\n\n{report(runs, copies)}"


def planning(experts: int) -> tuple[int, float, float]:
    """The number of experts of all three sources, the seconds to plan, and the seconds to read the
    headers and nothing more.
    """
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=8,
        moe_intermediate_size=8,
        intermediate_size=8,
        num_hidden_layers=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=experts,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory(prefix="caem-benchmark-") as directory:
        root = Path(directory)
        make_sources(root, Qwen3MoeForCausalLM, config, experts)
        write_configs(root)
        started = time.perf_counter()
        for name in NAMES:
            for path in (root / name).glob("*.safetensors"):
                with safe_open(path, framework="pt") as shard:
                    for tensor in shard.keys():  # noqa: SIM118 (not a dictionary)
                        shard.get_slice(tensor).get_shape()
        headers = time.perf_counter() - started
        merge_config = MergeConfiguration.model_validate(
            yaml.safe_load((root / "caem.yml").read_text())
        )
        method = structural_method("caem")
        assert method is not None
        started = time.perf_counter()
        prepare(read_job(merge_config, MergeOptions(), method))
        planned = time.perf_counter() - started
    return 3 * 48 * experts, planned, headers


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--layers", default=9, show_default=True, help="Number of layers of each source.")
@click.option("--repeats", default=3, show_default=True, help="Number of runs of each merge.")
def main(layers: int, repeats: int) -> None:
    click.echo(whole_merges(layers, repeats))
    click.echo(f"\n{'experts':>8}{'planning, s':>13}{'headers, s':>12}")
    for experts in (32, 64, 128):
        click.echo("{:8}{:13.2f}{:12.2f}".format(*planning(experts)))


if __name__ == "__main__":
    main()
