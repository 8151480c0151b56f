"""The runs of the experiment, each of which is done once and kept as a file of JSON.

Of every seed: six single-task models, the seven configurations of Table 1, the soups of Tables 4
and 5, and the similarities of figures 2 and 4. A seed stands for the order of the rows; the
pretrained models are the same for all.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from caem_switch.switch import Pretraining, Shape
from caem_switch.texts import TASKS, Sizes, write_tasks
from mergekit_moe_ext import Reading, Recipe, count_usage, train
from mergekit_moe_ext.analysis import cka, layer_entropies, mean_entropies, task_scores

Record = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """A row of Table 1.

    experts: the number of experts of the model.
    source_experts: that of the single-task models that it is merged from; None for a baseline,
        which is fine-tuned as it was pretrained.
    ratio: the numbers of experts that the tasks give in every layer; by entropy if None.
    """

    experts: int
    source_experts: int | None = None
    ratio: tuple[int, ...] | None = None


CONFIGURATIONS = {
    "Baseline-8": Configuration(8),
    "Baseline-16": Configuration(16),
    "CAEM-8": Configuration(8, 8),
    "CAEM-8-to-16": Configuration(16, 8),
    "CAEM-16": Configuration(16, 16),
    "CAEM-8-Avg": Configuration(8, 8, (2, 3, 3)),
    "CAEM-16-Avg": Configuration(16, 16, (5, 5, 6)),
}
# Table 4, and Table 5, whose pairs all have CAEM-8-to-16.
SOUPS = [
    ("CAEM-8", "Baseline-8"),
    ("CAEM-8", "CAEM-8-Avg"),
    ("CAEM-8-Avg", "Baseline-8"),
    ("CAEM-16", "Baseline-16"),
    ("CAEM-16", "CAEM-16-Avg"),
    ("CAEM-16-Avg", "Baseline-16"),
    ("CAEM-8-to-16", "Baseline-16"),
    ("CAEM-8-to-16", "CAEM-16"),
    ("CAEM-8-to-16", "CAEM-16-Avg"),
]
# Figures 2 and 4: two configurations, and whether they are compared before training as well.
COMPARISONS = [
    ("CAEM-8", "Baseline-8", True),
    ("CAEM-16", "Baseline-16", True),
    ("CAEM-8-to-16", "CAEM-8", False),
    ("CAEM-8-to-16", "CAEM-16", False),
    ("CAEM-8-to-16", "Baseline-16", False),
]


@dataclass(frozen=True)
class Scale:
    """The sizes of data, models and trainings.

    batch: the number of rows of each task in a step.
    source_tokens, answer_tokens: the lengths to which inputs and targets are cut.
    """

    sizes: Sizes
    shape: Shape
    pretraining: Pretraining
    batch: int
    epochs: int
    learning_rate: float
    source_tokens: int
    answer_tokens: int

    @property
    def reading(self) -> Reading:
        return Reading(max_length=self.source_tokens, quiet=True)


SCALES = {
    "small": Scale(
        sizes=Sizes(24_000, 20, training=1200, validation=100, test=300),
        shape=Shape(width=64, heads=4, ffn=128, layers=4, vocabulary=2000),
        pretraining=Pretraining(held_out=200, steps=1200, batch=32, learning_rate=1e-3),
        batch=32,
        epochs=8,
        learning_rate=1e-3,
        source_tokens=36,
        answer_tokens=12,
    ),
    "quick": Scale(
        sizes=Sizes(60, 20, training=8, validation=4, test=4),
        shape=Shape(width=16, heads=2, ffn=16, layers=2, vocabulary=300),
        pretraining=Pretraining(held_out=4, steps=2, batch=4, learning_rate=3e-3),
        batch=4,
        epochs=1,
        learning_rate=1e-3,
        source_tokens=32,
        answer_tokens=4,
    ),
}


@dataclass(frozen=True)
class Seed:
    """The runs of one seed, in a folder of its own.

    bases: the pretrained models, by their number of experts.
    """

    number: int
    folder: Path
    texts: Path
    bases: Mapping[int, Path]
    scale: Scale

    def single_task(self, experts: int, task: str) -> Record:
        """A single-task model: its score on the test rows, in the best epoch by the validation."""
        name = f"single-{experts}-{task}"

        def run() -> Record:
            tasks = write_tasks(
                self._model(name).with_suffix(".yml"),
                self.texts,
                [task],
                self.scale.answer_tokens,
            )
            self._train(self.bases[experts], self._model(name), tasks, [task])
            return {"scores": self._test_scores(self._model(name), [task])}

        return self._once(name, run)

    def single_task_scores(self, experts: int) -> dict[str, float]:
        """The scores that the Overall Performance is measured by. A score of 0 counts as one right
        answer in a thousand, by which one can divide.
        """
        scores = {}
        for task in TASKS:
            score = self.single_task(experts, task)["scores"][f"{task}_score"]
            scores[task] = max(score, 0.001)
        return scores

    def multi_task(self, name: str) -> Record:
        """A configuration, fine-tuned on all tasks: its scores on the test rows, the entropies of
        what its routers choose, and the Overall Performance on the validation rows before the
        training and after each epoch.
        """
        configuration = CONFIGURATIONS[name]

        def run() -> Record:
            initial = self.initial(name)
            single = self.single_task_scores(configuration.experts)
            tasks = write_tasks(
                self._model(name).with_suffix(".yml"),
                self.texts,
                TASKS,
                self.scale.answer_tokens,
                single,
            )
            self._train(initial, self._model(name), tasks, TASKS)
            return {
                "scores": self._test_scores(self._model(name), TASKS, single),
                "epochs": _epochs(self._model(name)),
                "entropies": self._entropies(self._model(name)),
            }

        return self._once(name, run)

    def initial(self, name: str) -> Path:
        """What the multi-task training of a configuration starts from: a pretrained model, or the
        merge of three single-task models. A merge is an initialisation.
        """
        configuration = CONFIGURATIONS[name]
        if configuration.source_experts is None:
            return self.bases[configuration.experts]
        output = self._model(f"{name}-merged")
        if output.is_dir():
            return output
        models = []
        for place, task in enumerate(TASKS):
            self.single_task(configuration.source_experts, task)
            parameters: dict[str, Any] = {"usage": str(self._usage(configuration, task))}
            if configuration.ratio:
                parameters["experts"] = configuration.ratio[place]
            source = self._model(f"single-{configuration.source_experts}-{task}")
            models.append({"model": str(source), "parameters": parameters})
        merge(
            {
                "merge_method": "caem",
                "models": models,
                "parameters": {
                    "num_experts": configuration.experts,
                    "allocation": "fixed" if configuration.ratio else "entropy",
                },
                "dtype": "float32",
            },
            output,
        )
        return output

    def _usage(self, configuration: Configuration, task: str) -> Path:
        """The file of what a single-task model's routers choose on the validation rows (3.2)."""
        model = self._model(f"single-{configuration.source_experts}-{task}")
        path = model.with_suffix(".usage.json")
        if not path.is_file():
            usage = self._count(model, [task])
            usage.write(path)
        return path

    def soup(self, first: str, second: str) -> Record:
        """The scores of the mean of two models (Tables 4 and 5)."""

        def run() -> Record:
            # Both have as many experts, and so the same single-task models.
            single = self.single_task_scores(CONFIGURATIONS[first].experts)
            models = []
            for name in (first, second):
                self.multi_task(name)
                models.append({"model": str(self._model(name)), "parameters": {"weight": 0.5}})
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                soup = Path(scratch) / "soup"
                merge({"merge_method": "linear", "models": models, "dtype": "float32"}, soup)
                return {"scores": self._test_scores(soup, TASKS, single)}

        return self._once(f"soup of {first} and {second}", run)

    def similarity(self, first: str, second: str, *, is_initial: bool) -> Record:
        """The CKA of the layers of two models, per task and stack (figures 2 and 4)."""
        when = "before" if is_initial else "after"

        def run() -> Record:
            models = []
            for name in (first, second):
                self.multi_task(name)
                models.append(self.initial(name) if is_initial else self._model(name))
            record: Record = {}
            for task in TASKS:
                # Targets are short: with so few tokens the plain estimate is near 1 in any case.
                similarity = cka(
                    models[0],
                    models[1],
                    [str(self._rows(task))],
                    reading=self.scale.reading,
                    batch_size=50,
                    unbiased=True,
                )
                record[task] = {stack: similarity.same_layers(stack) for stack in similarity.stacks}
            return record

        return self._once(f"cka of {first} and {second}, {when}", run)

    def _train(self, model: Path, output: Path, tasks: Path, names: Sequence[str]) -> None:
        """Fine-tunes all of a model by the recipe of A.3, and keeps the best epoch."""
        if output.is_dir():
            return
        recipe = Recipe(
            learning_rate=self.scale.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.005,
            adam_beta1=0.9,
            adam_beta2=0.98,
            adam_epsilon=1e-16,
            num_train_epochs=self.scale.epochs,
            per_device_train_batch_size=self.scale.batch,
            per_device_eval_batch_size=50,
            mixing="per-task" if len(names) > 1 else "shuffled",
            max_target_length=self.scale.answer_tokens,
            load_best_model_at_end=True,
            save_total_limit=1,
            seed=self.number,
        )
        train(
            str(model),
            (),
            "all",
            output=str(output),
            recipe=recipe,
            reading=self.scale.reading,
            resume=Path(f"{output}.checkpoints").is_dir(),
            tasks=tasks,
        )

    def _test_scores(
        self, model: Path, names: Sequence[str], single: dict[str, float] | None = None
    ) -> dict[str, float]:
        """The scores on the test rows, and with the single-task scores the Overall Performance."""
        with tempfile.TemporaryDirectory() as scratch:
            tasks = write_tasks(
                Path(scratch) / "tasks.yml",
                self.texts,
                names,
                self.scale.answer_tokens,
                single,
                measured="test",
            )
            return task_scores(model, tasks, reading=self.scale.reading, batch_size=50)

    def _entropies(self, model: Path) -> dict[str, dict[str, float]]:
        """The mean normalised entropies of encoder, decoder and all layers, by task (Table 3)."""
        usage = self._count(model, TASKS)
        usage.write(model.with_suffix(".usage.json"))
        entropies = {}
        for name, of_task in usage.tasks.items():
            entropies[name] = mean_entropies(layer_entropies(of_task.layers))
        return entropies

    def _count(self, model: Path, names: Sequence[str]) -> Any:
        data = [f"{task}={self._rows(task)}" for task in names]
        return count_usage(str(model), data, reading=self.scale.reading, batch_size=50)

    def _rows(self, task: str) -> Path:
        return self.texts / f"{task}-validation.jsonl"

    def _model(self, name: str) -> Path:
        folder = self.folder / "models"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def _once(self, name: str, run: Callable[[], Record]) -> Record:
        """The record of a run, which is read if the run was done already."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text())
        click.echo(f"seed {self.number}: {name}", err=True)
        record = run()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1))
        partial.rename(path)
        return record


def _epochs(model: Path) -> list[float]:
    """The Overall Performance before a model's training and after each epoch, as the Trainer noted
    it.
    """
    history = json.loads((model / "trainer_state.json").read_text())["log_history"]
    measure = "eval_overall_performance"
    return [entry[measure] for entry in history if measure in entry]


def merge(config: dict[str, Any], output: Path) -> None:
    """Does what `mergekit-yaml` does, without a process of its own for each of many merges."""
    from mergekit.merge import run_merge

    parsed = MergeConfiguration.model_validate(config)
    options = MergeOptions(random_seed=0, quiet=True)
    run_merge(parsed, str(output), options, config_source=yaml.safe_dump(config))
