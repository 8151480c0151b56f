"""The model card of a structural merge. Unlike mergekit's own it never asks the Hub anything."""

import json
import re
import shlex
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.common import ModelPath, ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.cards import (
    fenced,
    in_markdown,
    is_on_hub,
    last_part,
    renew_section,
    without_folders,
)
from mergekit_moe_ext.merging.method import Job, Plan
from mergekit_moe_ext.modeling import modeling_files

_TEMPLATE = """---
{metadata}---
# {name}

A {architecture} with {experts}, merged with
[mergekit](https://github.com/arcee-ai/mergekit) and mergekit-moe-ext.

{untrained}## Load it

```python
{loading}
```

## How it was made

Method: {method}{shared}.

{sources}, in order:

{listed}
{notes}
Seed {seed}; {versions}.

{config_yaml}
"""
_OF_TEXTS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_TRAIN_FIRST = "## Train it first"
_LOADING = re.compile(r"(## Load it\n\n```python\n).*?(\n```\n)", re.DOTALL)
# By file the name of what is read from it, and the Auto class that reads it.
_BESIDE = {
    "preprocessor_config.json": ("processor", "AutoImageProcessor"),
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
}
_VERSIONS = ("mergekit-moe-ext", "mergekit", "transformers", "torch")


def write_card(job: Job, plan: Plan, directory: Path, config_yaml: str) -> None:
    """`README.md` and `mergekit_config.yml`, the names that mergekit uses.

    The second repeats the configuration as it is, so that the merge can be run again; in the first,
    paths are cut down to their last parts.
    """
    paths = []
    for model in job.sources:
        paths.append(model.model.path)
        if model.lora is not None:
            paths.append(model.lora.path)
    hub_ids = [path for path in paths if is_on_hub(path)]
    architecture = (plan.config.architectures or [""])[0]
    spec = job.method.spec
    card = _TEMPLATE.format(
        metadata=yaml.safe_dump(
            {
                "base_model": list(dict.fromkeys(hub_ids)),
                "library_name": "transformers",
                "tags": ["mergekit", "merge", "moe"],
            }
        ),
        name=in_markdown(directory.name),
        architecture=architecture,
        loading=_loading(
            directory,
            _auto_class(plan.config),
            remote_code=bool(modeling_files(architecture)),
            tasks=list(getattr(plan.config, "ensembling", {}).get("heads", ())),
        ),
        experts=experts_in_words(plan),
        untrained=_training_section(plan, directory.name),
        method=_with_reference(spec.pretty_name, spec.reference_url),
        shared=_merging(job, plan) if plan.shared else "",
        sources="Experts" if len(job.experts) == plan.num_experts else "Sources",
        listed="\n".join(f"{i}. {_linked(model)}" for i, model in enumerate(job.experts)),
        notes=f"\n{plan.notes}\n" if plan.notes else "",
        seed=job.seed,
        versions=", ".join(f"{name} {version(name)}" for name in _VERSIONS),
        config_yaml=fenced(_published(config_yaml), "yaml"),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    (directory / "mergekit_config.yml").write_text(config_yaml, encoding="utf-8")


def untrained_in_words(plan: Plan, directory: str) -> tuple[str, str]:
    """What of the output cannot be used before it is trained, and the command that trains it.

    Both are empty if there is nothing; the command is, too, for what is no model of texts, which
    `train` does not take.
    """
    if not plan.untrained:
        return "", ""
    parts = list(plan.untrained)
    states = []
    for start in dict.fromkeys(plan.untrained.values()):
        alike = [part for part in parts if plan.untrained[part] == start]
        named = " and ".join(f"the {part}" for part in alike)
        states.append(f"{named} {'is' if alike == ['router'] else 'are'} {start}")
    state = f"{', '.join(states)} until trained"
    if not (plan.config.architectures or [""])[0].endswith(_OF_TEXTS):
        return state, ""
    trained = " ".join(f"--train {part}" for part in parts)
    command = f"mergekit-moe-ext train {shlex.quote(directory)} {trained}"
    return state, f"{command} --data NAME=TEXTS.jsonl"


def _training_section(plan: Plan, directory: str) -> str:
    """The section of the card that says what is to be trained; empty if nothing is."""
    state, command = untrained_in_words(plan, directory)
    if not state:
        return ""
    how = f":\n\n{fenced(command, 'sh')}" if command else "."
    return f"{_TRAIN_FIRST}\n\n{state.capitalize()}{how}\n\n"


def drop_training_section(directory: Path, trained: Collection[str]) -> None:
    """Takes out of a copied card that its model is to be trained, once all parts that its command
    names are; `trained` are the parts that were, as `--train` has them.
    """
    card = directory / "README.md"
    if not card.exists():
        return
    text = card.read_text(encoding="utf-8")
    _, heading, section = text.partition(f"\n{_TRAIN_FIRST}\n")
    if not heading:
        return
    wanted = set(re.findall(r"--train (\S+)", section.partition("\n## ")[0]))
    if "all" in trained or wanted <= set(trained):
        card.write_text(renew_section(text, _TRAIN_FIRST, []), encoding="utf-8")


def experts_in_words(plan: Plan) -> str:
    """How many experts there are, and how many of them are chosen."""
    per_layer = " per layer" if plan.routed_per == "token" else ""
    experts = "1 expert" if plan.num_experts == 1 else f"{plan.num_experts} experts"
    return f"{experts}{per_layer}, {plan.experts_per_token} of them per {plan.routed_per}"


def defaults_in_words(job: Job, plan: Plan) -> str:
    """The values by which the shared method merges and that the configuration does not state."""
    stated = job.config.parameters or {}
    words = []
    for name, value in plan.shared_defaults.items():
        if name not in stated:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value).lower()
            words.append(f"{name} {shown}")
    return ", ".join(words)


