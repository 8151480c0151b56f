"""Repeat WEMoE's and E-WEMoE's experiments at small scale: one ViT, four tasks of images.

    python examples/wemoe_images.py -o images/ --plot images/

1. Pretrain a ViT of 0.8 million parameters on emoji and letters K to Z. It is trained once and
   kept.
2. Fit a linear head per task on its features. The heads are not trained any further, like those
   that CLIP makes of the names of classes in the paper. Per seed and task, fine-tune the trunk:
   these four models are kept, too.
3. Merge them with mergekit's methods, those of `merging_baselines.py`, `wemoe` and `ewemoe`. Adapt
   the routers to the test inputs without their labels, as `mergekit-moe-ext adapt` does.
4. Write the accuracies (`*.json` in OUTPUT). Print the papers' tables and which of their orderings
   hold, and draw their figures.

Every accuracy is written as soon as it is measured, so the same command goes on after an
interruption. `--only` picks a part. What differs from the papers, besides the size: 100 steps of
adaptation on 8 images per task, not 1000 on 16; learning rates of 3e-4 for routers and 1e-2 for
constants, not 1e-3; four tasks, not eight. For unseen tasks there are two more, which none of the
models was fine-tuned on.
"""

import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import numpy as np
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from merging_baselines import (
    Classifier,
    State,
    diagonal_fisher,
    fisher_merge,
    gram_matrices,
    merge_parameters,
    regmean_merge,
    write_trimmed,
)
from PIL import Image
from real_data import cache_dir, written_at_once
from real_images import Images, pretraining, recipe, tasks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel
from verdicts import judge

from mergekit_moe_ext import (
    Adaptation,
    Reading,
    UserError,
    adapt,
)  # importing it registers the methods
from mergekit_moe_ext.analysis import heat_map, load_ensemble, pyplot, read_ensemble

