"""The routers that `compare` trains on the tasks' train texts (Trade-offs 4.3, 4.4 and 5.3).

`peft_routing.training` does the work. What it gives lies in the cache, by all that it depends on,
and is measured as any other adapter is.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from torch import nn

from _mergekit_moe_ext_common.checkpoints import model_fingerprint
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.staging import check_output, staged
from peft_routing.adapter_files import fingerprint
from peft_routing.fusion.cache import Texts
from peft_routing.fusion.candidates import Candidate, add_adapter, size_of
from peft_routing.fusion.strategies import NEEDS_CLUSTERS, OF_CLUSTERS, PLAIN, TRAINED
from peft_routing.fusion.subjects import any_adapter, composed, one_expert
from peft_routing.loading import base_of, load_adapter_config, load_on_empty
from peft_routing.recipes import LEARNING_RATES, Recipe
from peft_routing.training import Result, TokenRows, is_interrupted, train

# The most numbers that a router may learn in one module: 128 experts at a width of 8192. In the 224
# modules of 32 layers they would be 0.9 GB in float32, and Adam keeps twice that beside them.
MOST_PER_MODULE = 2**20
_NOTES = "training.json"
_VERSION = 1


@dataclass(frozen=True)
class Training:
    """How routers are trained.

    learning_rates: AdamW's; the one with the lowest loss on validation is kept.
    clusters: the cluster of each expert; None without any.
    """

    recipe: Recipe
    learning_rates: Sequence[float]
    clusters: Mapping[str, int] | None = None

    @property
    def is_usual(self) -> bool:
        """Whether learning rates and length are those of `train`."""
        usual = Recipe()
        has_usual_length = (
            self.recipe.num_train_epochs == usual.num_train_epochs
            and self.recipe.max_steps == usual.max_steps
        )
        return has_usual_length and tuple(self.learning_rates) == LEARNING_RATES


@dataclass(frozen=True)
class Setting:
    """What routers are composed of, what they are trained on, and where they are kept.

    experts: their directories, by name.
    empty: the base model's architecture.
    tasks: the written sources, which an adapter's card names.
    texts: of each split. Routers learn on train, and learning rates are chosen on validation.
    directory: that of the cache.
    """

    base: str
    experts: Mapping[str, str]
    empty: nn.Module
    tasks: Mapping[str, str]
    texts: Mapping[str, Sequence[Texts]]
    directory: Path
    reading: Reading
    training: Training


@dataclass(frozen=True)
class Planned:
    """A router that is to be trained.

    kind: that of its row.
    options: those of its adapter.
    parameters: how many numbers it learns.
    """

    kind: str
    options: dict[str, Any]
    parameters: int


def planned_of(
    wanted: Collection[str],
    experts: Mapping[str, str],
    empty: nn.Module,
    training: Training,
    left_out: dict[str, str],
) -> dict[str, Planned]:
    """The routers to train, by the name of their row.

    Why one cannot be composed of these experts, or is not trained, goes into `left_out`.
    """
    planned = {}
    for name, (kind, options) in TRAINED.items():
        if name not in wanted:
            continue
        if name in OF_CLUSTERS:
            if training.clusters is None:
                left_out[name] = NEEDS_CLUSTERS
                continue
            options = {**options, "clusters": dict(training.clusters)}
        try:
            model = get_peft_model(empty, composed(experts, **options))
        except ValueError as error:  # a UserError is one
            left_out[name] = str(error)
            continue
        sizes = [each.numel() for each in model.parameters() if each.requires_grad]
        model.unload()
        if max(sizes) > MOST_PER_MODULE:
            left_out[name] = (
                f"its router would learn {max(sizes)} numbers in one module (experts times width), "
                f"and none of more than {MOST_PER_MODULE} is trained"
            )
            continue
        planned[name] = Planned(kind, options, sum(sizes))
    return planned


def add_trained(
    candidates: dict[str, Candidate],
    planned: Mapping[str, Planned],
    setting: Setting,
    state: PartialState,
) -> None:
    """Adds the trained routers to the candidates; those that the cache lacks are trained.

    `UserError` as of `train`, and where something is to be trained in several processes.
    """
    directories = {}
    for name, plan in planned.items():
        directories[name] = setting.directory / _name(name, plan, setting)
    lacking = [name for name, path in directories.items() if not path.exists()]
    if lacking and state.num_processes > 1:
        raise UserError(
            f"{lacking[0]} is yet to be trained, which one process does: run the command without "
            "`accelerate launch` first"
        )
    for name in lacking:
        _write(name, planned[name], setting, directories[name])
    for name, path in directories.items():
        _add(candidates, name, planned[name], path)


def _add(candidates: dict[str, Candidate], name: str, plan: Planned, path: Path) -> None:
    """Adds a router that lies in the cache, trained."""
    if plan.kind == PLAIN:
        subject = one_expert(name, str(path))
    else:
        subject = any_adapter(name, str(path), f"the trained {name} ({path})")
    notes = json.loads((path / _NOTES).read_text(encoding="utf-8"))
    candidate = Candidate(
        subject,
        plan.kind,
        size_of(str(path), name),
        note=f"trained at the learning rate {notes['learning_rate']:g}",
        directory=str(path),
        values=notes,
        parameters=plan.parameters,
    )
    add_adapter(candidates, name, candidate, str(path))


def _name(name: str, plan: Planned, setting: Setting) -> str:
    """The name of a trained router's directory, by all that its files depend on."""
    own = []
    for expert, path in setting.experts.items():
        own.append([expert, fingerprint(path, f"expert {expert!r} ({path})")])
    of_texts = []
    for split in ("train", "validation"):
        of_texts.append([[each.task, each.fingerprint] for each in setting.texts[split]])
    parts = [
        _VERSION,
        plan.options,
        setting.base,
        model_fingerprint(setting.base),
        own,
        of_texts,
        asdict(setting.training.recipe),
        list(setting.training.learning_rates),
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:16]}"


