"""A head for `merge_method: wemoe` on CLIP's vision towers, made of the names of classes (WEMoE
4.1).

    python examples/clip_heads.py --model openai/clip-vit-base-patch32 --classes cars.txt -o
    heads/cars.safetensors

`mergekit_moe_ext.wemoe.clip_heads` says what is in the file.
"""

from collections.abc import Sequence
from pathlib import Path

import click

from mergekit_moe_ext import TEMPLATES, UserError, write_clip_head
from mergekit_moe_ext.analysis import check_new_file


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--model",
    required=True,
    help="A whole CLIP with its tokenizer: a directory, or a name on the Hub.",
)
@click.option(
    "--classes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="A text file, the name of a class per line.",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    default=TEMPLATES,
    show_default=True,
    help="What is embedded, {} being the name; the mean of several.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The head: *.safetensors.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(model: str, classes: Path, templates: Sequence[str], output: Path, quiet: bool) -> None:
    check_new_file(output)
    names = [
        line.strip() for line in classes.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    try:
        write_clip_head(model, names, output, templates, quiet=quiet)
    except (OSError, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from error


if __name__ == "__main__":
    main()
