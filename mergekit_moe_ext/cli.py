"""The `mergekit-moe-ext` command: what mergekit's own commands do not offer."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

import mergekit_moe_ext
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.figures import check_new_figure
from _mergekit_moe_ext_common.options import (
    RESUME,
    DeferredCommand,
    FiniteRange,
    Reading,
    counting_options,
    in_order,
    numbers_by_name,
    options_of,
    output_directory,
    training_options,
)
from _mergekit_moe_ext_common.staging import check_new_file
from mergekit_moe_ext import commands
from mergekit_moe_ext.descriptions import (
    Parameter,
    description_of,
    options_of_method,
    tensor_parameters_of,
)
from mergekit_moe_ext.recipes import Adaptation, Counted, Part, Recipe

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mergekit_moe_ext.__version__)
def main() -> None:
    """Build and merge mixtures of experts with mergekit."""


def run_yaml(merge_options: "MergeOptions", config_file: str, out_path: str) -> None:
    """Run a merge: mergekit-yaml, without relying on torch's autoload."""
    from mergekit.merge import run_merge

    merge_options.apply_global_options()
    config, source, is_converted = commands.read_configuration(config_file)
    if is_converted:
        click.echo(source, err=True)
    run_merge(config, out_path, options=merge_options, config_source=source)


def plan(merge_options: "MergeOptions", config_file: str, plot: Path | None) -> None:
    """Check a configuration and its models, and describe the merge's result, without merging."""
    merge_options.apply_global_options()
    if plot:
        check_new_figure(plot)
    planned = commands.plan(config_file, merge_options)
    click.echo(planned)
    if plot:
        planned.draw(plot)


def add_experts(
    merge_options: "MergeOptions",
    model: str,
    experts: tuple[str, ...],
    names: tuple[str, ...],
    output_dir: str,
    gate_init: Any,
    margin: float | None,
    positive_prompts: tuple[str, ...],
    negative_prompts: tuple[str, ...],
) -> None:
    """Add experts to every layer of the mixture MODEL: the FFNs of dense models of its family.

    All that MODEL has stays as it is. The gates then have a row more for each new expert, which
    `train --train gates --only-experts NAME` trains.
    """
    merge_options.apply_global_options()
    commands.add_expert(
        model,
        experts,
        output_dir,
        names=names,
        gate_init=gate_init,
        margin=margin,
        positive_prompts=positive_prompts,
        negative_prompts=negative_prompts,
        options=merge_options,
    )


def remove_experts(
    merge_options: "MergeOptions", model: str, experts: tuple[str, ...], output_dir: str
) -> None:
    """Remove experts from every layer of the mixture MODEL. All else stays as it is."""
    merge_options.apply_global_options()
    commands.remove_expert(model, experts, output_dir, options=merge_options)


class _ShardSize(click.ParamType):
    """A number of parameters as mergekit writes it. mergekit's own type ends in a traceback."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from mergekit.common import parse_kmb

        try:
            return parse_kmb(value)
        except (IndexError, ValueError):
            self.fail(f"{value!r} is no number of parameters, such as 500M or 5B", param, ctx)


def _merge_command(name: str, run: Callable[..., None], *parameters: Callable) -> DeferredCommand:
    """A command that takes all of mergekit's options."""

    def build() -> click.Command:
        from mergekit.options import PrettyPrintHelp, add_merge_options

        command = in_order(*parameters)(add_merge_options(run))
        built = click.command(name, cls=PrettyPrintHelp)(command)
        for parameter in built.params:
            if parameter.name == "out_shard_size":
                parameter.type = _ShardSize()
        return built

    return DeferredCommand(name, run, build)


