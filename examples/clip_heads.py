"""Make a head for `merge_method: wemoe` on CLIP's vision towers, from the names of its classes.

    python examples/clip_heads.py --model openai/clip-vit-base-patch32 \\
        --classes cars.txt -o heads/cars.safetensors

The head has an embedding per class, as in WEMoE, section 4.1, and is what `head:` takes.
`mergekit_moe_ext.write_clip_head` says what is in the file. Nothing is printed.
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
    help="Whole CLIP with its tokenizer: a directory, or a name on the Hub.",
)
@click.option(
    "--classes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Text file with the name of a class per line.",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    default=TEMPLATES,
    show_default=True,
    help="Sentence to embed, {} being the name of a class; the mean is taken of several.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File for the head: *.safetensors.",
)
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def main(model: str, classes: Path, templates: Sequence[str], output: Path, quiet: bool) -> None:
    check_new_file(output)
    lines = classes.read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    try:
        write_clip_head(model, names, output, templates, quiet=quiet)
    except (OSError, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from error


if __name__ == "__main__":
    main()