def _write(name: str, plan: Planned, setting: Setting, directory: Path) -> None:
    """Composes and trains a router, and writes it to a directory that does not exist.

    Until then it lies beside that, where an interrupted training goes on. One whose coefficients
    are constant becomes a plain LoRA.
    """
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    start = unfinished / "start"
    trained = unfinished / "trained"
    # One that was complete, but whose results were not kept any more.
    shutil.rmtree(trained, ignore_errors=True)
    if not start.exists():
        model = get_peft_model(setting.empty, composed(setting.experts, **plan.options))
        with staged(check_output(str(start))) as out:
            model.save_pretrained(str(out))
        model.unload()
    try:
        results = train(
            str(start),
            str(trained),
            [f"{task}={written.split(',')[0]}" for task, written in setting.tasks.items()],
            setting.reading,
            setting.training.recipe,
            learning_rates=setting.training.learning_rates,
            base=setting.base,
            rows=TokenRows(
                _that_teach(setting.texts["train"]), _that_teach(setting.texts["validation"])
            ),
            resume=is_interrupted(str(trained)),
        )
    except UserError as error:
        raise UserError(f"{name}: {error.message}") from error
    with staged(check_output(str(directory))) as out:
        if plan.kind == PLAIN:
            _write_lora(str(trained), setting.base, setting.reading, out)
        else:
            shutil.copytree(trained, out, dirs_exist_ok=True)
        (out / _NOTES).write_text(json.dumps(_notes(results)), encoding="utf-8")
    shutil.rmtree(unfinished)


def _that_teach(texts: Sequence[Texts]) -> dict[str, Dataset]:
    """By task the rows that have a token to predict."""
    rows = {}
    for each in texts:
        places = [place for place, count in enumerate(each.counts) if count]
        rows[each.task] = each.rows.select(places)
    return rows


def _write_lora(trained: str, base: str, reading: Reading, out: Path) -> None:
    """Writes the mixture of a router whose coefficients are constant as one LoRA."""
    config = load_adapter_config(trained)
    model = load_on_empty(trained, config, *base_of(base, config, reading), reading)
    model.to_lora(str(out))


def _notes(results: Sequence[Result]) -> dict[str, Any]:
    """The learning rate that was best on validation, and the loss of each there; None where the
    training diverged, for which JSON has no number.
    """
    losses = {}
    for result in results:
        loss = result.mean if math.isfinite(result.mean) else None
        losses[f"{result.learning_rate:g}"] = loss
    return {"learning_rate": results[0].learning_rate, "validation_losses": losses}
