"""The model card of a structural merge. Unlike mergekit's own it never asks the Hub anything."""

import re
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.common import ModelPath, ModelReference

from mergekit_moe_ext.methods.base import Job, Plan

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE = """---
{metadata}---
# {name}

A {architecture} with {experts}, merged with
[mergekit](https://github.com/arcee-ai/mergekit) and mergekit-moe-ext.

## Load it

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}")
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
    hub_ids = [path.path for model in job.sources for path in (model.model, model.lora) if _on_hub(path)]
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
        auto_class="AutoModelForSeq2SeqLM" if plan.config.is_encoder_decoder else "AutoModelForCausalLM",
        experts=experts_in_words(plan),
        trust=", trust_remote_code=True" if hasattr(plan.config, "auto_map") else "",
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


_VERSIONS = ("mergekit-moe-ext", "mergekit", "transformers", "torch")


def experts_in_words(plan: Plan) -> str:
    """How many experts there are, and how many of them are chosen."""
    per_layer = " per layer" if plan.routed_per == "token" else ""
    return f"{plan.num_experts} experts{per_layer}, {plan.experts_per_token} of them per {plan.routed_per}"


def _merging(job: Job) -> str:
    base = f" with {_linked(job.base)} as base" if job.base else ""
    return (
        f", shared parameters merged by {_with_reference(job.shared.spec.name, job.shared.spec.reference_url)}{base}"
    )


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
