"""WEMoE's and E-WEMoE's experiments in small: a vision transformer, four tasks of pictures, three
seeds.

    python examples/wemoe_images.py -o images/ --plot images/

1. Pretrain a ViT of 0.8 million parameters on emoji and letters K to Z. It is trained once and
kept.
2. Fit a linear head per task on its features. From here on the heads stay as they are, as those
that CLIP makes of
   the names of classes do in the paper. Per seed and task, fine-tune the trunk: these four models
   are kept, too.
3. Merge them by mergekit, with its methods and with `wemoe` and `ewemoe`, and adapt what has
routers to the test
   inputs without their labels, as `mergekit-moe-ext adapt` does.
4. Write the accuracies (`*.json` in OUTPUT), print the papers' tables and which of their orderings
hold, and draw.

Every accuracy is kept as soon as it is there: the same command goes on after an interruption.
`--only` picks a part. What differs from the papers, besides the size: 100 steps of adaptation on 8
pictures per task, not 1000 on 16; learning rates of 3e-4 for routers and 1e-2 for constants, not
1e-3; four tasks, not eight; for unseen tasks, two more that none of the models was fine-tuned on.
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
from PIL import Image
from real_data import cache_dir, written_at_once
from real_images import Pictures, pretraining, recipe, tasks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from mergekit_moe_ext import (
    Adaptation,
    Reading,
    UserError,
    adapt,
)  # importing it registers the methods
from mergekit_moe_ext.analysis import heat_map, load_ensemble, pyplot, read_ensemble

TASKS = ["mnist", "animals", "digits8", "letters"]
UNSEEN = ["numerals", "small letters"]
SIDE, HIDDEN = 28, 128
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
MEASURED = 300  # test pictures per task, which routers are adapted to, too
ROUTED_LOOKED_AT = 100  # of these, for what routers choose
ADAPTATION = {"steps": 100, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 64}
# The papers' is 1e-3. Adam moves a number by its learning rate per step at most: where the
# coefficients themselves are what is learned, that would take them nowhere in a tenth of the
# papers' steps. For routers it is too fast here: see figure 4, by which, with one seed, this one
# was chosen.
LEARNING_RATE = {"routers": 3e-4, "constants": 1e-2}

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
    return {"merge_method": method, "parameters": {"lambda": 0.3, "init_lambda": 0.3, **parameters}}


ROUTED = {
    "AdaMerging (task)": routed(upscale="all", router_layers=0, shared_router=True),
    "AdaMerging (layer)": routed(upscale="all", router_layers=0),
    "WEMoE (0-layer)": routed(router_layers=0),
    "WEMoE (2-layer)": routed(),
    "E-WEMoE 0.9": routed("ewemoe"),
    "WEMoE (2-layer), attention + MLP": routed(upscale="attention+mlp"),
}
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
SEVERITY, ENLARGED = 3, 64  # of the corruptions, of five; pixels that pictures have meanwhile
Accuracies = dict[str, float]  # by task


def shortened(pictures: Pictures) -> Pictures:
    return replace(
        pictures, test=pictures.test[:MEASURED], test_labels=pictures.test_labels[:MEASURED]
    )


def pixels(pictures: np.ndarray | Tensor) -> Tensor:
    """Bytes (n, 28, 28) as the model sees them: (n, 3, 28, 28) in [-1, 1]. So does the processor
    that is saved.
    """
    return (torch.as_tensor(pictures).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def train(
    model: Any, parts: Sequence[tuple[Pictures, Tensor | None]], how: Recipe, seed: int, desc: str
) -> None:
    """Trains what of the model requires gradients, on one part after the other.

    Each part has its pictures and a head (classes, hidden + 1) that stays as it is, or None for the
    model's own.
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
        chosen = torch.randint(len(data.train), (how.batch,), generator=generator).numpy()
        x = pixels(data.train[chosen])
        if head is None:  # pretraining: light on dark, too
            x = x * (torch.randint(2, (how.batch, 1, 1, 1), generator=generator) * 2 - 1)
        features = model.vit(x).last_hidden_state[:, 0]
        logits = model.classifier(features) if head is None else with_head(features, head)
        loss = functional.cross_entropy(logits, torch.as_tensor(data.train_labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def with_head(features: Tensor, head: Tensor) -> Tensor:
    return functional.linear(features, head[:, :-1], head[:, -1])


@torch.inference_mode()
def features_of(trunk: Callable[[Tensor], Tensor], pictures: np.ndarray) -> Tensor:
    """What a head reads, (n, hidden), of a trunk that gives it for a batch."""
    return torch.cat(
        [trunk(pixels(some)) for some in np.array_split(pictures, -(-len(pictures) // 250))]
    )


def trunk_of(model: ViTModel) -> Callable[[Tensor], Tensor]:
    return lambda x: model.eval()(x).last_hidden_state[:, 0]


def accuracies(
    trunk: Callable[[Tensor], Tensor], heads: dict[str, Tensor], data: dict[str, Pictures]
) -> Accuracies:
    """On the test part of every task that there is a head of."""
    found = {}
    for task, head in heads.items():
        predicted = with_head(features_of(trunk, data[task].test), head).argmax(-1)
        found[task] = (predicted == torch.as_tensor(data[task].test_labels)).float().mean().item()
    return found


def fit_head(trunk: Callable[[Tensor], Tensor], data: Pictures, seed: int) -> Tensor:
    """A linear probe, (classes, hidden + 1), the bias last: logistic regression with a little
    weight decay.
    """
    features, labels = features_of(trunk, data.train).clone(), torch.as_tensor(data.train_labels)
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
    """As anybody's fine-tune is on the Hub: weights, names of classes, and how pictures are
    prepared.
    """
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    model.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def folder_of(*parts: Any) -> Path:
    """Where what depends on these settings, and on the pictures, is kept."""
    settings = [recipe(), SHAPE, *(asdict(part) for part in parts)]
    return (
        cache_dir()
        / f"wemoe-images-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    )


def make_base() -> Path:
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
    """What one seed's merges are made of."""

    seed: int
    base: Path
    models: dict[str, Path]  # by task
    trunks: dict[str, Path]  # the same without heads, and "base": what a stock method merges
    heads: dict[str, Tensor]  # of the unseen tasks, too


def make_sources(base: Path, data: dict[str, Pictures], seed: int) -> Sources:
    """Heads and fine-tunes. They are trained once and kept."""
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


def make_together(sources: Sources, data: dict[str, Pictures]) -> Path:
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
    """`mergekit-yaml` on a configuration: `method` is its merge method and parameters."""
    from mergekit.merge import run_merge

    config = {
        **method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }
    written = yaml.safe_dump({**config, "dtype": "float32"})
    # There is no tokenizer, but the file of the image processor is copied along with it, by our
    # methods alone.
    beside = "wemoe" in method["merge_method"]
    options = MergeOptions(quiet=True, random_seed=seed, copy_tokenizer=beside)
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(written)), str(output), options, written
    )
    return output


def write_tests(data: dict[str, Pictures], folder: Path) -> list[str]:
    """The test pictures as files that `adapt` reads: its `--data` of each task. Labels are there
    for measuring.
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
    """One seed's sources, and the pictures that merges are adapted to and measured on."""

    sources: Sources
    data: dict[str, Pictures]
    tests: list[str]  # the same, as `write_tests` wrote them
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
        return accuracies(trunk, self.sources.heads, self.data)

    def trunk(self, path: Path) -> dict[str, Any]:
        return self.measure(trunk_of(ViTModel.from_pretrained(path, add_pooling_layer=False)))

    def static(self, method: dict[str, Any]) -> dict[str, Any]:
        return self.measure(trunk_of(self.dense(method)))

    def own(self) -> dict[str, Any]:
        """Each task's own fine-tune."""
        found: Accuracies = {}
        for task, path in self.sources.models.items():
            trunk = trunk_of(ViTModel.from_pretrained(path, add_pooling_layer=False))
            found |= accuracies(trunk, {task: self.sources.heads[task]}, self.data)
        return found

    def adapted(
        self, method: dict[str, Any], eval_steps: int | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Merge, adapt to the tests, measure; with the mean entropy before and after, and what the
        routers choose.

        With `eval_steps` the accuracies in between, as `adapt` has measured them, are there as
        `curve`.
        """
        sources = self.sources
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            merged = merge(
                method, sources.base, sources.models.values(), Path(folder) / "merged", sources.seed
            )
            rate = LEARNING_RATE[
                "routers" if method["parameters"].get("router_layers", 2) else "constants"
            ]
            chosen = {"learning_rate": rate, **self.adaptation, **settings}
            how = Adaptation(**chosen, seed=sources.seed, eval_steps=eval_steps)
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
        choice = coefficients_of(model, self.data) if model.ensembling.router_layers else None
        found: dict[str, Any] = {task: results[task]["accuracy"][1] for task in TASKS}
        model.classifier = torch.nn.Identity()  # the heads of unseen tasks are not in it
        unseen = {task: self.sources.heads[task] for task in UNSEEN}
        found |= accuracies(
            lambda x: model(pixel_values=x, task=TASKS[0]).logits, unseen, self.data
        )
        entropies = [results[task]["entropy"] for task in TASKS]
        found["entropy"] = list(map(statistics.mean, zip(*entropies, strict=True)))
        if choice is not None:
            found["coefficients"] = choice
        if eval_steps:
            found["curve"] = curve_of(history)
        return found

    def oracle(self, method: dict[str, Any]) -> dict[str, Any]:
        """Nothing is adapted: wherever there is a router, the coefficient of the pictures' own task
        is 1, others 0.
        """
        sources = self.sources
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            merged = merge(
                method, sources.base, sources.models.values(), Path(folder) / "merged", sources.seed
            )
            model: Any = load_ensemble(str(merged), *read_ensemble(str(merged))).eval()
        model.classifier = torch.nn.Identity()
        found: Accuracies = {}
        for index, task in enumerate(TASKS):
            chosen = torch.zeros(1, len(model.ensembling.groups), len(TASKS))
            chosen[..., index] = 1

            def trunk(x: Tensor, chosen: Tensor = chosen) -> Tensor:
                return model(
                    pixel_values=x, task=TASKS[0], coefficients=chosen.expand(len(x), -1, -1)
                ).logits

            found |= accuracies(trunk, {task: sources.heads[task]}, self.data)
        return found


@torch.inference_mode()
def coefficients_of(model: Any, data: dict[str, Pictures]) -> dict[str, Any]:
    """By task and block, how the coefficients are on average, and how often each is the largest."""
    found = {}
    for task in TASKS:
        given = model.coefficients(
            pixel_values=pixels(data[task].test[:ROUTED_LOOKED_AT]), task=task
        )
        first = functional.one_hot(given.argmax(-1), given.shape[-1]).float()
        found[task] = {"mean": given.mean(0).tolist(), "first": first.mean(0).tolist()}
    return found


def curve_of(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The average accuracy by step, from the Trainer's log."""
    by_step: dict[int, list[float]] = {}
    for entry in history:
        measured = [value for key, value in entry.items() if key.endswith("_accuracy")]
        by_step.setdefault(entry["step"], []).extend(measured)
    return {
        str(step): statistics.mean(values) for step, values in sorted(by_step.items()) if values
    }


class Kept:
    """What was measured for one part, by row and seed. Each seed has a file, which is written anew
    with each row.
    """

    def __init__(self, folder: Path, part: str, settings: Any):
        self.folder, self.part, self.settings = folder, part, json.loads(json.dumps(settings))
        self.cells: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted(folder.glob(f"{part}-*.json")):
            known = json.loads(path.read_text())
            if known["settings"] != self.settings:
                raise UserError(f"{path} is of other settings; remove it or name another directory")
            for row, found in known["rows"].items():
                self.cells.setdefault(row, {})[int(path.stem.rpartition("-")[2])] = found

    def once(self, row: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        of_row = self.cells.setdefault(row, {})
        if seed in of_row:
            return
        of_row[seed] = made = make()
        rows = {row: found[seed] for row, found in self.cells.items() if seed in found}
        unfinished = self.folder / f"{self.part}-{seed}.partial"
        unfinished.write_text(
            json.dumps({"settings": self.settings, "rows": rows}, indent=1) + "\n"
        )
        unfinished.replace(unfinished.with_suffix(".json"))
        tqdm.write(f"{self.part}, seed {seed}, {row}: {average(made):.3f}", file=sys.stderr)


def average(found: dict[str, Any], names: Sequence[str] = TASKS) -> float:
    return statistics.mean(found[task] for task in names)


def table2(bench: Bench, kept: Kept) -> None:
    """And Table 4, and what figures 11 and 12 are drawn from."""
    sources, seed = bench.sources, bench.sources.seed
    kept.once("Pre-trained", seed, partial(bench.trunk, sources.trunks["base"]))
    kept.once("Individual", seed, bench.own)
    for row, method in STATIC.items():
        kept.once(row, seed, partial(bench.static, method))
    for row, method in ROUTED.items():
        kept.once(row, seed, partial(bench.adapted, method))
    with_labels = partial(bench.adapted, ROUTED["WEMoE (2-layer)"], objective="supervised")
    kept.once("WEMoE (2-layer), with labels", seed, with_labels)
    kept.once("Traditional MTL", seed, lambda: bench.trunk(make_together(sources, bench.data)))


def table6(bench: Bench, kept: Kept) -> None:
    for row, method in STRATEGIES.items():
        kept.once(f"{row}, own task's", bench.sources.seed, partial(bench.oracle, method))
        kept.once(row, bench.sources.seed, partial(bench.adapted, method))


def sparsity(bench: Bench, kept: Kept) -> None:
    """What E-WEMoE is made of, and how much it can drop."""
    for row, method in SPARSE.items():
        kept.once(row, bench.sources.seed, partial(bench.adapted, method))


def figure4(bench: Bench, kept: Kept) -> None:
    for rate in RATES:
        made = partial(bench.adapted, ROUTED["WEMoE (2-layer)"], eval_steps=25, learning_rate=rate)
        kept.once(f"{rate:g}", bench.sources.seed, made)


def figure5(bench: Bench, kept: Kept) -> None:
    seed = bench.sources.seed
    for row in ("Task arithmetic", "Ties-Merging"):
        for scale in LAMBDAS:
            method = scaled(STATIC[row], scale)
            kept.once(f"{row}, {scale}", seed, partial(bench.static, method))
    for row in ("WEMoE (0-layer)", "WEMoE (2-layer)"):
        for scale in LAMBDAS_ROUTED:
            method = scaled(ROUTED[row], scale)
            kept.once(f"{row}, {scale}", seed, partial(bench.adapted, method))


def scaled(method: dict[str, Any], scale: float) -> dict[str, Any]:
    parameters = method["parameters"]
    lambdas = dict.fromkeys({"lambda", "init_lambda"} & parameters.keys(), scale)
    return {**method, "parameters": {**parameters, **lambdas}}


def table5(bench: Bench, kept: Kept) -> None:
    for corruption in CORRUPTIONS:
        data = corrupted(bench.data, corruption)
        tests = write_tests(data, bench.scratch / corruption)
        there = replace(bench, data=data, tests=tests)
        for row in COMPARED:
            made = (
                partial(there.static, STATIC[row])
                if row in STATIC
                else partial(there.adapted, ROUTED[row])
            )
            kept.once(f"{row}, {corruption}", bench.sources.seed, made)


def corrupted(data: dict[str, Pictures], corruption: str) -> dict[str, Pictures]:
    """The test pictures of the four tasks, corrupted as Hendrycks and Dietterich have it, at one
    severity.

    That is done at twice the size and more, since the library takes no pictures below 32 pixels.
    """
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        raise UserError(
            "corruptions need imagecorruptions: pip install 'mergekit-moe-ext[corruptions]'"
        ) from error
    np.random.seed(0)  # which that library draws from
    found: dict[str, Any] = {}
    for task in TASKS:
        large = [
            Image.fromarray(one).resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC)
            for one in data[task].test
        ]
        worse = [
            corrupt(np.asarray(one.convert("RGB")), severity=SEVERITY, corruption_name=corruption)
            for one in large
        ]
        small = [
            Image.fromarray(one).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
            for one in worse
        ]
        found[task] = replace(data[task], test=np.stack([np.asarray(one) for one in small]))
    return {**data, **found}


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ±{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def markdown(kept: Kept, rows: Iterable[str], columns: Mapping[str, Sequence[str]]) -> str:
    """A line per row that was measured; a column is the average over its tasks."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        seeds = kept.cells.get(row, {})
        if seeds:
            cells = [
                percent([average(found, names) for found in seeds.values()])
                for names in columns.values()
            ]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claim(
    kept: Kept, better: str, worse: str, names: Sequence[str] = TASKS, where: str = ""
) -> list[str]:
    """Whether one row is above another on average, and in how many seeds."""
    one, other = (kept.cells.get(row, {}) for row in (better, worse))
    both = [seed for seed in one if seed in other]
    if not both:
        return []
    held = sum(average(one[seed], names) > average(other[seed], names) for seed in both)
    state = "holds" if held == len(both) else "FAILS" if held == 0 else "mixed"
    return [f"{state}  {better} above {worse}{where} ({held} of {len(both)} seeds)"]


def text_of_table2(kept: Kept) -> str:
    single = {task: [task] for task in TASKS}
    everything = [
        "Pre-trained",
        "Individual",
        "Traditional MTL",
        *STATIC,
        *ROUTED,
        "WEMoE (2-layer), with labels",
    ]
    claims = [
        ("Individual", "Pre-trained"),
        ("Individual", "Traditional MTL"),
        ("Weight averaging", "Pre-trained"),
        ("Task arithmetic", "Weight averaging"),
        ("Ties-Merging", "Task arithmetic"),
        ("Ties-Merging", "AdaMerging (task)"),
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
    parts = [
        "Table 2",
        markdown(kept, everything, {**single, "average": TASKS}),
        "\n".join(line for pair in claims for line in claim(kept, *pair)),
        "Table 4",
        markdown(
            kept,
            ["Pre-trained", *COMPARED],
            {"seen": TASKS, **{t: [t] for t in UNSEEN}, "unseen": UNSEEN},
        ),
        "\n".join(
            line
            for pair in unseen
            for line in claim(kept, *pair, names=UNSEEN, where=" on unseen tasks")
        ),
    ]
    return "\n\n".join(parts)


def text_of_table6(kept: Kept) -> str:
    rows = [f"{row}{which}" for which in ("", ", own task's") for row in STRATEGIES]
    table = markdown(kept, rows, {**{task: [task] for task in TASKS}, "average": TASKS})
    lines = claim(kept, "Attention + MLP", "MLP only") + claim(kept, "MLP only", "Entire block")
    return "\n\n".join(["Table 6 (routers of one layer)", table, "\n".join(lines)])


def text_of_sparsity(kept: Kept) -> str:
    return "E-WEMoE\n\n" + markdown(
        kept, SPARSE, {**{task: [task] for task in TASKS}, "average": TASKS}
    )


def text_of_figure4(kept: Kept) -> str:
    lines = ["Figure 4: the average accuracy of WEMoE (2-layer) by learning rate and step"]
    for rate, seeds in kept.cells.items():
        curves = [found["curve"] for found in seeds.values()]
        means = [f"{step}: {percent([curve[step] for curve in curves])}" for step in curves[0]]
        lines.append(f"{rate}: " + ", ".join(means))
    return "\n".join(lines)


def text_of_figure5(kept: Kept) -> str:
    lines = ["Figure 5: the average accuracy by lambda", ""]
    lines += ["| | " + " | ".join(map(str, LAMBDAS)) + " |", "|---|" + "---:|" * len(LAMBDAS)]
    for row in ("Task arithmetic", "Ties-Merging", "WEMoE (0-layer)", "WEMoE (2-layer)"):
        by_lambda = [kept.cells.get(f"{row}, {scale}", {}).values() for scale in LAMBDAS]
        lines.append(
            f"| {row} | "
            + " | ".join(percent([average(f) for f in each]) if each else "" for each in by_lambda)
            + " |"
        )
    for scale in LAMBDAS_ROUTED:
        for row in ("Task arithmetic", "Ties-Merging", "WEMoE (0-layer)"):
            lines += claim(kept, f"WEMoE (2-layer), {scale}", f"{row}, {scale}")
    return "\n".join(lines)


def text_of_table5(kept: Kept) -> str:
    parts = ["Table 5"]
    single = {task: [task] for task in TASKS}
    for corruption in CORRUPTIONS:
        rows = [f"{row}, {corruption}" for row in COMPARED]
        parts.append(markdown(kept, rows, {**single, "average": TASKS}))
        lines = [claim(kept, f"WEMoE (2-layer), {corruption}", row) for row in rows[:-1]]
        parts.append("\n".join(line for each in lines for line in each))
    return "\n\n".join(parts)


def draw_curves(kept: Kept, path: Path) -> None:
    """Figure 4: the mean over seeds, and from the least to the greatest."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for rate, seeds in kept.cells.items():
        curves = [found["curve"] for found in seeds.values()]
        _band(axes, list(map(int, curves[0])), [list(curve.values()) for curve in curves], rate)
    axes.set_xlabel("steps")
    _finish(axes, figure, path, "learning rate")


def draw_lambdas(kept: Kept, path: Path) -> None:
    """Figure 5."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for row in ("Task arithmetic", "Ties-Merging", "WEMoE (0-layer)", "WEMoE (2-layer)"):
        there = [scale for scale in LAMBDAS if kept.cells.get(f"{row}, {scale}")]
        seeds = sorted({seed for scale in there for seed in kept.cells[f"{row}, {scale}"]})
        complete = [scale for scale in there if len(kept.cells[f"{row}, {scale}"]) == len(seeds)]
        if complete:
            curves = [
                [average(kept.cells[f"{row}, {scale}"][seed]) for scale in complete]
                for seed in seeds
            ]
            _band(axes, complete, curves, row)
    axes.set_xlabel("λ")
    _finish(axes, figure, path, None)


def _band(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], label: str) -> None:
    columns = [[100 * value for value in column] for column in zip(*curves, strict=True)]
    (line,) = axes.plot(
        x, [statistics.mean(column) for column in columns], marker="o", ms=3, label=label
    )
    lowest, highest = ([pick(column) for column in columns] for pick in (min, max))
    axes.fill_between(x, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)


def _finish(axes: Any, figure: Any, path: Path, title: str | None) -> None:
    axes.set_ylabel("average accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


def draw_routing(kept: Kept, path: Path) -> None:
    """Figures 11 and 12: mean coefficients, and how often each is the largest; by task, a line per
    block.
    """
    plt = pyplot()
    seeds = [found["coefficients"] for found in kept.cells["WEMoE (2-layer)"].values()]
    figure, panels = plt.subplots(
        2, len(TASKS), figsize=(2.5 * len(TASKS), 4.4), sharex=True, layout="constrained"
    )
    for line, (kind, said) in zip(
        panels, (("mean", "coefficients"), ("first", "largest")), strict=True
    ):
        for axes, task in zip(line, TASKS, strict=True):
            means = np.mean([found[task][kind] for found in seeds], axis=0)
            heat_map(axes, means.tolist(), 1)
            for (y, x), value in np.ndenumerate(means):
                axes.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value > 0.6 else "black",
                )
            axes.set_xticks(range(len(TASKS)), TASKS, rotation=30)
            axes.set_title(f"{said}, pictures: {task}", fontsize=8)
        line[0].set_ylabel("block")
    figure.supxlabel("expert", fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


PARTS: dict[str, tuple[Callable[[Bench, Kept], None], Callable[[Kept], str]]] = {
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
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option(
    "--only",
    type=click.Choice(list(PARTS)),
    multiple=True,
    help="A part; several may be given. [default: all]",
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=(0, 1, 2),
    show_default=True,
    help="Several may be given.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=ADAPTATION["steps"],
    show_default=True,
    help="Of an adaptation.",
)
@click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    help="Draw the figures into this directory.",
)
def main(
    output: Path, only: tuple[str, ...], seeds: tuple[int, ...], steps: int, plot: Path | None
) -> None:
    if plot:
        pyplot()  # if it is not there, say so before the work
        plot.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    # or it lists the head, left out, at every trunk
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    adaptation = {**ADAPTATION, "steps": steps}
    settings = {**adaptation, **LEARNING_RATE, "sources": folder_of(PRETRAINING, FINE_TUNING).name}
    files = {part: Kept(output, part, settings) for part in only or PARTS}
    data = {task: shortened(pictures) for task, pictures in tasks([*TASKS, *UNSEEN]).items()}
    base = make_base()
    with tempfile.TemporaryDirectory() as scratch:
        tests = write_tests(data, Path(scratch) / "clean")
        for seed in seeds:
            tqdm.write(f"seed {seed}", file=sys.stderr)
            bench = Bench(make_sources(base, data, seed), data, tests, Path(scratch), adaptation)
            for part, kept in files.items():
                PARTS[part][0](bench, kept)
    for part, kept in files.items():
        click.echo(PARTS[part][1](kept) + "\n")
        if plot and part in DRAWN:
            draw, name = DRAWN[part]
            draw(kept, plot / name)


if __name__ == "__main__":
    main()
