"""Print the losses on the way from one LoRA adapter to another (Trade-offs, 4.2 and figure 3).

    python examples/mode_connectivity.py --base base --expert math=math-lora \\
        --expert code=code-lora --data math=math.jsonl --data code=code.jsonl \\
        --plot connectivity.png

Two ways lead from the first adapter (alpha 0) to the second (alpha 1): their factors are
interpolated, as in the paper, or their updates, as a control. On each way it prints the losses of
the texts of both tasks, and two barriers: the greatest excess over the straight line between the
ends of the mean of both losses (global connectivity), and of each task's loss (task-specific). It
is 0 where there is none. The last line is the mean loss of the better of the two adapters on each
task.

`--output` keeps the losses, and `--plot` draws them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import torch
from peft import get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mergekit_moe_ext.analysis import (
    check_new_figure,
    check_new_file,
    parse_sources,
    pyplot,
    read_batches,
)
from peft_routing import Reading, RoutedLoraConfig, UserError

WAYS: dict[str, Literal["low_rank", "full"]] = {"factors": "low_rank", "updates": "full"}


def barrier(losses: Sequence[float], alphas: Sequence[float]) -> float:
    """The greatest L(alpha) - (1 - alpha) L(0) - alpha L(1)."""
    excess = []
    for loss, alpha in zip(losses, alphas, strict=True):
        excess.append(loss - (1 - alpha) * losses[0] - alpha * losses[-1])
    return max(excess)


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[dict[str, Any]], coefficients: torch.Tensor) -> float:
    """The mean loss per token, in nats."""
    total = 0.0
    tokens = 0
    for batch in batches:
        ids = batch["input_ids"]
        labels = ids.masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(
            input_ids=ids, attention_mask=batch["attention_mask"], coefficients=coefficients
        ).logits[:, :-1]
        total += functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
        ).item()
        tokens += int((labels != -100).sum())
    return total / tokens


def measure(
    base: str, experts: dict[str, str], data: Sequence[str], points: int, max_samples: int | None
) -> dict[str, Any]:
    """The `alphas`, and by way and task the `losses` at each of them."""
    alphas = [step / (points - 1) for step in range(points)]
    losses: dict[str, dict[str, list[float]]] = {}
    for way, mixing in WAYS.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        reading = Reading(quiet=True)
        batches = {}
        for source in parse_sources(data):
            read = read_batches(base, model, source, reading, batch_size=8, max_samples=max_samples)
            batches[source.name] = list(read)
        config = RoutedLoraConfig(experts=experts, router="uniform", mixing=mixing)
        model = get_peft_model(model, config).eval()
        of_way: dict[str, list[float]] = {task: [] for task in batches}
        for alpha in alphas:
            coefficients = torch.tensor([1 - alpha, alpha])
            for task, rows in batches.items():
                of_way[task].append(mean_loss(model, rows, coefficients))
        losses[way] = of_way
    return {"alphas": alphas, "losses": losses}


def mean_of(losses: dict[str, list[float]]) -> list[float]:
    """The mean of the tasks' losses at each alpha."""
    return [sum(values) / len(values) for values in zip(*losses.values(), strict=True)]


def of_better_adapters(measured: dict[str, Any]) -> float:
    """The mean over tasks of the loss of that adapter which is better on the task."""
    ends = [min(values[0], values[-1]) for values in measured["losses"]["updates"].values()]
    return sum(ends) / len(ends)


def table(measured: dict[str, Any]) -> str:
    """The losses and barriers of each way, and what the choice of the better adapter gives."""
    lines = []
    for way, losses in measured["losses"].items():
        both = mean_of(losses)
        lines.append(f"{way}:  alpha" + "".join(f"{task:>12}" for task in losses) + "        both")
        for place, alpha in enumerate(measured["alphas"]):
            cells = [values[place] for values in losses.values()]
            cells.append(both[place])
            lines.append(f"{alpha:>15.2f}" + "".join(f"{value:>12.4f}" for value in cells))
        barriers = [f"global {barrier(both, measured['alphas']):.4f}"]
        for task, values in losses.items():
            barriers.append(f"{task} {barrier(values, measured['alphas']):.4f}")
        lines.append(f"barriers: {', '.join(barriers)}")
    lines.append(f"the better adapter of each task: {of_better_adapters(measured):.4f}")
    return "\n".join(lines)


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draws the mean loss of both tasks along both ways, and that of the better adapter."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for way, losses in measured["losses"].items():
        axes.plot(measured["alphas"], mean_of(losses), label=f"{way} interpolated")
    best = of_better_adapters(measured)
    axes.axhline(best, color="tab:pink", label="the better adapter of each task")
    axes.set_xlabel("alpha")
    axes.set_ylabel("mean loss of both tasks (nats per token)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--base", metavar="DIR", required=True, help="Base model of both adapters.")
@click.option(
    "--expert", "experts", metavar="NAME=DIR", multiple=True, required=True, help="Give two."
)
@click.option(
    "--data", metavar="TASK=SOURCE", multiple=True, required=True, help="Texts of a task; give two."
)
@click.option("--points", type=click.IntRange(min=3), default=11, show_default=True)
@click.option("--max-samples", type=click.IntRange(min=1), help="Number of rows of each task.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write: *.json.")
@click.option("--plot", type=click.Path(path_type=Path), help="Figure to write: *.png.")
def main(
    base: str,
    experts: tuple[str, ...],
    data: tuple[str, ...],
    points: int,
    max_samples: int | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    if output:
        check_new_file(output)
    if plot:
        check_new_figure(plot)
    named = dict(each.partition("=")[::2] for each in experts)
    if len(experts) != 2 or len(named) != 2 or not all(named.values()) or len(data) != 2:
        raise UserError("give two adapters, --expert NAME=DIR, and the texts of two tasks, --data")
    measured = measure(base, named, data, points, max_samples)
    click.echo(table(measured))
    if output:
        output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if plot:
        draw(measured, plot)


if __name__ == "__main__":
    main()