_CONFIGURATION = click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
_PLOT = click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Figure of caem's allocation, to be drawn: *.png, *.pdf or *.svg.",
)
_OUT_PATH = click.argument("out_path", type=click.Path())
main.add_command(_merge_command("yaml", run_yaml, _CONFIGURATION, _OUT_PATH))
main.add_command(_merge_command("plan", plan, _CONFIGURATION, _PLOT))
main.add_command(
    _merge_command(
        "add-expert",
        add_experts,
        click.argument("model"),
        click.option(
            "--expert",
            "experts",
            multiple=True,
            required=True,
            metavar="DENSE",
            help="Dense model, or base+lora, whose FFNs become an expert. May be repeated.",
        ),
        click.option(
            "--name", "names", multiple=True, help="Name of the expert, one for each --expert."
        ),
        output_directory("Directory of the grown mixture.", required=True),
        click.option(
            "--gate-init",
            type=click.Choice(["mean", "prompts", "zeros"]),
            default="mean",
            show_default=True,
            help="Initial rows of the gates: the mean of the others' rows, less the margin; made "
            "of prompts; or zeros.",
        ),
        click.option(
            "--margin",
            type=FiniteRange(min=0),
            help="Difference of the new expert's mean logit from the mean of the others'. Above 0 "
            "the mixture is loaded for one forward pass. [default: 5]",
        ),
        click.option(
            "--positive-prompts",
            multiple=True,
            metavar="FILE",
            help="Texts that the expert is for, one per line, for --gate-init prompts; one file "
            "for each --expert.",
        ),
        click.option(
            "--negative-prompts",
            multiple=True,
            metavar="FILE",
            help="Texts that the expert is not for, in the same way. [default: random tokens]",
        ),
    )
)
main.add_command(
    _merge_command(
        "remove-expert",
        remove_experts,
        click.argument("model"),
        click.option(
            "--expert",
            "experts",
            multiple=True,
            required=True,
            metavar="NUMBER|NAME",
            help="Expert to remove. May be repeated.",
        ),
        output_directory("Directory of the smaller mixture.", required=True),
    )
)


@main.command()
@click.argument("model")
@counting_options(
    data="Texts to count on. May be repeated.",
    output="File to keep the counts in: *.usage.json.",
    plot="Figure to draw of the counts: *.png, *.pdf or *.svg.",
)
@click.option(
    "--count",
    type=click.Choice(get_args(Counted)),
    default="chosen",
    show_default=True,
    help="Of routers with an expert capacity (Switch Transformers), what is counted: all that they "
    "chose, or what was dispatched to an expert that had room.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device: cpu, cuda, cuda:1 …; auto spreads the model over all GPUs and, where they are "
    "too small, the CPU.",
)
@options_of(Reading, "reading")
def usage(
    model: str,
    data: tuple[str, ...],
    output: Path | None,
    plot: Path | None,
    html: Path | None,
    max_samples: int | None,
    batch_size: int,
    count: Any,
    device: str,
    reading: Reading,
) -> None:
    """Count how often each expert of the mixture MODEL is chosen on texts, per source.

    SOURCE is a file (jsonl, csv, parquet, txt …), a directory, or a dataset on the Hub, with a
    split if you like: news=news.jsonl, owner/name:test[:100]. Prints, per source, the routing
    probability of each expert, averaged over layers and tokens; of a sequence MoE over texts, each
    of which chooses by its first tokens. Where routers have an expert capacity, it also prints the
    share of choices that the capacity dropped. Below is the normalised entropy of the choices of
    each layer, from 0 (one expert) to 1 (all alike), with its means (CAEM-MoE, table 3). Runs on
    many processes under `accelerate launch -m mergekit_moe_ext`, with the same counts.
    """
    if plot:
        check_new_figure(plot)
    if output:
        check_new_file(output)
    counted = commands.count_usage(
        model,
        data,
        reading=reading,
        max_samples=max_samples,
        count=count,
        batch_size=batch_size,
        device=device,
        html=html,
    )
    if counted is None:  # not the main process
        return
    from mergekit_moe_ext.caem.entropies import entropy_table
    from mergekit_moe_ext.mixtures.plots import plot_usage
    from mergekit_moe_ext.mixtures.usage import table

    # First, so that both are seen even where the file cannot be written.
    click.echo(table(counted))
    click.echo(f"\n{entropy_table(counted)}")
    if output:
        counted.write(output)
    if plot:
        plot_usage(counted, plot)