def _published(config_yaml: str) -> str:
    """A configuration as it is where it names no path of this machine, else without folders."""
    document = yaml.safe_load(config_yaml)
    published = without_folders(document)
    if published == document:
        return config_yaml
    return yaml.safe_dump(published, sort_keys=False, allow_unicode=True)


def renew_loading(
    directory: Path, auto: str, *, remote_code: bool, tasks: Sequence[str] = ()
) -> None:
    """A copy of a card says how to load what it was a copy for; make that the model in
    `directory`."""
    card = directory / "README.md"
    if card.exists():
        code = _loading(directory, auto, remote_code=remote_code, tasks=tasks)
        text = re.sub(
            _LOADING, lambda found: found[1] + code + found[2], card.read_text("utf-8"), count=1
        )
        card.write_text(text, encoding="utf-8")


def _loading(directory: Path, auto: str, *, remote_code: bool, tasks: Sequence[str]) -> str:
    """The lines of Python that load the model, and the tokenizer or image processor beside it."""
    arguments = json.dumps(directory.name)
    if remote_code:
        arguments += ", trust_remote_code=True"  # else transformers asks about the tokenizer's, too
    classes = [auto]
    lines = [f"model = {auto}.from_pretrained({arguments})"]
    for file, (name, reader) in _BESIDE.items():
        if (directory / file).exists():
            classes.append(reader)
            lines.append(f"{name} = {reader}.from_pretrained({arguments})")
            break  # of a model that has both, the image processor alone
    if len(tasks) > 1:
        first, *others = map(json.dumps, tasks)
        lines.append(f"# a head per task: model(..., task={first}), or {', '.join(others)}")
    return "\n".join([f"from transformers import {', '.join(classes)}", "", *lines])


def _auto_class(config: PretrainedConfig) -> str:
    """Which of transformers' Auto classes loads it."""
    if modeling_files((config.architectures or [""])[0]):
        return next(name for name in config.auto_map if name != "AutoConfig")
    return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"


def _merging(job: Job, plan: Plan) -> str:
    base = f" with {_linked(job.base)} as base" if job.base else ""
    spec = job.shared_method.spec
    merged_by = _with_reference(spec.name, spec.reference_url)
    defaults = defaults_in_words(job, plan)
    by_default = f" (by default: {defaults})" if defaults else ""
    return f", shared parameters merged by {merged_by}{base}{by_default}"


def _with_reference(name: str, url: str | None) -> str:
    return f"[{name}]({url})" if url else name


def model_in_markdown(model: ModelReference) -> str:
    """A source for a card: by its id on the Hub, or by the last part of its path."""
    return " + ".join(_shown(path) for path in (model.model, model.lora) if path)


def _shown(path: ModelPath) -> str:
    revision = f"@{path.revision}" if path.revision else ""
    return in_markdown(last_part(path.path) + revision)


def _linked(model: ModelReference) -> str:
    """As `model_in_markdown`, with a link to what is on the Hub."""
    parts = []
    for path in (model.model, model.lora):
        if path and is_on_hub(path.path):
            parts.append(f"[{_shown(path)}](https://huggingface.co/{path.path})")
        elif path:
            parts.append(_shown(path))
    return " + ".join(parts)
