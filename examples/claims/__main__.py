"""Run the experiments behind the papers' claims, and write the page that judges them.

    cd examples
    python -m claims --output ../build/claims/quick --scale quick
    python -m claims --output ../build/claims/small --scale small --docs ../docs

Each experiment is one of the other examples. A command that was interrupted goes on after the last
row that was measured. What each has measured so far is kept in one file of JSON, and the page,
`claims.md`, is made of these files alone.
"""

from pathlib import Path

import click

from claims.page import render
from claims.records import EXPERIMENTS, goes_on, read_records, record_of, run

SCALES = ("quick", "small", "full")


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the outputs of the experiments, a folder for each.",
)
@click.option(
    "--scale",
    type=click.Choice(SCALES),
    default="small",
    show_default=True,
    help="Size of the experiments: minutes, hours, or a night.",
)
@click.option(
    "--only",
    type=click.Choice(list(EXPERIMENTS)),
    multiple=True,
    help="Experiment to run; several may be given. [default: all]",
)
@click.option(
    "--no-run",
    is_flag=True,
    help="Only collect what is in the output, and write the page.",
)
@click.option(
    "--docs",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for claims.md and the folder claims/ of records. [default: the output]",
)
def main(output: Path, scale: str, only: tuple[str, ...], no_run: bool, docs: Path | None) -> None:
    docs = docs or output
    records = docs / "claims"
    for name in only or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        earlier = read_records(records).get(name)
        if not no_run:
            click.echo(f"{name}, {scale}", err=True)
            seconds = run(name, experiment, scale, output / name)
        record = record_of(name, experiment, scale, output / name)
        if record is None:
            continue
        if earlier and goes_on(earlier, record):
            record.note = earlier.note
            record.reasons = earlier.reasons
            record.seconds = earlier.seconds
            if no_run:
                record.versions = earlier.versions
        if not no_run:
            record.seconds = (record.seconds or 0.0) + seconds
        record.write(records)
        write_page(docs)
    write_page(docs)
    click.echo(docs / "claims.md")


def write_page(docs: Path) -> None:
    """Writes the page anew from all records, after every experiment."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "claims.md").write_text(render(read_records(docs / "claims")))


if __name__ == "__main__":
    main()