@main.command()
@click.argument("model")
@click.option(
    "--train",
    "parts",
    type=click.Choice(get_args(Part)),
    multiple=True,
    required=True,
    help="Part that is trained: the router, which may be called gates; the projectors of a "
    "sequence MoE; or all. May be repeated.",
)
@click.option(
    "--only-experts",
    multiple=True,
    metavar="NUMBER|NAME",
    help="With --train gates: expert whose rows of the gates are trained, while the other rows "
    "stay as they are. May be repeated. [default: all]",
)
@click.option(
    "--tasks",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML file of tasks, in place of --data and --eval-data: their data, prompts and metrics. "
    "Answers are generated and measured at the end of every epoch.",
)
@training_options("Directory of the trained model. [default: MODEL-trained]", needs_data=False)
@options_of(Recipe, "recipe")
@options_of(Reading, "reading")
def train(
    model: str,
    parts: tuple[Any, ...],
    only_experts: tuple[str, ...],
    tasks: Path | None,
    data: tuple[str, ...],
    weights: tuple[str, ...],
    eval_data: tuple[str, ...],
    output_dir: str | None,
    resume: bool,
    device_map: Any,
    recipe: Recipe,
    reading: Reading,
) -> None:
    """Train the router of the mixture MODEL, its projectors, or all of it, on texts.

    MODEL is a mixture of experts, or a sequence MoE (seq_moe, hetero_moe), of which each text
    chooses whole models by its first tokens; these tokens take no loss.

    SOURCE is a file (jsonl, csv, parquet, txt …), a directory, or a dataset on the Hub, with a
    split if you like: math=math.jsonl, owner/name:train[:1%]. The result is written whole, and
    MODEL is left as it is. Runs on many processes under `accelerate launch -m mergekit_moe_ext`.
    """
    from _mergekit_moe_ext_common.runs import before_and_after

    losses = commands.train(
        model,
        data,
        parts,
        output=output_dir,
        recipe=recipe,
        reading=reading,
        weights=numbers_by_name("--weight", weights),
        eval_data=eval_data,
        resume=resume,
        only_experts=only_experts,
        device_map=device_map,
        tasks=tasks,
    )
    if losses:
        click.echo(before_and_after(losses))


@main.command()
@click.argument("model")
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="TASK=SOURCE",
    help="Inputs of a task to adapt to. May be repeated.",
)
@click.option(
    "--eval-data",
    multiple=True,
    metavar="TASK=SOURCE",
    help="Inputs to measure on, in place of the held-out rows of the task.",
)
@output_directory("Directory of the adapted model. [default: MODEL-adapted]")
@RESUME
@options_of(Adaptation, "adaptation")
@options_of(Reading, "reading")
def adapt(
    model: str,
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    output_dir: str | None,
    resume: bool,
    adaptation: Adaptation,
    reading: Reading,
) -> None:
    """Adapt the routers of MODEL, a weight-ensembling one (wemoe, ewemoe), to inputs without
    labels.

    SOURCE is a file of texts (jsonl, csv, parquet, txt …), a directory (of images: with or without
    a directory per class), or a dataset on the Hub, with a split if you like: sun=sun/test,
    owner/name:train[:1%]. TASK names a head where the model has several. The result is written
    whole, and MODEL is left as it is. Runs on many processes under
    `accelerate launch -m mergekit_moe_ext`.
    """
    from _mergekit_moe_ext_common.runs import before_and_after

    if not reading.quiet:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("mergekit_moe_ext").setLevel(logging.INFO)
    results = commands.adapt(
        model,
        data,
        output=output_dir,
        adaptation=adaptation,
        reading=reading,
        eval_data=eval_data,
        resume=resume,
    )
    if results:
        click.echo(before_and_after(results))


@main.command()
@click.argument("model")
@output_directory("Directory of the stock model.", required=True)
@click.option("--task", help="Task whose head the stock model gets, where MODEL has several.")
def unload(model: str, output_dir: str, task: str | None) -> None:
    """Write MODEL, a weight-ensembling one whose coefficients are constants (router_layers: 0), as
    a stock model.
    """
    architecture = commands.unload(model, output_dir, task=task)
    click.echo(f"{output_dir} is a {architecture.__name__}")


@main.command()
@click.argument("names", nargs=-1)
def methods(names: tuple[str, ...]) -> None:
    """List all merge methods, or those in NAMES, and their parameters: type, default and
    meaning.
    """
    from mergekit.merge_methods import registered_methods

    by_name = {method.spec.name: method for method in registered_methods()}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UserError(f"no merge method {unknown[0]!r}; there are: {', '.join(by_name)}")
    for name in names or by_name:
        _describe(by_name[name])


# What a process that imports its host alone finds there.
_FRESH = {
    "a fresh mergekit process has our methods": (
        "import mergekit.merge, mergekit.merge_methods as m; m.get('moe')"
    ),
    "a fresh PEFT process has our adapter type": (
        "import peft; peft.PEFT_TYPE_TO_TUNER_MAPPING['ROUTED_LORA']"
    ),
    "a fresh transformers process has our architectures": (
        "from transformers import CONFIG_MAPPING as types, AutoModelForCausalLM as auto\n"
        "for name in ('sequence_moe', 'wemoe_llama'): auto._model_mapping[types[name]]"
    ),
}


