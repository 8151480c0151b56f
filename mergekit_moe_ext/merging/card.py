"""The model card of a structural merge. Unlike mergekit's own it never asks the Hub anything."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.common import ModelPath, ModelReference
from transformers import PretrainedConfig

from mergekit_moe_ext.merging.method import Job, Plan

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE = """---
{metadata}---
# {name}

A {architecture} with {experts}, merged with
[mergekit](https://github.com/arcee-ai/mergekit) and mergekit-moe-ext.

## Load it

```python
{loading}
```

## How it was made

Method: {method}{shared}.

{sources}, in order:

{listed}
{notes}
Seed {seed}; {versions}.

```yaml
{config_yaml}
```
"""


def write_card(job: Job, plan: Plan, directory: Path, config_yaml: str) -> None:
    """`README.md` and `mergekit_config.yml`, the names that mergekit uses."""
    hub_ids = [
        path.path for model in job.sources for path in (model.model, model.lora) if _on_hub(path)
    ]
    spec = job.method.spec
    card = _TEMPLATE.format(
        metadata=yaml.safe_dump(
            {
                "base_model": list(dict.fromkeys(hub_ids)),
                "library_name": "transformers",
                "tags": ["mergekit", "merge", "moe"],
            }
        ),
        name=directory.name,
        architecture=plan.config.architectures[0],
        loading=_loading(
            directory,
            _auto_class(plan.config),
            remote_code=hasattr(plan.config, "auto_map"),
            tasks=list(getattr(plan.config, "ensembling", {}).get("heads", ())),
        ),
        experts=experts_in_words(plan),
        method=_with_reference(spec.pretty_name, spec.reference_url),
        shared=_merging(job) if plan.shared else "",
        sources="Experts" if len(job.experts) == plan.num_experts else "Sources",
        listed="\n".join(f"{i}. {_linked(model)}" for i, model in enumerate(job.experts)),
        notes=f"\n{plan.notes}\n" if plan.notes else "",
        seed=job.seed,
        versions=", ".join(f"{name} {version(name)}" for name in _VERSIONS),
        config_yaml=config_yaml.rstrip(),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    (directory / "mergekit_config.yml").write_text(config_yaml, encoding="utf-8")


_LOADING = re.compile(r"(## Load it\n\n```python\n).*?(\n```\n)", re.DOTALL)
_BESIDE = {
    "preprocessor_config.json": ("processor", "AutoImageProcessor"),
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
}
_VERSIONS = ("mergekit-moe-ext", "mergekit", "transformers", "torch")


def experts_in_words(plan: Plan) -> str:
    """How many experts there are, and how many of them are chosen."""
    per_layer = " per layer" if plan.routed_per == "token" else ""
    experts = "1 expert" if plan.num_experts == 1 else f"{plan.num_experts} experts"
    return f"{experts}{per_layer}, {plan.experts_per_token} of them per {plan.routed_per}"


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
    """Of the model, and of the tokenizer or image processor beside it."""
    arguments = f'"{directory.name}"'
    if remote_code:
        arguments += ", trust_remote_code=True"  # else transformers asks about the tokenizer's, too
    lines = [f"model = {auto}.from_pretrained({arguments})"]
    beside = next((each for file, each in _BESIDE.items() if (directory / file).exists()), None)
    if beside:
        lines.append(f"{beside[0]} = {beside[1]}.from_pretrained({arguments})")
    if len(tasks) > 1:
        lines.append(f'# a head per task: model(..., task="{tasks[0]}"), or {", ".join(tasks[1:])}')
    return "\n".join(
        [f"from transformers import {auto}{f', {beside[1]}' if beside else ''}", "", *lines]
    )


def _auto_class(config: PretrainedConfig) -> str:
    """Which of transformers' Auto classes loads it."""
    ours = [name for name in getattr(config, "auto_map", {}) if name != "AutoConfig"]
    return (
        ours[0]
        if ours
        else "AutoModelForSeq2SeqLM"
        if config.is_encoder_decoder
        else "AutoModelForCausalLM"
    )


def _merging(job: Job) -> str:
    base = f" with {_linked(job.base)} as base" if job.base else ""
    spec = job.shared_method.spec
    return f", shared parameters merged by {_with_reference(spec.name, spec.reference_url)}{base}"


def _on_hub(path: ModelPath | None) -> bool:
    """By its looks: of the form owner/name, and no such path here."""
    return path is not None and bool(_HUB_ID.fullmatch(path.path)) and not Path(path.path).exists()


def _with_reference(name: str, url: str | None) -> str:
    return f"[{name}]({url})" if url else name


def _linked(model: ModelReference) -> str:
    return " + ".join(
        f"[{path}](https://huggingface.co/{path.path})" if _on_hub(path) else str(path)
        for path in (model.model, model.lora)
        if path is not None
    )
