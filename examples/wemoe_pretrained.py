"""Repeat WEMoE's tables and figures on a network that was really pretrained: DINOv2's ViT-S/14.

    python examples/wemoe_pretrained.py -o pretrained/

1. Fetch the network and the images of four tasks (`real_images.py`); each is made once and kept.
2. Give each task a head that is never trained, like those that CLIP makes of the names of classes:
   cosines with the means of the classes in the base's features. `--head linear` makes the nearest
   linear map of them, as most classifiers have.
3. Per seed and task, fine-tune the upper six of twelve blocks until their predictions are sure.
   What the lower blocks give is computed once.
4. Merge with mergekit's methods, those of `merging_baselines.py`, `wemoe` and AdaMerging, adapt to
   the test images without their labels, as `mergekit-moe-ext adapt` does, and measure accuracy and
   entropy.

Table 2 is measured, and with it figures 11 and 12 (what the routers choose). `--only` picks other
parts: Table 4 (two of the tasks are not merged), figure 4 (learning rates and steps), Table 5
(corrupted images), Table 6 (what is routed), figure 5 (lambda), and learning rates, on images that
no table is measured on.

Every row is written as soon as it is measured (`*.json` in OUTPUT), so the same command goes on
after an interruption. What differs from the papers: 50 steps of adaptation by default, not 1000;
four tasks, not eight. Routers have the rate of the authors' code, which falls to zero by a cosine;
with heads of cosines constants have the best rate on images that no table is measured on.
"""

import copy
import hashlib
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import numpy as np
import torch
import transformers
from merging_baselines import (
    Classifier,
    State,
    diagonal_fisher,
    fisher_merge,
    gram_matrices,
    merge_parameters,
    normalized,
    regmean_merge,
    write_trimmed,
)
from PIL import Image
from real_data import cache_dir, written_at_once
from real_images import Images, dinov2, recipe, tasks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import BitImageProcessor, Dinov2ForImageClassification, Dinov2Model
from wemoe_images import (
    COMPARED,
    CORRUPTIONS,
    LAMBDAS,
    LAMBDAS_ROUTED,
    STATIC,
    STRATEGIES,
    TASKS,
    Results,
    average,
    claim,
    coefficients_of,
    corrupted,
    curve_of,
    draw_curves,
    draw_lambdas,
    draw_routing,
    merge,
    percent,
    routed,
    scaled,
    text_of_figure4,
    text_of_figure5,
    write_tests,
)

from mergekit_moe_ext import Adaptation, Reading, adapt
from mergekit_moe_ext.analysis import load_ensemble, pyplot, read_ensemble