@main.command()
def doctor() -> None:
    """Check that the versions fit, that mergekit, PEFT and transformers find this package, and that
    generation is right here.
    """
    from _mergekit_moe_ext_common.versions import TESTED, installed

    versions = installed()
    _show_versions(versions)
    # In processes of their own: as mergekit-yaml and other tools start, in which nothing imports
    # this package, and as a user's program does.
    fresh_processes = {name: _started("-c", code) for name, code in _FRESH.items()}
    selftests = [
        _started("-m", f"{name}.selftest") for name in ("mergekit_moe_ext", "peft_routing")
    ]
    checks = _checks_of_this_process(versions)
    reasons = []
    for name, process in fresh_processes.items():
        _, errors = process.communicate()
        checks[name] = process.returncode == 0
        if process.returncode:
            reasons.append(errors.strip())
    for check, passed in checks.items():
        click.echo(f"{'ok  ' if passed else 'FAIL'}  {check}")
    for selftest in selftests:
        lines, errors = selftest.communicate()
        click.echo(lines.rstrip() or f"FAIL  the self-test did not run\n{errors.strip()}")
    is_found = all(checks.values())
    is_right = not any(selftest.returncode for selftest in selftests)
    if not is_found:
        click.echo("\n".join(reasons))
        if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
            click.echo(
                "TORCH_DEVICE_BACKEND_AUTOLOAD is 0, which keeps the hosts from finding this "
                "package: unset it."
            )
        click.echo(
            "A host that does not find this package says `Unimplemented merge method` (mergekit), "
            "`KeyError: 'ROUTED_LORA'` (PEFT) or asks for trust_remote_code (transformers). As "
            "long as the versions fit, `mergekit-moe-ext yaml`, `import peft_routing` and "
            "`import mergekit_moe_ext` work; else install it again from its repository with "
            "`pip install --force-reinstall --no-deps .`"
        )
    if not is_right:
        click.echo(
            "Do not trust generation with the models that failed here. Install versions that were "
            "tested; these are known to work: pip install "
            f"'transformers=={TESTED['transformers'][1]}' 'peft=={TESTED['peft'][1]}'"
        )
    if not (is_found and is_right):
        sys.exit(1)


def _show_versions(versions: dict[str, str | None]) -> None:
    """Prints the version of each host, whether it was tested, and what does not go with what."""
    from _mergekit_moe_ext_common.versions import TESTED, remark_on_native_adapters, verdict

    click.echo(f"{'mergekit-moe-ext':<18}{mergekit_moe_ext.__version__}")
    for host, version in versions.items():
        oldest, newest = TESTED[host]
        click.echo(f"{host:<18}{version or '-':<12}{verdict(host, version)} ({oldest} to {newest})")
    remark = remark_on_native_adapters(versions)
    if remark:
        click.echo(f"note  {remark}")


def _checks_of_this_process(versions: dict[str, str | None]) -> dict[str, bool]:
    """What can be told without starting another process, in words, and whether it holds."""
    from _mergekit_moe_ext_autoload import KNOWN, is_known, known_versions

    checks = {}
    for host in KNOWN:
        is_right = versions[host] is not None and is_known(host)
        checks[f"this {host} is one that we know ({known_versions(host)})"] = is_right
    checks["torch's autoload is on (TORCH_DEVICE_BACKEND_AUTOLOAD is not 0)"] = (
        os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"
    )
    names = [point.name for point in entry_points(group="torch.backends")]
    checks["torch finds our entry point"] = "mergekit_moe_ext" in names
    return checks


def _started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _describe(method: Any) -> None:
    click.echo(f"{method.spec.name}: {description_of(method)}")
    options = options_of_method(method)
    for option in options:
        _describe_parameter(option)
    if options:
        click.echo("  and every parameter of the shared method, which `methods` lists by its name")
    for parameter in tensor_parameters_of(method):
        _describe_parameter(parameter)


def _describe_parameter(parameter: Parameter) -> None:
    default = f"{parameter.default}, per model" if parameter.per_model else parameter.default
    description = f"  {parameter.name} ({parameter.kind}, {default})"
    click.echo(f"{description}: {parameter.meaning}" if parameter.meaning else description)
