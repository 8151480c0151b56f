"""Reports of other adapters beside this one: private against clustered experts (Trade-offs 5.2,
figure 4).

They are of the same base model and the same texts, so that each fusion has a difference per task.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from _mergekit_moe_ext_common.checkpoints import damage
from _mergekit_moe_ext_common.errors import UserError
from peft_routing.fusion.cache import Texts
from peft_routing.fusion.selection import standard_error

REPORT = "report.json"


@dataclass(frozen=True)
class Other:
    """An earlier report.

    name: what it is called here.
    model: the sha256 of its base model.
    texts: by task the sha256 of what was measured.
    test: by fusion and task the test loss, in nats per token.
    """

    name: str
    model: str
    texts: dict[str, str]
    test: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Beside:
    """A fusion that another report has, too.

    name: that of the fusion.
    other: that of the other report.
    test: the other's test loss of each task, in the order of this report.
    difference: the mean over tasks of this test loss less the other one.
    standard_error: of that mean.
    """

    name: str
    other: str
    test: list[float]
    difference: float
    standard_error: float


def read_others(directories: Mapping[str, str]) -> list[Other]:
    """The reports in directories that `compare` wrote, by what they are called here.

    `UserError` for one that is missing, damaged, or of an earlier version.
    """
    others = []
    for name, directory in directories.items():
        path = Path(directory).expanduser() / REPORT
        where = f"--beside {name}={directory}"
        if not path.is_file():
            raise UserError(f"{where}: there is no {REPORT}; name a directory that compare wrote")
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            test = {}
            for row in content["rows"]:
                test[row["name"]] = dict(zip(content["tasks"], row["test"], strict=True))
            others.append(Other(name, content["model"], content["texts"], test))
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {damage(path, error)}; give its compare again, with the same --cache, "
                "which measures nothing anew"
            ) from error
    return others


def check_others(others: Sequence[Other], model: str, texts: Mapping[str, str]) -> None:
    """`UserError` where a report is of another base model or of other texts."""
    for other in others:
        if other.model != model:
            raise UserError(f"--beside {other.name}: that report is of another base model")
        for task in dict.fromkeys([*texts, *other.texts]):
            if texts.get(task) != other.texts.get(task):
                raise UserError(
                    f"--beside {other.name}: that report does not have the same texts of task "
                    f"{task!r}; reports are compared that have the same tasks"
                )


def texts_by_task(texts: Sequence[Texts]) -> dict[str, str]:
    """By task the sha256 of the token ids."""
    return {each.task: each.fingerprint for each in texts}


def beside(
    test: Mapping[str, Sequence[float]], tasks: Sequence[str], others: Sequence[Other]
) -> list[Beside]:
    """The fusions that this report and another have both, without the base model.

    `test` has the test loss of each task by fusion, in the order of `tasks`.
    """
    pairs = []
    for other in others:
        for name, losses in test.items():
            if name == "base" or name not in other.test:
                continue
            of_other = [other.test[name][task] for task in tasks]
            own = torch.tensor(losses, dtype=torch.float64)
            differences = own - torch.tensor(of_other, dtype=torch.float64)
            mean = differences.mean().item()
            pairs.append(Beside(name, other.name, of_other, mean, standard_error(differences)))
    return pairs