SIDE = 56  # pixels; 16 patches
MEAN = [0.485, 0.456, 0.406]
DEVIATION = [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    frozen: the number of lower blocks that are not fine-tuned.
    trained, tested: images per task.
    of_class: the images of a class whose mean is its row of the head.
    head: whether logits are cosines, or linear in the features.
    sharpness: what the cosines are multiplied by.
    steps, batch, learning_rate: of a fine-tuning; AdamW, one cycle down to zero.
    """

    frozen: int = 6
    trained: int = 4000
    tested: int = 300
    of_class: int = 50
    head: Literal["cosine", "linear"] = "cosine"
    sharpness: float = 20.0
    steps: int = 500
    batch: int = 32
    learning_rate: float = 1e-4


UPPER = {"upscale_layers": "6-11"}
# Tried on validation images. AdaMerging's constants want far higher rates than routers do.
OF_CONSTANTS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RATES = {
    "AdaMerging (layer)": OF_CONSTANTS,
    "AdaMerging (task)": OF_CONSTANTS,
    "WEMoE (0-layer)": OF_CONSTANTS,
    "WEMoE (2-layer)": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
# By head and row. Routers have the rate of the authors' code. With cosines 3e-3 is better on
# validation images, but so near to those that ruin a model that it did so on test images. Constants
# have the best of those tried in the mean over three seeds, but for AdaMerging by tasks with linear
# heads.
CHOSEN_RATES = {
    "cosine": {
        "AdaMerging (layer)": 1e-1,
        "AdaMerging (task)": 1e-2,
        "WEMoE (0-layer)": 1e-2,
        "WEMoE (2-layer)": 1e-3,
    },
    "linear": {
        "AdaMerging (layer)": 3e-2,
        "AdaMerging (task)": 1e-2,
        "WEMoE (0-layer)": 3e-2,
        "WEMoE (2-layer)": 1e-3,
    },
}


@dataclass(frozen=True)
class Adapted:
    """A row that is merged and then adapted.

    method: the merge method and its parameters.
    rate_of: the row whose learning rate it has; empty where the settings have one.
    settings: of its adaptation.
    """

    method: dict[str, Any]
    rate_of: str
    settings: dict[str, Any] = field(default_factory=dict)


CONSTANT = {"learning_rate": 1e-4, "lr_scheduler_type": "constant"}  # FusionBench's rate
# What is compared most comes first.
ADAPTED = {
    "AdaMerging (layer)": Adapted(routed(upscale="all", router_layers=0), "AdaMerging (layer)"),
    "WEMoE (2-layer)": Adapted(routed(**UPPER), "WEMoE (2-layer)"),
    "WEMoE (0-layer)": Adapted(routed(router_layers=0, **UPPER), "WEMoE (0-layer)"),
    "WEMoE (1-layer)": Adapted(routed(router_layers=1, **UPPER), "WEMoE (2-layer)"),
    "AdaMerging (task)": Adapted(
        routed(upscale="all", router_layers=0, shared_router=True), "AdaMerging (task)"
    ),
    "E-WEMoE 0.9": Adapted(routed("ewemoe", **UPPER), "WEMoE (2-layer)"),
    "WEMoE (2-layer), per batch": Adapted(
        routed(**UPPER), "WEMoE (2-layer)", {"coefficients_per": "batch"}
    ),
    "WEMoE (2-layer), 3e-3": Adapted(routed(**UPPER), "", {"learning_rate": 3e-3}),
    "WEMoE (2-layer), constant 1e-4": Adapted(routed(**UPPER), "", CONSTANT),
    "AdaMerging (layer), 1e-2": Adapted(
        routed(upscale="all", router_layers=0), "", {"learning_rate": 1e-2}
    ),
}
# On corrupted images both go astray at the rates that are right for clean ones.
AT_LOW_RATES = ("WEMoE (2-layer), constant 1e-4", "AdaMerging (layer), 1e-2")
ON_CORRUPTED = ("Task arithmetic", "Ties-Merging", *AT_LOW_RATES)
SWEPT = (1e-2, 1e-3, 1e-4)  # the constant learning rates of figure 4
LOOKED_AT = 100  # images per task, for coefficients
# The rows of the same names without the two signs, on task vectors that TIES has trimmed.
TRIMMED = ("AdaMerging++ (layer)", "AdaMerging++ (task)")
CALIBRATED = 256  # training images per task for Fisher merging and RegMean, as in FusionBench
SEEN = ["mnist", "letters"]  # what Table 4 merges; the other tasks are unseen
CLAIMS = [
    ("Individual", "Pre-trained"),
    ("Weight averaging", "Pre-trained"),
    ("Task arithmetic", "Weight averaging"),
    ("Fisher merging", "Weight averaging"),
    ("RegMean", "Fisher merging"),
    ("RegMean", "Task arithmetic"),
    ("Ties-Merging", "Task arithmetic"),
    ("AdaMerging (layer)", "AdaMerging (task)"),
    ("AdaMerging (layer)", "Ties-Merging"),
    ("AdaMerging++ (task)", "AdaMerging (task)"),
    ("AdaMerging++ (layer)", "AdaMerging (layer)"),
    ("WEMoE (2-layer)", "WEMoE (0-layer)"),
    ("WEMoE (2-layer)", "WEMoE (1-layer)"),
    ("WEMoE (2-layer)", "Task arithmetic"),
    ("WEMoE (2-layer)", "AdaMerging (layer)"),
    ("WEMoE (2-layer)", "AdaMerging++ (layer)"),
    ("E-WEMoE 0.9", "AdaMerging (layer)"),
    ("Individual", "WEMoE (2-layer)"),
]
CLAIMS_CORRUPTED = [
    AT_LOW_RATES,
    (AT_LOW_RATES[0], "Task arithmetic"),
    (AT_LOW_RATES[0], "Ties-Merging"),
    (AT_LOW_RATES[1], "Task arithmetic"),
    ("Task arithmetic", "Ties-Merging"),
]
CLAIMS_UNSEEN = [
    ("WEMoE (2-layer)", "AdaMerging (layer)"),
    ("AdaMerging (layer)", "WEMoE (0-layer)"),
    ("WEMoE (0-layer)", "Task arithmetic"),
    ("Task arithmetic", "Ties-Merging"),
]
Hidden = dict[str, Tensor]  # by task, what the lower blocks give for images


def prepared(images: Images, scale: Scale) -> Images:
    """The images in the size of the network, so many of them as are used."""

    def enlarged(part: np.ndarray) -> np.ndarray:
        size = (SIDE, SIDE)
        return np.stack([np.array(Image.fromarray(one).resize(size, 3)) for one in part])

    return replace(
        images,
        train=enlarged(images.train[: scale.trained]),
        train_labels=images.train_labels[: scale.trained],
        test=enlarged(images.test[: scale.tested]),
        test_labels=images.test_labels[: scale.tested],
    )


def held_back(images: Images, scale: Scale) -> Images:
    """The same with the test images beyond those that are measured, as many or fewer: for choices
    such as learning rates.
    """
    rest = slice(scale.tested, None)
    beyond = replace(images, test=images.test[rest], test_labels=images.test_labels[rest])
    return prepared(beyond, scale)


def pixels(images: np.ndarray) -> Tensor:
    """Images of bytes (n, 56, 56) as the network sees them (n, 3, 56, 56). The processor that is
    saved with a model does the same.
    """
    values = torch.as_tensor(images).float()[:, None].expand(-1, 3, -1, -1) / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


@torch.inference_mode()
def lower_part(trunk: Dinov2Model, images: np.ndarray, frozen: int) -> Tensor:
    """What the lower blocks give: (n, tokens, width)."""
    parts = []
    for batch in np.array_split(images, -(-len(images) // 100)):
        hidden = trunk.embeddings(pixels(batch))
        for layer in trunk.encoder.layer[:frozen]:
            hidden = layer(hidden)
        parts.append(hidden)
    return torch.cat(parts).clone()


def upper_part(trunk: Dinov2Model, hidden: Tensor, frozen: int) -> Tensor:
    """The features that a head reads (n, 2 width), as `Dinov2ForImageClassification` has them."""
    for layer in trunk.encoder.layer[frozen:]:
        hidden = layer(hidden)
    hidden = trunk.layernorm(hidden)
    return torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1)


@torch.inference_mode()
def features_of(trunk: Dinov2Model, hidden: Tensor, frozen: int) -> Tensor:
    """The features (n, 2 width) of what the lower blocks gave (n, tokens, width)."""
    trunk.eval()
    return torch.cat([upper_part(trunk, batch, frozen) for batch in hidden.split(100)])


class CosineHead(nn.Module):
    """A map of features (n, features) to logits (n, classes): cosines, as CLIP's are.

    Through a linear head larger features make surer predictions. Fine-tunes then learn to enlarge
    them, and routers lower the entropy by it, whether or not predictions are right.

    bias: (features,), added to the features first, so that they are centred.
    weight: (classes, features), whose rows have the norm that cosines are multiplied by.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.bias = nn.Parameter(torch.zeros(features))

    def with_classes(self, number: int) -> "CosineHead":
        """A new head for another number of classes. A merge makes one per task by it."""
        return CosineHead(len(self.bias), number)

    def forward(self, features: Tensor) -> Tensor:
        return functional.linear(functional.normalize(features + self.bias, dim=-1), self.weight)


def use_cosine_heads() -> None:
    """Gives DINOv2's classifiers heads of cosines, in the whole program from now on.

    Merging and adapting build the classes of transformers, where no classifier has such a head.
    """
    stock = Dinov2ForImageClassification.__init__

    def with_cosines(self: Any, config: Any) -> None:
        stock(self, config)
        self.classifier = CosineHead(2 * config.hidden_size, config.num_labels)

    Dinov2ForImageClassification.__init__ = with_cosines


def prototype_head(features: Tensor, labels: Tensor, classes: int, scale: Scale) -> Tensor:
    """A head of class means, (1 + classes, 2 width): the centre of the features, and per class the
    direction from there to its mean.

    Directions are as long as logits want them: `sharpness`, and for a linear head, which does not
    normalise features, `sharpness` by the mean norm of the centred features.
    """
    center = features.mean(dim=0)
    length = scale.sharpness
    if scale.head == "linear":
        length /= (features - center).norm(dim=1).mean().item()
    rows = [center]
    for number in range(classes):
        of_class = features[labels == number][: scale.of_class]
        rows.append(length * functional.normalize(of_class.mean(dim=0) - center, dim=0))
    return torch.stack(rows)


def centred(features: Tensor, center: Tensor, scale: Scale) -> Tensor:
    """Features as the directions of a head see them."""
    features = features - center
    return functional.normalize(features, dim=-1) if scale.head == "cosine" else features


def logits_of(features: Tensor, head: Tensor, scale: Scale) -> Tensor:
    """The logits (n, classes) of features (n, 2 width)."""
    return functional.linear(centred(features, head[0], scale), head[1:])


def fine_tuned(trunk: Dinov2Model, frozen: int) -> list[torch.nn.Parameter]:
    """The parameters of the upper blocks and of the last norm."""
    return [*trunk.encoder.layer[frozen:].parameters(), *trunk.layernorm.parameters()]


def fine_tune(
    trunk: Dinov2Model, hidden: Tensor, labels: Tensor, head: Tensor, scale: Scale, seed: int
) -> None:
    """Trains the upper blocks and the last norm on what the lower ones give."""
    trunk.requires_grad_(False)
    trainable = fine_tuned(trunk, scale.frozen)
    for parameter in trainable:
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    rate = scale.learning_rate
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, scale.steps, pct_start=0.1)
    for _ in tqdm(range(scale.steps), desc="fine-tuning", mininterval=10):
        sample = torch.randint(len(hidden), (scale.batch,), generator=generator)
        logits = logits_of(upper_part(trunk, hidden[sample], scale.frozen), head, scale)
        loss = functional.cross_entropy(logits, labels[sample])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass
