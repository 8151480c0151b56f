"""Repeat CAEM-MoE's experiments at small scale: Tables 2 to 5, figures 2 to 4.

    cd examples
    python -m caem_switch --output caem/
    python -m caem_switch --output caem/ --model google/switch-base-8 google/switch-base-16

README.md beside this file says what is done. Each run is a file of JSON under the output; a command
that was interrupted goes on after the last.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
from transformers import AutoConfig

from caem_switch.experiment import COMPARISONS, CONFIGURATIONS, SCALES, SOUPS, Scale, Seed
from caem_switch.report import draw, report
from caem_switch.switch import pretrained
from caem_switch.texts import write_texts
from mergekit_moe_ext import UserError

PAPER_RATE = 3e-4  # for the paper's own models


def check_settings(folder: Path, scale: Scale, models: tuple[str, str] | None) -> None:
    """Keeps the settings in the output. `UserError` where earlier runs in it had others."""
    settings = json.dumps({"scale": asdict(scale), "models": models}, indent=1)
    path = folder / "settings.json"
    if path.is_file() and path.read_text() != settings:
        raise UserError(f"{path} has other settings: name another --output")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(settings)


def check_experts(models: tuple[str, str]) -> None:
    """`UserError` where the models are no Switch Transformers with 8 and with 16 experts."""
    for name, experts in zip(models, (8, 16), strict=True):
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "switch_transformers" or config.num_experts != experts:
            raise UserError(f"--model: {name} is no Switch Transformer with {experts} experts")


def run_seed(seed: Seed) -> None:
    """All runs of a seed; those that were done are not done again."""
    for name in CONFIGURATIONS:
        seed.multi_task(name)
    for first, second in SOUPS:
        seed.soup(first, second)
    for first, second, is_initial_too in COMPARISONS:
        seed.similarity(first, second, is_initial=False)
        if is_initial_too:
            seed.similarity(first, second, is_initial=True)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for models, results and figures; a run goes on where an earlier one ended.",
)
@click.option(
    "--scale",
    "size",
    type=click.Choice(list(SCALES)),
    default="small",
    show_default=True,
    help="Sizes of data, models and trainings; quick only shows that everything runs.",
)
@click.option(
    "--model",
    "models",
    nargs=2,
    metavar="WITH_8 WITH_16",
    help="Pretrained Switch Transformers with 8 and with 16 experts. [default: small ones that are "
    "pretrained here]",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of seeds of the order of the rows.",
)
def main(output: Path, size: str, models: tuple[str, str] | None, seeds: int) -> None:
    scale = SCALES[size]
    if models:
        check_experts(models)
        scale = replace(scale, learning_rate=PAPER_RATE)
    check_settings(output, scale, models)
    texts = output / "texts"
    write_texts(texts, scale.sizes)
    bases = {}
    for place, experts in enumerate((8, 16)):
        if models:
            bases[experts] = Path(models[place])
        else:
            bases[experts] = pretrained(
                output / "pretrained",
                experts,
                scale.shape,
                scale.pretraining,
                texts,
                scale.reading,
            )
    for number in range(1, seeds + 1):
        run_seed(Seed(number, output / f"seed-{number}", texts, bases, scale))
        # After every seed, so that there is something to look at early.
        (output / "results.txt").write_text(report(output, number))
        draw(output, number)
    click.echo((output / "results.txt").read_text())


if __name__ == "__main__":
    main()