TASKS = ["mnist", "animals", "digits8", "letters"]
UNSEEN = ["numerals", "small letters"]
SIDE = 28
HIDDEN = 128
SHAPE = {
    "image_size": SIDE,
    "patch_size": 7,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train: AdamW, a cosine down to zero."""

    steps: int
    batch: int
    learning_rate: float


PRETRAINING = Recipe(steps=2000, batch=64, learning_rate=1e-3)
FINE_TUNING = Recipe(steps=1500, batch=32, learning_rate=1e-3)
TOGETHER = Recipe(steps=1500, batch=32, learning_rate=1e-3)  # traditional multi-task learning
MEASURED = 300  # test images per task, which routers are adapted to, too
ROUTED_LOOKED_AT = 100  # images of these by which the routers' choices are judged
ADAPTATION = {"steps": 100, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 64}
# The papers' is 1e-3. Adam moves a number by its learning rate per step at most: where the
# coefficients themselves are what is learned, that would take them nowhere in a tenth of the
# papers' steps. For routers it is too fast here: see figure 4, by which, with one seed, this one
# was chosen.
LEARNING_RATE = {"routers": 3e-4, "constants": 1e-2}
CALIBRATED = 256  # training images per task for Fisher merging and RegMean

STATIC: dict[str, dict[str, Any]] = {
    "Weight averaging": {"merge_method": "linear", "parameters": {"weight": 1.0}},
    "Task arithmetic": {
        "merge_method": "task_arithmetic",
        "parameters": {"weight": 1.0, "lambda": 0.3},
    },
    "Ties-Merging": {
        "merge_method": "ties",
        "parameters": {"weight": 1.0, "density": 0.2, "normalize": False, "lambda": 0.3},
    },
}


def routed(method: str = "wemoe", **parameters: Any) -> dict[str, Any]:
    """The merge method and parameters of a model with routers, at the papers' lambda."""
    return {"merge_method": method, "parameters": {"lambda": 0.3, "init_lambda": 0.3, **parameters}}


ROUTED = {
    "AdaMerging (task)": routed(upscale="all", router_layers=0, shared_router=True),
    "AdaMerging (layer)": routed(upscale="all", router_layers=0),
    "WEMoE (0-layer)": routed(router_layers=0),
    "WEMoE (2-layer)": routed(),
    "E-WEMoE 0.9": routed("ewemoe"),
    "WEMoE (2-layer), attention + MLP": routed(upscale="attention+mlp"),
}
# The rows of the same names without the two signs, on task vectors that TIES has trimmed.
TRIMMED = ["AdaMerging++ (task)", "AdaMerging++ (layer)"]
STRATEGIES = {
    "Entire block": routed(upscale="block", router_layers=1),
    "Attention + MLP": routed(upscale="attention+mlp", router_layers=1),
    "MLP only": routed(router_layers=1),
}
SPARSE = {
    "WEMoE, sparse 0.9": routed(sparsity=0.9),
    "WEMoE, shared router": routed(shared_router=True),
    **{
        f"E-WEMoE {sparsity}": routed("ewemoe", sparsity=sparsity)
        for sparsity in (0.7, 0.8, 0.95, 0.99)
    },
}
COMPARED = [
    "Task arithmetic",
    "Ties-Merging",
    "AdaMerging (layer)",
    "WEMoE (0-layer)",
    "WEMoE (2-layer)",
]
RATES = (1e-2, 1e-3, 3e-4, 1e-4)
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LAMBDAS_ROUTED = (0.1, 0.3, 0.6, 1.0)  # each takes an adaptation
CORRUPTIONS = [
    "motion_blur",
    "impulse_noise",
    "gaussian_noise",
    "pixelate",
    "spatter",
    "contrast",
    "jpeg_compression",
]
SEVERITY = 3  # of the corruptions, from 1 to 5
ENLARGED = 64  # pixels of a side while an image is corrupted
Accuracies = dict[str, float]  # by task


def shortened(images: Images) -> Images:
    """The same images with fewer to test on."""
    return replace(images, test=images.test[:MEASURED], test_labels=images.test_labels[:MEASURED])


def pixels(images: np.ndarray | Tensor) -> Tensor:
    """Images as the model sees them: of bytes (n, 28, 28), (n, 3, 28, 28) in [-1, 1]. The processor
    that is saved with a model does the same.
    """
    return (torch.as_tensor(images).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def train(
    model: Any, parts: Sequence[tuple[Images, Tensor | None]], how: Recipe, seed: int, desc: str
) -> None:
    """Trains the parameters that require gradients, on one part after the other.

    Each part has its images and a head, (classes, hidden + 1), which is not trained, or None for
    the model's own head.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=how.learning_rate
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.learning_rate, how.steps, pct_start=0.1
    )
    model.train()
    for step in tqdm(range(how.steps), desc=desc, mininterval=5):
        data, head = parts[step % len(parts)]
        sample = torch.randint(len(data.train), (how.batch,), generator=generator).numpy()
        x = pixels(data.train[sample])
        if head is None:  # in pretraining half of the images are inverted, light on dark
            x = x * (torch.randint(2, (how.batch, 1, 1, 1), generator=generator) * 2 - 1)
        features = model.vit(x).last_hidden_state[:, 0]
        logits = model.classifier(features) if head is None else with_head(features, head)
        loss = functional.cross_entropy(logits, torch.as_tensor(data.train_labels[sample]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def with_head(features: Tensor, head: Tensor) -> Tensor:
    """The logits of a head, (n, classes), whose bias is its last column."""
    return functional.linear(features, head[:, :-1], head[:, -1])


@torch.inference_mode()
def features_of(trunk: Callable[[Tensor], Tensor], images: np.ndarray) -> Tensor:
    """The features that a head reads, (n, hidden), from a trunk that gives them for a batch."""
    batches = np.array_split(images, -(-len(images) // 250))
    return torch.cat([trunk(pixels(batch)) for batch in batches])


def features_with(model: torch.nn.Module, x: Tensor) -> Tensor:
    """The features that a head reads, (n, hidden), of pixels."""
    return model.eval()(x).last_hidden_state[:, 0]


def trunk_of(model: ViTModel) -> Callable[[Tensor], Tensor]:
    """A function from pixels to the features that a head reads."""
    return partial(features_with, model)


def accuracies(
    trunk: Callable[[Tensor], Tensor], heads: dict[str, Tensor], data: dict[str, Images]
) -> Accuracies:
    """The accuracy on the test part of every task that has a head here."""
    measured = {}
    for task, head in heads.items():
        predictions = with_head(features_of(trunk, data[task].test), head).argmax(-1)
        correct = predictions == torch.as_tensor(data[task].test_labels)
        measured[task] = correct.float().mean().item()
    return measured


def fit_head(trunk: Callable[[Tensor], Tensor], data: Images, seed: int) -> Tensor:
    """A linear probe, (classes, hidden + 1), the bias last: logistic regression with a little
    weight decay.
    """
    features = features_of(trunk, data.train).clone()
    labels = torch.as_tensor(data.train_labels)
    torch.manual_seed(seed)
    head = torch.nn.Linear(features.shape[1], len(data.classes))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(features), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.cat([head.weight, head.bias[:, None]], dim=1).detach()


def save(model: Any, classes: list[str], folder: Path) -> None:
    """Saves a model as fine-tunes are on the Hub: weights, names of classes, and the processor of
    its images.
    """
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    model.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def folder_of(*parts: Any) -> Path:
    """The directory for what depends on these settings and on the images."""
    settings = json.dumps([recipe(), SHAPE, *(asdict(part) for part in parts)])
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return cache_dir() / f"wemoe-images-{key}"


def make_base() -> Path:
    """The pretrained model, which is trained once and kept."""
    folder = folder_of(PRETRAINING) / "base"
    if not folder.is_dir():
        data = pretraining()
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**SHAPE, num_labels=len(data.classes)))
        with written_at_once(folder) as unfinished:
            train(model, [(data, None)], PRETRAINING, 0, "pretraining")
            save(model, data.classes, unfinished)
    return folder


@dataclass(frozen=True)
class Sources:
    """The models that one seed's merges are made of."""

    seed: int
    base: Path
    models: dict[str, Path]  # by task
    trunks: dict[str, Path]  # the same without heads, and "base": what a stock method merges
    heads: dict[str, Tensor]  # also of the unseen tasks


def make_sources(base: Path, data: dict[str, Images], seed: int) -> Sources:
    """The heads and fine-tunes of a seed. They are trained once and kept."""
    root = folder_of(PRETRAINING, FINE_TUNING) / f"seed{seed}"
    heads_file = root / "heads" / "heads.safetensors"
    if not heads_file.parent.is_dir():
        trunk = trunk_of(ViTModel.from_pretrained(base, add_pooling_layer=False))
        with written_at_once(heads_file.parent) as unfinished:
            fitted = {task: fit_head(trunk, data[task], seed) for task in data}
            save_file(fitted, unfinished / heads_file.name)
    heads = load_file(heads_file)
    for task in TASKS:
        if not (root / task).is_dir():
            model = ViTForImageClassification.from_pretrained(base)
            with written_at_once(root / task) as unfinished:
                train(model, [(data[task], heads[task])], FINE_TUNING, seed, f"seed {seed}, {task}")
                model.classifier = torch.nn.Linear(HIDDEN, len(data[task].classes))
                with torch.no_grad():
                    model.classifier.weight.copy_(heads[task][:, :-1])
                    model.classifier.bias.copy_(heads[task][:, -1])
                model.config.num_labels = len(data[task].classes)
                save(model, data[task].classes, unfinished)
    # Stock mergekit looks for the names that transformers has in memory, and passes over others
    # without a word.
    trunks = {"base": root / "trunks" / "base", **{task: root / "trunks" / task for task in TASKS}}
    for name, folder in trunks.items():
        if not folder.is_dir():
            whole = base if name == "base" else root / name
            with written_at_once(folder) as unfinished:
                trunk = ViTModel.from_pretrained(whole, add_pooling_layer=False)
                trunk.save_pretrained(unfinished, save_original_format=False)
    return Sources(seed, base, {task: root / task for task in TASKS}, trunks, heads)


def make_together(sources: Sources, data: dict[str, Images]) -> Path:
    """The trunk of traditional multi-task learning: one for all tasks, with the same heads."""
    folder = folder_of(PRETRAINING, TOGETHER) / f"seed{sources.seed}" / "together"
    if not folder.is_dir():
        model = ViTForImageClassification.from_pretrained(sources.base)
        with written_at_once(folder) as unfinished:
            parts = [(data[task], sources.heads[task]) for task in TASKS]
            train(model, parts, TOGETHER, sources.seed, f"seed {sources.seed}, all tasks")
            model.vit.save_pretrained(unfinished)
    return folder


def merge(
    method: dict[str, Any], base: Path, models: Iterable[Path], output: Path, seed: int
) -> Path:
    """Merges as `mergekit-yaml` does, and returns the output: `method` is the merge method and its
    parameters.
    """
    from mergekit.merge import run_merge

    config = {
        **method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }
    text = yaml.safe_dump({**config, "dtype": "float32"})
    # There is no tokenizer, but our methods copy the image processor's file along with it.
    has_processor = "wemoe" in method["merge_method"]
    options = MergeOptions(quiet=True, random_seed=seed, copy_tokenizer=has_processor)
    parsed = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(parsed, str(output), options, text)
    return output


def write_tests(data: dict[str, Images], folder: Path) -> list[str]:
    """Writes the test images as files that `adapt` reads, and returns its `--data` of each task.
    The labels are for measuring.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        columns = {"image": ImageFeature(), "label": ClassLabel(names=data[task].classes)}
        rows = {
            "image": [Image.fromarray(one) for one in data[task].test],
            "label": data[task].test_labels.tolist(),
        }
        Dataset.from_dict(rows, features=Features(columns)).to_parquet(folder / f"{task}.parquet")
    return [f"{task}={folder / task}.parquet" for task in TASKS]


@dataclass
class Bench:
    """One seed's sources, and the images that merges are adapted to and measured on."""

    sources: Sources
    data: dict[str, Images]
    tests: list[str]  # the `--data` of the test images, as `write_tests` returns it
    scratch: Path
    adaptation: dict[str, Any]

    def dense(self, method: dict[str, Any]) -> ViTModel:
        """A stock merge of the trunks, since heads differ from task to task."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            trunks = self.sources.trunks
            models = [trunks[task] for task in TASKS]
            merged = merge(
                method, trunks["base"], models, Path(folder) / "merged", self.sources.seed
            )
            return ViTModel.from_pretrained(merged, add_pooling_layer=False)

    def measure(self, trunk: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The accuracies of a trunk with every head."""
        return accuracies(trunk, self.sources.heads, self.data)

    def trunk(self, path: Path) -> dict[str, Any]:
        """The accuracies of the trunk in a directory."""
        return self.measure(trunk_of(ViTModel.from_pretrained(path, add_pooling_layer=False)))

    def static(self, method: dict[str, Any]) -> dict[str, Any]:
        """The accuracies of a stock merge."""
        return self.measure(trunk_of(self.dense(method)))

    def classifiers(self) -> dict[str, Classifier]:
        """The fine-tunes with their heads, which are not among their parameters, by task."""
        by_task = {}
        for task in TASKS:
            model = ViTModel.from_pretrained(self.sources.trunks[task], add_pooling_layer=False)
            by_task[task] = Classifier(model, features_with, self.sources.heads[task])
        return by_task

    def fisher(self) -> dict[str, Any]:
        """The accuracies of Fisher merging."""
        fishers = []
        for task, classifier in self.classifiers().items():
            x = pixels(self.data[task].train[:CALIBRATED])
            labels = torch.as_tensor(self.data[task].train_labels[:CALIBRATED])
            fishers.append(diagonal_fisher(classifier, x, labels))
        return self.of_parameters(partial(fisher_merge, fishers=fishers))

    def regmean(self) -> dict[str, Any]:
        """The accuracies of RegMean."""
        grams = []
        for task, classifier in self.classifiers().items():
            grams.append(gram_matrices(classifier, pixels(self.data[task].train[:CALIBRATED])))
        return self.of_parameters(partial(regmean_merge, grams=grams))

    def of_parameters(self, merged: Callable[[list[State]], State]) -> dict[str, Any]:
        """The accuracies of a merge of the parameters of all fine-tunes."""
        trunk = merge_parameters(list(self.classifiers().values()), merged)
        return self.measure(partial(features_with, trunk))

    def trimmed(self, method: dict[str, Any]) -> dict[str, Any]:
        """The row of `adapted`, of task vectors that TIES has trimmed."""
        density = STATIC["Ties-Merging"]["parameters"]["density"]
        sources = self.sources
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            models = write_trimmed(
                sources.base, sources.models, "classifier.", density, Path(folder)
            )
            return replace(self, sources=replace(sources, models=models)).adapted(method)

    def own(self) -> dict[str, Any]:
        """The accuracies of each task's own fine-tune."""
        measured: Accuracies = {}
        for task, path in self.sources.models.items():
            trunk = trunk_of(ViTModel.from_pretrained(path, add_pooling_layer=False))
            measured |= accuracies(trunk, {task: self.sources.heads[task]}, self.data)
        return measured

    def merged_sources(self, method: dict[str, Any], output: Path) -> Path:
        """A merge of the fine-tunes with their heads, by a method of this package."""
        sources = self.sources
        return merge(method, sources.base, sources.models.values(), output, sources.seed)

    def adapted(
        self, method: dict[str, Any], eval_steps: int | None = None, **settings: Any
    ) -> dict[str, Any]:
        """The accuracies of a merge that was adapted to the tests, with the mean entropy before and
        after as `entropy`, and what its routers choose as `coefficients`.

        With `eval_steps` the accuracies in between, as `adapt` measured them, are there as `curve`.
        """
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            merged = self.merged_sources(method, Path(folder) / "merged")
            has_routers = method["parameters"].get("router_layers", 2) > 0
            rate = LEARNING_RATE["routers" if has_routers else "constants"]
            options = {"learning_rate": rate, **self.adaptation, **settings}
            how = Adaptation(**options, seed=self.sources.seed, eval_steps=eval_steps)
            output = Path(folder) / "adapted"
            results = adapt(
                str(merged),
                self.tests,
                output=str(output),
                adaptation=how,
                reading=Reading(quiet=True),
            )
            assert results is not None  # this is the only process
            history = json.loads((output / "trainer_state.json").read_text())["log_history"]
            model: Any = load_ensemble(str(output), *read_ensemble(str(output))).eval()
        row: dict[str, Any] = {task: results[task]["accuracy"][1] for task in TASKS}
        entropies = [results[task]["entropy"] for task in TASKS]
        row["entropy"] = [statistics.mean(column) for column in zip(*entropies, strict=True)]
        if model.ensembling.router_layers:
            looked_at = {}
            for task in TASKS:
                looked_at[task] = pixels(self.data[task].test[:ROUTED_LOOKED_AT])
            row["coefficients"] = coefficients_of(model, looked_at)
        if eval_steps:
            row["curve"] = curve_of(history)

        # The heads of unseen tasks are not in the model, which gives their features in their place.
        model.classifier = torch.nn.Identity()

        def features(x: Tensor) -> Tensor:
            return model(pixel_values=x, task=TASKS[0]).logits

        unseen = {task: self.sources.heads[task] for task in UNSEEN}
        return row | accuracies(features, unseen, self.data)

    def oracle(self, method: dict[str, Any]) -> dict[str, Any]:
        """The accuracies where nothing is adapted and every router gives the images' own task the
        coefficient 1, others 0.
        """
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            merged = self.merged_sources(method, Path(folder) / "merged")
            model: Any = load_ensemble(str(merged), *read_ensemble(str(merged))).eval()
        model.classifier = torch.nn.Identity()
        measured: Accuracies = {}
        for index, task in enumerate(TASKS):
            own_task = torch.zeros(1, len(model.ensembling.groups), len(TASKS))
            own_task[..., index] = 1

            def features(x: Tensor, own_task: Tensor = own_task) -> Tensor:
                coefficients = own_task.expand(len(x), -1, -1)
                return model(pixel_values=x, task=TASKS[0], coefficients=coefficients).logits

            measured |= accuracies(features, {task: self.sources.heads[task]}, self.data)
        return measured


@torch.inference_mode()
def coefficients_of(model: Any, images: Mapping[str, Tensor]) -> dict[str, Any]:
    """The mean of each coefficient, and how often each is the largest, by task: (blocks, tasks).
    Images are as the model sees them.
    """
    by_task = {}
    for task, x in images.items():
        coefficients = model.coefficients(pixel_values=x, task=task)
        largest = functional.one_hot(coefficients.argmax(-1), coefficients.shape[-1]).float()
        by_task[task] = {"mean": coefficients.mean(0).tolist(), "first": largest.mean(0).tolist()}
    return by_task


def curve_of(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The average accuracy by step, from the Trainer's log."""
    by_step: dict[int, list[float]] = {}
    for entry in history:
        measured = [value for key, value in entry.items() if key.endswith("_accuracy")]
        if measured:
            by_step.setdefault(entry["step"], []).extend(measured)
    return {str(step): statistics.mean(values) for step, values in sorted(by_step.items())}


class Results:
    """The measurements of one part, by row and seed. Each seed has a file, which is written anew
    with each row.
    """

    def __init__(self, folder: Path, part: str, settings: Any):
        self.folder = folder
        self.part = part
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        self.cells: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted(folder.glob(f"{part}-*.json")):
            content = json.loads(path.read_text())
            if content["settings"] != self.settings:
                raise UserError(f"{path} is of other settings; remove it or name another directory")
            seed = int(path.stem.rpartition("-")[2])
            for row, cell in content["rows"].items():
                self.cells.setdefault(row, {})[seed] = cell

    def once(self, row: str, seed: int, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures a row, unless it was measured with this seed before."""
        of_row = self.cells.setdefault(row, {})
        if seed in of_row:
            return
        of_row[seed] = measure()
        rows = {name: seeds[seed] for name, seeds in self.cells.items() if seed in seeds}
        unfinished = self.folder / f"{self.part}-{seed}.partial"
        unfinished.write_text(
            json.dumps({"settings": self.settings, "rows": rows}, indent=1) + "\n"
        )
        unfinished.replace(unfinished.with_suffix(".json"))
        message = f"{self.part}, seed {seed}, {row}: {average(of_row[seed]):.3f}"
        tqdm.write(message, file=sys.stderr)


def average(accuracies_of: dict[str, Any], names: Sequence[str] = TASKS) -> float:
    """The mean accuracy over these tasks."""
    return statistics.mean(accuracies_of[task] for task in names)


def table2(bench: Bench, results: Results) -> None:
    """Measures the rows of Tables 2 and 4, from which figures 11 and 12 are drawn, too."""
    sources = bench.sources
    seed = bench.sources.seed
    results.once("Pre-trained", seed, partial(bench.trunk, sources.trunks["base"]))
    results.once("Individual", seed, bench.own)
    for row, method in STATIC.items():
        results.once(row, seed, partial(bench.static, method))
    results.once("Fisher merging", seed, bench.fisher)
    results.once("RegMean", seed, bench.regmean)
    for row, method in ROUTED.items():
        results.once(row, seed, partial(bench.adapted, method))
    for row in TRIMMED:
        results.once(row, seed, partial(bench.trimmed, ROUTED[row.replace("++", "")]))
    with_labels = partial(bench.adapted, ROUTED["WEMoE (2-layer)"], objective="supervised")
    results.once("WEMoE (2-layer), with labels", seed, with_labels)
    results.once("Traditional MTL", seed, lambda: bench.trunk(make_together(sources, bench.data)))


def table6(bench: Bench, results: Results) -> None:
    """Measures the rows of Table 6: what is upscaled."""
    for row, method in STRATEGIES.items():
        results.once(f"{row}, own task's", bench.sources.seed, partial(bench.oracle, method))
        results.once(row, bench.sources.seed, partial(bench.adapted, method))


def sparsity(bench: Bench, results: Results) -> None:
    """Measures what E-WEMoE is made of, and how much it can drop."""
    for row, method in SPARSE.items():
        results.once(row, bench.sources.seed, partial(bench.adapted, method))


def figure4(bench: Bench, results: Results) -> None:
    """Measures the curves of figure 4: accuracy by learning rate and step."""
    method = ROUTED["WEMoE (2-layer)"]
    for rate in RATES:
        measure = partial(bench.adapted, method, eval_steps=25, learning_rate=rate)
        results.once(f"{rate:g}", bench.sources.seed, measure)


def figure5(bench: Bench, results: Results) -> None:
    """Measures the curves of figure 5: accuracy by lambda."""
    seed = bench.sources.seed
    for row in ("Task arithmetic", "Ties-Merging"):
        for scale in LAMBDAS:
            method = scaled(STATIC[row], scale)
            results.once(f"{row}, {scale}", seed, partial(bench.static, method))
    for row in ("WEMoE (0-layer)", "WEMoE (2-layer)"):
        for scale in LAMBDAS_ROUTED:
            method = scaled(ROUTED[row], scale)
            results.once(f"{row}, {scale}", seed, partial(bench.adapted, method))


def scaled(method: dict[str, Any], scale: float) -> dict[str, Any]:
    """The same method with another lambda."""
    parameters = method["parameters"]
    lambdas = dict.fromkeys({"lambda", "init_lambda"} & parameters.keys(), scale)
    return {**method, "parameters": {**parameters, **lambdas}}


def table5(bench: Bench, results: Results) -> None:
    """Measures the rows of Table 5, on corrupted test images."""
    for corruption in CORRUPTIONS:
        data = corrupted(bench.data, corruption)
        tests = write_tests(data, bench.scratch / corruption)
        there = replace(bench, data=data, tests=tests)
        for row in COMPARED:
            if row in STATIC:
                measure = partial(there.static, STATIC[row])
            else:
                measure = partial(there.adapted, ROUTED[row])
            results.once(f"{row}, {corruption}", bench.sources.seed, measure)


def corrupted(data: dict[str, Images], corruption: str) -> dict[str, Images]:
    """The images with the test parts of the four tasks corrupted as in Hendrycks and Dietterich, at
    one severity.

    That is done at 64 pixels a side, since the library takes no images below 32 pixels.
    """
    try:
        from imagecorruptions import corrupt
        from imagecorruptions.corruptions import impulse_noise
    except ImportError as error:
        raise UserError(
            "corruptions need imagecorruptions: pip install 'mergekit-moe-ext[corruptions]'"
        ) from error

    def worse(image: np.ndarray) -> np.ndarray:
        large = Image.fromarray(image).resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC)
        coloured = np.asarray(large.convert("RGB"))
        if corruption == "impulse_noise":
            # This one draws from a generator of its own, to which `corrupt` gives no seed.
            damaged = np.uint8(impulse_noise(coloured, SEVERITY, seed=np.random.randint(2**31)))
        else:
            damaged = corrupt(coloured, severity=SEVERITY, corruption_name=corruption)
        grey = Image.fromarray(damaged).convert("L")
        small = grey.resize((image.shape[1], image.shape[0]), Image.Resampling.BOX)
        return np.asarray(small)

    np.random.seed(0)  # the library draws from this generator
    with_corrupted = dict(data)
    for task in TASKS:
        test = np.stack([worse(image) for image in data[task].test])
        with_corrupted[task] = replace(data[task], test=test)
    return with_corrupted


def percent(values: Sequence[float]) -> str:
    """The mean and the standard deviation over seeds, in percent."""
    spread = f" ±{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def markdown(results: Results, rows: Iterable[str], columns: Mapping[str, Sequence[str]]) -> str:
    """A line per row that was measured; a column is the average over its tasks."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        seeds = results.cells.get(row, {})
        if seeds:
            cells = []
            for names in columns.values():
                cells.append(percent([average(cell, names) for cell in seeds.values()]))
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claim(
    results: Results, better: str, worse: str, names: Sequence[str] = TASKS, where: str = ""
) -> list[str]:
    """A line that says whether one row is above another on average, by the rule of `verdicts.py`;
    no line if one of them was not measured.
    """
    higher = results.cells.get(better, {})
    lower = results.cells.get(worse, {})
    differences = []
    for seed in higher:
        if seed in lower:
            differences.append([higher[seed][name] - lower[seed][name] for name in names])
    if not differences:
        return []
    return [f"{better} above {worse}{where}: {judge(differences).text()}"]


def text_of_table2(results: Results) -> str:
    """Tables 2 and 4, each with the papers' orderings."""
    single = {task: [task] for task in TASKS}
    everything = [
        "Pre-trained",
        "Individual",
        "Traditional MTL",
        *STATIC,
        "Fisher merging",
        "RegMean",
        *ROUTED,
        *TRIMMED,
        "WEMoE (2-layer), with labels",
    ]
    claims = [
        ("Individual", "Pre-trained"),
        ("Individual", "Traditional MTL"),
        ("Weight averaging", "Pre-trained"),
        ("Task arithmetic", "Weight averaging"),
        ("Fisher merging", "Weight averaging"),
        ("RegMean", "Fisher merging"),
        ("Ties-Merging", "Task arithmetic"),
        ("Ties-Merging", "AdaMerging (task)"),
        ("AdaMerging++ (task)", "AdaMerging (task)"),
        ("AdaMerging++ (layer)", "AdaMerging (layer)"),
        ("AdaMerging (layer)", "AdaMerging (task)"),
        ("AdaMerging (layer)", "Ties-Merging"),
        ("AdaMerging (layer)", "WEMoE (0-layer)"),
        ("WEMoE (0-layer)", "Task arithmetic"),
        ("WEMoE (2-layer)", "WEMoE (0-layer)"),
        ("WEMoE (2-layer)", "Task arithmetic"),
        ("WEMoE (2-layer)", "AdaMerging (layer)"),
        ("WEMoE (2-layer)", "Traditional MTL"),
        ("Individual", "WEMoE (2-layer)"),
        ("E-WEMoE 0.9", "AdaMerging (layer)"),
        ("WEMoE (2-layer), attention + MLP", "AdaMerging (layer)"),
    ]
    unseen = [
        ("WEMoE (2-layer)", "AdaMerging (layer)"),
        ("AdaMerging (layer)", "WEMoE (0-layer)"),
        ("WEMoE (0-layer)", "Task arithmetic"),
        ("Task arithmetic", "Ties-Merging"),
    ]
    lines_of_table2 = []
    for better, worse in claims:
        lines_of_table2 += claim(results, better, worse)
    lines_of_table4 = []
    for better, worse in unseen:
        lines_of_table4 += claim(results, better, worse, names=UNSEEN, where=" on unseen tasks")
    columns_of_table4 = {"seen": TASKS, **{task: [task] for task in UNSEEN}, "unseen": UNSEEN}
    parts = [
        "Table 2",
        markdown(results, everything, {**single, "average": TASKS}),
        "\n".join(lines_of_table2),
        "Table 4",
        markdown(results, ["Pre-trained", *COMPARED], columns_of_table4),
        "\n".join(lines_of_table4),
    ]
    return "\n\n".join(parts)


def text_of_table6(results: Results) -> str:
    """Table 6, and the paper's orderings."""
    rows = [*STRATEGIES, *(f"{row}, own task's" for row in STRATEGIES)]
    single = {task: [task] for task in TASKS}
    table = markdown(results, rows, {**single, "average": TASKS})
    lines = claim(results, "Attention + MLP", "MLP only") + claim(
        results, "MLP only", "Entire block"
    )
    return "\n\n".join(["Table 6 (routers of one layer)", table, "\n".join(lines)])


def text_of_sparsity(results: Results) -> str:
    """The table of E-WEMoE and its parts."""
    single = {task: [task] for task in TASKS}
    return "E-WEMoE\n\n" + markdown(results, SPARSE, {**single, "average": TASKS})


def text_of_figure4(results: Results) -> str:
    """A line per learning rate."""
    lines = ["Figure 4: the average accuracy of WEMoE (2-layer) by learning rate and step"]
    for rate, seeds in results.cells.items():
        curves = [cell["curve"] for cell in seeds.values()]
        means = []
        for step in curves[0]:
            means.append(f"{step}: {percent([curve[step] for curve in curves])}")
        lines.append(f"{rate}: " + ", ".join(means))
    return "\n".join(lines)


def text_of_figure5(results: Results) -> str:
    """A line per method, a column per lambda, and the paper's orderings."""
    lines = ["Figure 5: the average accuracy by lambda", ""]
    lines += ["| | " + " | ".join(map(str, LAMBDAS)) + " |", "|---|" + "---:|" * len(LAMBDAS)]
    for row in ("Task arithmetic", "Ties-Merging", "WEMoE (0-layer)", "WEMoE (2-layer)"):
        texts = []
        for scale in LAMBDAS:
            averages = [average(cell) for cell in results.cells.get(f"{row}, {scale}", {}).values()]
            texts.append(percent(averages) if averages else "")
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    for scale in LAMBDAS_ROUTED:
        for row in ("Task arithmetic", "Ties-Merging", "WEMoE (0-layer)"):
            lines += claim(results, f"WEMoE (2-layer), {scale}", f"{row}, {scale}")
    return "\n".join(lines)


def text_of_table5(results: Results) -> str:
    """Table 5, a part per corruption, and the paper's orderings."""
    parts = ["Table 5"]
    single = {task: [task] for task in TASKS}
    for corruption in CORRUPTIONS:
        rows = [f"{row}, {corruption}" for row in COMPARED]
        parts.append(markdown(results, rows, {**single, "average": TASKS}))
        lines = []
        for row in rows[:-1]:
            lines += claim(results, f"WEMoE (2-layer), {corruption}", row)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw_curves(results: Results, path: Path) -> None:
    """Draws figure 4: the mean over seeds, and the range from the least to the greatest."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for rate, seeds in results.cells.items():
        curves = [cell["curve"] for cell in seeds.values()]
        steps = [int(step) for step in curves[0]]
        _band(axes, steps, [list(curve.values()) for curve in curves], rate)
    axes.set_xlabel("steps")
    _finish(axes, figure, path, "learning rate")


def draw_lambdas(results: Results, path: Path) -> None:
    """Draws figure 5: the mean over seeds, and the range from the least to the greatest."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for row in ("Task arithmetic", "Ties-Merging", "WEMoE (0-layer)", "WEMoE (2-layer)"):
        by_lambda = {scale: results.cells.get(f"{row}, {scale}", {}) for scale in LAMBDAS}
        seeds = sorted(set().union(*by_lambda.values()))
        # only what was measured with every seed, so that the curves have the same points
        complete = [scale for scale, cells in by_lambda.items() if len(cells) == len(seeds)]
        curves = []
        for seed in seeds:
            curves.append([average(by_lambda[scale][seed]) for scale in complete])
        if curves:
            _band(axes, complete, curves, row)
    axes.set_xlabel("λ")
    _finish(axes, figure, path, None)


def _band(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], label: str) -> None:
    """The mean of curves as a line, and their range as a band around it, in percent."""
    values = 100 * np.array(curves)
    (line,) = axes.plot(x, values.mean(axis=0), marker="o", ms=3, label=label)
    lowest = values.min(axis=0)
    highest = values.max(axis=0)
    axes.fill_between(x, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)


def _finish(axes: Any, figure: Any, path: Path, title: str | None) -> None:
    """Labels the axes and writes the figure."""
    axes.set_ylabel("average accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


def draw_routing(results: Results, path: Path, first_block: int = 0) -> None:
    """Draws figures 11 and 12: mean coefficients, and how often each is the largest; by task, a
    line per block, of which the first has this number in the network.
    """
    plt = pyplot()
    seeds = [cell["coefficients"] for cell in results.cells["WEMoE (2-layer)"].values()]
    blocks = len(seeds[0][TASKS[0]]["mean"])
    size = (2.5 * len(TASKS), 2 + 0.6 * blocks)
    figure, panels = plt.subplots(2, len(TASKS), figsize=size, sharex=True, layout="constrained")
    titles = {"mean": "coefficients", "first": "largest"}
    for line, (kind, title) in zip(panels, titles.items(), strict=True):
        for axes, task in zip(line, TASKS, strict=True):
            means = np.mean([of_seed[task][kind] for of_seed in seeds], axis=0)
            heat_map(axes, means.tolist(), 1)
            for (y, x), value in np.ndenumerate(means):
                colour = "white" if value > 0.6 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_xticks(range(len(TASKS)), TASKS, rotation=30)
            axes.set_yticks(range(blocks), range(first_block, first_block + blocks))
            axes.set_title(f"{title}, images: {task}", fontsize=8)
        line[0].set_ylabel("block")
    figure.supxlabel("expert", fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


PARTS: dict[str, tuple[Callable[[Bench, Results], None], Callable[[Results], str]]] = {
    "table2": (table2, text_of_table2),
    "table6": (table6, text_of_table6),
    "sparsity": (sparsity, text_of_sparsity),
    "figure4": (figure4, text_of_figure4),
    "figure5": (figure5, text_of_figure5),
    "table5": (table5, text_of_table5),
}
DRAWN = {
    "table2": (draw_routing, "wemoe_routing.png"),
    "figure4": (draw_curves, "wemoe_figure4.png"),
    "figure5": (draw_lambdas, "wemoe_figure5.png"),
}


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the accuracies; a run goes on where an earlier one ended.",
)
@click.option(
    "--only",
    type=click.Choice(list(PARTS)),
    multiple=True,
    help="Part of the experiments; several may be given. [default: all]",
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=(0, 1, 2),
    show_default=True,
    help="Seed of the fine-tunes and the adaptation; several may be given.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=ADAPTATION["steps"],
    show_default=True,
    help="Number of steps of each adaptation.",
)
@click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the figures.",
)
def main(
    output: Path, only: tuple[str, ...], seeds: tuple[int, ...], steps: int, plot: Path | None
) -> None:
    if plot:
        pyplot()  # an error before any work where it is not installed
        plot.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    # transformers would list the head that is left out, for every trunk
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    adaptation = {**ADAPTATION, "steps": steps}
    settings = {**adaptation, **LEARNING_RATE, "sources": folder_of(PRETRAINING, FINE_TUNING).name}
    results = {part: Results(output, part, settings) for part in only or PARTS}
    data = {task: shortened(images) for task, images in tasks([*TASKS, *UNSEEN]).items()}
    base = make_base()
    with tempfile.TemporaryDirectory() as scratch:
        tests = write_tests(data, Path(scratch) / "clean")
        for seed in seeds:
            tqdm.write(f"seed {seed}", file=sys.stderr)
            bench = Bench(make_sources(base, data, seed), data, tests, Path(scratch), adaptation)
            for part, of_part in results.items():
                measure, _ = PARTS[part]
                measure(bench, of_part)
    for part, of_part in results.items():
        _, text_of = PARTS[part]
        click.echo(text_of(of_part) + "\n")
        if plot and part in DRAWN:
            draw, name = DRAWN[part]
            draw(of_part, plot / name)


if __name__ == "__main__":
    main()