class Bench:
    """One seed's models, and what they are measured on.

    base: the pretrained trunk; base_model: the same with a head that is not used.
    models: the fine-tunes that are merged, with their heads, by task; trunks: the same without, and
    "base"; heads, hidden and tests: of every task.
    corruptions: those of Table 5.
    """

    seed: int
    scale: Scale
    base: Path
    base_model: Path
    models: dict[str, Path]
    trunks: dict[str, Path]
    heads: dict[str, Tensor]
    data: dict[str, Images]
    validation: dict[str, Images]
    hidden: Hidden
    tests: list[str]
    scratch: Path
    steps: int
    corruptions: Sequence[str]

    def measure(self, trunk_of: Callable[[str], Dinov2Model]) -> dict[str, Any]:
        """Accuracy by task, and as `entropy` the mean over tasks of that of the predictions."""
        row: dict[str, Any] = {}
        entropies = []
        for task in TASKS:
            features = features_of(trunk_of(task), self.hidden[task], self.scale.frozen)
            logits = logits_of(features, self.heads[task], self.scale)
            labels = torch.as_tensor(self.data[task].test_labels)
            row[task] = (logits.argmax(-1) == labels).float().mean().item()
            distribution = torch.distributions.Categorical(logits=logits)
            entropies.append(distribution.entropy().mean().item())
        row["entropy"] = statistics.mean(entropies)
        return row

    def pretrained(self) -> dict[str, Any]:
        trunk = Dinov2Model.from_pretrained(self.base)
        return self.measure(lambda task: trunk)

    def individual(self) -> dict[str, Any]:
        return self.measure(lambda task: Dinov2Model.from_pretrained(self.trunks[task]))

    def static(self, method: dict[str, Any]) -> dict[str, Any]:
        """A stock merge of the trunks, since heads differ from task to task."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            models = [self.trunks[task] for task in self.models]
            path = merge(method, self.trunks["base"], models, Path(folder) / "merged", self.seed)
            trunk = Dinov2Model.from_pretrained(path)
        return self.measure(lambda task: trunk)

    def classifier(self, task: str) -> Classifier:
        """A task's fine-tune from what the lower blocks give to logits. Its parameters that require
        gradients are those that were fine-tuned.
        """
        trunk = Dinov2Model.from_pretrained(self.trunks[task])
        trunk.requires_grad_(False)
        for parameter in fine_tuned(trunk, self.scale.frozen):
            parameter.requires_grad_(True)
        head = self.heads[task]

        def features(trunk: Any, hidden: Tensor) -> Tensor:
            return centred(upper_part(trunk, hidden, self.scale.frozen), head[0], self.scale)

        without_bias = functional.pad(head[1:], (0, 1))
        return Classifier(trunk, features, without_bias)

    @cached_property
    def calibration(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By task, what the lower blocks give for some training images, and their labels."""
        trunk = Dinov2Model.from_pretrained(self.base)
        parts = {}
        for task in self.models:
            images = self.data[task].train[:CALIBRATED]
            labels = torch.as_tensor(self.data[task].train_labels[:CALIBRATED])
            parts[task] = lower_part(trunk, images, self.scale.frozen), labels
        return parts

    @cached_property
    def fishers(self) -> list[State]:
        """The Fisher information of each fine-tune on its task's images."""
        fishers = []
        for task, (hidden, labels) in self.calibration.items():
            fishers.append(diagonal_fisher(self.classifier(task), hidden, labels))
        return fishers

    def fisher(self, is_normalized: bool) -> dict[str, Any]:
        """Fisher merging, with each fine-tune's information divided by its norm or not."""
        fishers = [normalized(each) for each in self.fishers] if is_normalized else self.fishers
        return self.of_parameters(partial(fisher_merge, fishers=fishers))

    def regmean(self) -> dict[str, Any]:
        """RegMean, in closed form for each linear layer that was fine-tuned."""
        grams = []
        for task, (hidden, _) in self.calibration.items():
            grams.append(gram_matrices(self.classifier(task), hidden))
        return self.of_parameters(partial(regmean_merge, grams=grams))

    def of_parameters(self, merged: Callable[[list[State]], State]) -> dict[str, Any]:
        """What a merge of the parameters of all fine-tunes gives."""
        classifiers = [self.classifier(task) for task in self.models]
        trunk: Any = merge_parameters(classifiers, merged)
        return self.measure(lambda task: trunk)

    def oracle(self) -> dict[str, Any]:
        """Each task's own MLPs, on the rest as task arithmetic merges it."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            models = [self.trunks[task] for task in TASKS]
            method = STATIC["Task arithmetic"]
            path = merge(method, self.trunks["base"], models, Path(folder) / "merged", self.seed)
            merged = Dinov2Model.from_pretrained(path)

        def with_own(task: str) -> Dinov2Model:
            own = Dinov2Model.from_pretrained(self.trunks[task])
            for mixed, of_task in zip(merged.encoder.layer, own.encoder.layer, strict=True):
                mixed.mlp.load_state_dict(of_task.mlp.state_dict())
            return merged

        return self.measure(with_own)

    def adapted(self, row: Adapted) -> dict[str, Any]:
        """A merge that was adapted to the test images, as `adapt` measures it. What the routers
        choose is there as `coefficients`, and with `eval_steps` the accuracies in between as
        `curve`.
        """
        settings = {"lr_scheduler_type": "cosine", **row.settings}
        if "learning_rate" not in settings:
            settings["learning_rate"] = CHOSEN_RATES[self.scale.head][row.rate_of]
        how = Adaptation(
            **settings, steps=self.steps, per_device_eval_batch_size=50, seed=self.seed
        )
        models = list(self.models.values())
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            path = Path(folder) / "merged"
            merged = merge(row.method, self.base_model, models, path, self.seed)
            results = adapt(
                str(merged),
                [test for test in self.tests if test.partition("=")[0] in self.models],
                output=str(Path(folder) / "adapted"),
                adaptation=how,
                reading=Reading(quiet=True),
            )
            assert results is not None  # this is the only process
            cell: dict[str, Any] = {task: results[task]["accuracy"][1] for task in self.models}
            cell["entropy"] = statistics.mean(results[task]["entropy"][1] for task in self.models)
            output = Path(folder) / "adapted"
            model = load_ensemble(str(output), *read_ensemble(str(output))).eval()
            if how.eval_steps:
                state = json.loads((output / "trainer_state.json").read_text())
                cell["curve"] = curve_of(state["log_history"])
        if model.ensembling.router_layers:
            looked_at = {}
            for task in self.models:
                looked_at[task] = pixels(self.data[task].test[:LOOKED_AT])
            cell["coefficients"] = coefficients_of(model, looked_at)
        return cell | self.unseen(model)

    def trimmed(self, row: Adapted) -> dict[str, Any]:
        """The row of `adapted`, of task vectors that TIES has trimmed."""
        density = STATIC["Ties-Merging"]["parameters"]["density"]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            models = write_trimmed(
                self.base_model, self.models, "classifier.", density, Path(folder)
            )
            return replace(self, models=models).adapted(row)

    @torch.inference_mode()
    def chosen(self, model: Any) -> dict[str, list[float]]:
        """The mean coefficient of each task's vectors, over blocks and fifty images, by task: what
        the notebook on images draws.
        """
        looked_at = {task: pixels(self.data[task].test[:50]) for task in self.models}
        means = {}
        for task, of_blocks in coefficients_of(model, looked_at).items():
            means[task] = np.mean(of_blocks["mean"], axis=0).tolist()
        return means

    @torch.inference_mode()
    def unseen(self, model: Any) -> dict[str, float]:
        """The accuracy on tasks that were not merged, whose heads the model does not have."""
        model.classifier = torch.nn.Identity()
        any_task = next(iter(self.models))
        accuracies = {}
        for task in TASKS:
            if task not in self.models:
                batches = []
                for batch in pixels(self.data[task].test).split(100):
                    batches.append(model(pixel_values=batch, task=any_task).logits)
                logits = logits_of(torch.cat(batches), self.heads[task], self.scale)
                predictions = logits.argmax(-1)
                labels = torch.as_tensor(self.data[task].test_labels)
                accuracies[task] = (predictions == labels).float().mean().item()
        return accuracies

    def merging(self, names: list[str]) -> "Bench":
        """The same with the models of these tasks alone."""
        return replace(self, models={task: self.models[task] for task in names})

    def on(self, data: dict[str, Images], name: str) -> "Bench":
        """The same with other test images, which are written under this name."""
        trunk = Dinov2Model.from_pretrained(self.base)
        hidden = {task: lower_part(trunk, data[task].test, self.scale.frozen) for task in TASKS}
        return replace(self, data=data, hidden=hidden, tests=write_tests(data, self.scratch / name))


def save(trunk: Dinov2Model, head: Tensor, classes: list[str], scale: Scale, folder: Path) -> None:
    """Saves a fine-tune as those on the Hub are, but for the kind of its head: a classifier with
    names of classes, and the processor of its images.
    """
    config = copy.deepcopy(trunk.config)
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    model = Dinov2ForImageClassification(config)
    model.dinov2.load_state_dict(trunk.state_dict())
    with torch.no_grad():
        center = head[0]
        weight = head[1:]
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(-center if scale.head == "cosine" else -(weight @ center))
    model.save_pretrained(folder)
    BitImageProcessor(
        do_resize=False, do_center_crop=False, image_mean=MEAN, image_std=DEVIATION
    ).save_pretrained(folder)


def make_bench(
    data: dict[str, Images],
    validation: dict[str, Images],
    scale: Scale,
    seed: int,
    scratch: Path,
    steps: int,
    corruptions: Sequence[str] = CORRUPTIONS,
) -> Bench:
    """The heads and fine-tunes of a seed, which are made once and kept, and the test images.

    `validation` are images that learning rates are compared on; empty where none are.
    """
    base = dinov2(SIDE)
    settings = json.dumps([recipe(), asdict(scale)])
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    root = cache_dir() / f"wemoe-pretrained-{key}"
    trunk = Dinov2Model.from_pretrained(base)
    heads_file = root / "heads" / "heads.safetensors"
    models = {task: root / f"seed{seed}" / task for task in TASKS}
    is_made = heads_file.is_file() and all(path.is_dir() for path in models.values())
    lower = {}
    if not is_made:
        for task in TASKS:
            lower[task] = lower_part(trunk, data[task].train, scale.frozen)
    if not heads_file.is_file():
        write_heads(heads_file, trunk, lower, data, scale)
    heads = load_file(heads_file)
    for task, folder in models.items():
        if not folder.is_dir():
            tuned = Dinov2Model.from_pretrained(base)
            labels = torch.as_tensor(data[task].train_labels)
            with written_at_once(folder) as unfinished:
                fine_tune(tuned, lower[task], labels, heads[task], scale, seed)
                save(tuned, heads[task], data[task].classes, scale, unfinished)
    base_model = root / f"seed{seed}" / "base"
    if not base_model.is_dir():
        # Its head is not used: every task has its own.
        with written_at_once(base_model) as unfinished:
            head = heads[TASKS[0]]
            classes = [f"LABEL_{number}" for number in range(len(head) - 1)]
            save(trunk, head, classes, scale, unfinished)
    trunks = make_trunks(root / f"seed{seed}" / "trunks", {"base": base, **models})
    hidden = {task: lower_part(trunk, data[task].test, scale.frozen) for task in TASKS}
    tests = write_tests(data, scratch / "tests")
    return Bench(
        seed=seed,
        scale=scale,
        base=base,
        base_model=base_model,
        models=models,
        trunks=trunks,
        heads=heads,
        data=data,
        validation=validation,
        hidden=hidden,
        tests=tests,
        scratch=scratch,
        steps=steps,
        corruptions=corruptions,
    )


def write_heads(
    path: Path, trunk: Dinov2Model, lower: Hidden, data: dict[str, Images], scale: Scale
) -> None:
    """Writes the head of each task, from what the lower blocks give for its training images."""
    heads = {}
    for task, hidden in lower.items():
        features = features_of(trunk, hidden, scale.frozen)
        labels = torch.as_tensor(data[task].train_labels)
        heads[task] = prototype_head(features, labels, len(data[task].classes), scale)
    with written_at_once(path.parent) as unfinished:
        save_file(heads, unfinished / path.name)


def make_trunks(folder: Path, models: Mapping[str, Path]) -> dict[str, Path]:
    """The trunks of models, in a folder by their names; they are written once and kept."""
    trunks = {}
    for name, model in models.items():
        trunks[name] = folder / name
        if not trunks[name].is_dir():
            # Stock mergekit looks for the names that transformers has in memory.
            with written_at_once(trunks[name]) as unfinished:
                trunk = Dinov2Model.from_pretrained(model)
                trunk.save_pretrained(unfinished, save_original_format=False)
    return trunks


def table2(bench: Bench, results: Results) -> None:
    """Measures the rows of Table 2, with one entropy more."""
    results.once("Pre-trained", bench.seed, bench.pretrained)
    results.once("Individual", bench.seed, bench.individual)
    results.once("Own task's MLPs", bench.seed, bench.oracle)
    for row, method in STATIC.items():
        results.once(row, bench.seed, partial(bench.static, method))
    ties = STATIC["Ties-Merging"]
    whole = {**ties, "parameters": {**ties["parameters"], "lambda": 1.0}}
    results.once("Ties-Merging, scale 1", bench.seed, partial(bench.static, whole))
    results.once("Fisher merging", bench.seed, partial(bench.fisher, False))
    results.once("Fisher merging, normalized", bench.seed, partial(bench.fisher, True))
    results.once("RegMean", bench.seed, bench.regmean)
    for row, how in ADAPTED.items():
        results.once(row, bench.seed, partial(bench.adapted, how))
    for row in TRIMMED:
        how = ADAPTED[row.replace("++", "")]
        results.once(row, bench.seed, partial(bench.trimmed, how))


def compare(bench: Bench, results: Results, rows: Sequence[str], suffix: str = "") -> None:
    """Measures some rows of Table 2, under their names with a suffix."""
    for row in rows:
        if row in STATIC:
            measure = partial(bench.static, STATIC[row])
        else:
            measure = partial(bench.adapted, ADAPTED[row])
        results.once(f"{row}{suffix}", bench.seed, measure)


def table4(bench: Bench, results: Results) -> None:
    """Measures the rows of Table 4, where two of the tasks are not merged."""
    results.once("Pre-trained", bench.seed, bench.pretrained)
    compare(bench.merging(SEEN), results, COMPARED)


def table5(bench: Bench, results: Results) -> None:
    """Measures the rows of Table 5, on corrupted test images."""
    for corruption in bench.corruptions:
        there = bench.on(corrupted(bench.data, corruption), corruption)
        compare(there, results, ON_CORRUPTED, f", {corruption}")


def table6(bench: Bench, results: Results) -> None:
    """Measures the rows of Table 6, what is upscaled, at the chosen rate and at FusionBench's."""
    for row, method in STRATEGIES.items():
        parameters = {**method["parameters"], **UPPER}
        how = Adapted({**method, "parameters": parameters}, "WEMoE (2-layer)")
        results.once(row, bench.seed, partial(bench.adapted, how))
        constant = replace(how, settings=CONSTANT)
        results.once(f"{row}, constant 1e-4", bench.seed, partial(bench.adapted, constant))


def figure4(bench: Bench, results: Results) -> None:
    """Measures the curves of figure 4: accuracy by constant learning rate and step."""
    for rate in SWEPT:
        settings = {**CONSTANT, "learning_rate": rate, "eval_steps": max(1, bench.steps // 5)}
        how = replace(ADAPTED["WEMoE (2-layer)"], settings=settings)
        results.once(f"{rate:g}", bench.seed, partial(bench.adapted, how))


def figure5(bench: Bench, results: Results) -> None:
    """Measures the curves of figure 5: accuracy by lambda."""
    for row in ("Task arithmetic", "Ties-Merging"):
        for scale in LAMBDAS:
            measure = partial(bench.static, scaled(STATIC[row], scale))
            results.once(f"{row}, {scale}", bench.seed, measure)
    for row in ("WEMoE (2-layer)", "WEMoE (0-layer)"):
        for scale in LAMBDAS_ROUTED:
            how = replace(ADAPTED[row], method=scaled(ADAPTED[row].method, scale))
            results.once(f"{row}, {scale}", bench.seed, partial(bench.adapted, how))


def tried_rates(row: str, seed: int, results: Results) -> Sequence[float]:
    """The learning rates that are tried with a seed: all with the lowest seed that is measured, and
    its best two with the others.
    """
    accuracies = {}
    for rate in RATES[row]:
        cells = results.cells.get(f"{row}, {rate:g}", {})
        first = min(cells, default=seed)
        if first >= seed:
            return RATES[row]
        accuracies[rate] = average(cells[first])
    return sorted(accuracies, key=lambda rate: accuracies[rate], reverse=True)[:2]


def rates(bench: Bench, results: Results) -> None:
    """Measures learning rates on validation images: adaptation sees these, without their labels,
    and no image that the tables are measured on.
    """
    elsewhere = bench.on(bench.validation, "validation")
    results.once(
        "Task arithmetic", bench.seed, partial(elsewhere.static, STATIC["Task arithmetic"])
    )
    for row in RATES:
        for rate in tried_rates(row, bench.seed, results):
            how = replace(ADAPTED[row], settings={"learning_rate": rate})
            results.once(f"{row}, {rate:g}", bench.seed, partial(elsewhere.adapted, how))


def table(results: Results, columns: Mapping[str, Sequence[str]], with_entropy: bool = True) -> str:
    """A line per row, in percent; a column is the average over its tasks, and the last the entropy
    in nats.
    """
    titles = [*columns, "entropy"] if with_entropy else list(columns)
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row, seeds in results.cells.items():
        cells = list(seeds.values())
        texts = []
        for names in columns.values():
            texts.append(percent([average(cell, names) for cell in cells]))
        if with_entropy:
            entropy = statistics.mean(cell["entropy"] for cell in cells)
            texts.append(f"{entropy:.3f}")
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


EACH_AND_AVERAGE = {**{task: [task] for task in TASKS}, "average": TASKS}


def text_of_table2(results: Results) -> str:
    """The table, and which of the paper's orderings hold."""
    lines = [table(results, EACH_AND_AVERAGE)]
    for better, worse in CLAIMS:
        lines += ["", *claim(results, better, worse)]
    return "\n".join(lines)


def text_of_table4(results: Results) -> str:
    """The table, and the paper's orderings on unseen tasks."""
    unseen = [task for task in TASKS if task not in SEEN]
    columns: dict[str, Sequence[str]] = {task: [task] for task in SEEN}
    columns["seen"] = SEEN
    columns |= {task: [task] for task in unseen}
    columns["unseen"] = unseen
    lines = [table(results, columns, with_entropy=False)]
    for better, worse in CLAIMS_UNSEEN:
        lines += ["", *claim(results, better, worse, unseen, " on unseen tasks")]
    return "\n".join(lines)


def text_of_table5(results: Results) -> str:
    """The table, and whether the usual orderings hold on each corruption that was measured. (On
    pixelate the paper has WEMoE last.)
    """
    lines = [table(results, EACH_AND_AVERAGE)]
    for corruption in CORRUPTIONS:
        if f"{ON_CORRUPTED[-1]}, {corruption}" not in results.cells:
            continue
        for better, worse in CLAIMS_CORRUPTED:
            lines += ["", *claim(results, f"{better}, {corruption}", f"{worse}, {corruption}")]
    return "\n".join(lines)


def text_of_table6(results: Results) -> str:
    """The table, and the paper's orderings."""
    lines = [table(results, EACH_AND_AVERAGE)]
    for better, worse in itertools.pairwise(("Attention + MLP", "MLP only", "Entire block")):
        for rate in ("", ", constant 1e-4"):
            lines += ["", *claim(results, better + rate, worse + rate)]
    return "\n".join(lines)


def text_of_rates(results: Results) -> str:
    """The table, and for each row the best of the rates that were tried with every seed."""
    lines = [table(results, EACH_AND_AVERAGE), ""]
    seeds = results.cells["Task arithmetic"].keys()
    for row, tried in RATES.items():
        accuracies = {}
        for rate in tried:
            cells = results.cells[f"{row}, {rate:g}"]
            if cells.keys() == seeds:
                accuracies[rate] = statistics.mean(average(cell) for cell in cells.values())
        lines.append(f"{row}: best at {max(accuracies, key=lambda rate: accuracies[rate]):g}")
    return "\n".join(lines)


PARTS: dict[str, tuple[Callable[[Bench, Results], None], Callable[[Results], str]]] = {
    "table2": (table2, text_of_table2),
    "table4": (table4, text_of_table4),
    "table5": (table5, text_of_table5),
    "table6": (table6, text_of_table6),
    "figure4": (figure4, text_of_figure4),
    "figure5": (figure5, text_of_figure5),
    "rates": (rates, text_of_rates),
}
DRAWN: dict[str, tuple[Callable[[Results, Path], None], str]] = {
    "figure4": (draw_curves, "wemoe_pretrained_figure4.png"),
    "figure5": (draw_lambdas, "wemoe_pretrained_figure5.png"),
    "table2": (partial(draw_routing, first_block=Scale.frozen), "wemoe_pretrained_routing.png"),
}


@click.command(help=__doc__)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the measured rows.",
)
@click.option(
    "--only",
    type=click.Choice(list(PARTS)),
    multiple=True,
    default=["table2"],
    show_default=True,
    help="Part of the experiments; several may be given.",
)
@click.option("--seed", "seeds", type=int, multiple=True, default=[0], show_default=True)
@click.option(
    "--head",
    type=click.Choice(["cosine", "linear"]),
    default="cosine",
    show_default=True,
    help="Kind of the heads; a linear one has surer predictions for larger features.",
)
@click.option("--steps", type=int, default=50, show_default=True, help="Steps of an adaptation.")
@click.option(
    "--corruption",
    "corruptions",
    type=click.Choice(CORRUPTIONS),
    multiple=True,
    help="Corruption of Table 5; several may be given. [default: all]",
)
@click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the figures.",
)
def main(
    output: Path,
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    head: Literal["cosine", "linear"],
    steps: int,
    corruptions: tuple[str, ...],
    plot: Path | None,
) -> None:
    if plot:
        pyplot()  # an error before any work where it is not installed
        plot.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    if head == "cosine":
        use_cosine_heads()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    scale = replace(Scale(), head=head)
    settings = {"adaptation_steps": steps, **asdict(scale)}
    results = {}
    for part in only:
        chosen = {} if part == "rates" else {"learning_rates": CHOSEN_RATES[head]}
        results[part] = Results(output, part, {**settings, **chosen})
    all_images = tasks(TASKS)
    data = {task: prepared(images, scale) for task, images in all_images.items()}
    beyond = {task: held_back(images, scale) for task, images in all_images.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            tqdm.write(f"seed {seed}", file=sys.stderr)
            bench = make_bench(
                data, beyond, scale, seed, Path(scratch), steps, corruptions or CORRUPTIONS
            )
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
