"""Merges that WEMoE's tables have as baselines, and that mergekit does not have.

- Fisher merging (Matena and Raffel, 2022): each parameter is an average of the models', weighed by
  their diagonals of the Fisher information.
- RegMean (Jin et al., 2023): each linear layer is the one whose outputs are nearest to those of the
  models' own layers on their own inputs.
- The task vectors of AdaMerging++ (Yang et al., 2024): as TIES trims them, but not summed. Models
  that are these vectors away from the base are sources for `wemoe` with `upscale: all`, which
  learns the coefficients.

The first two need some images of every task, the first with labels.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.sparsify import SparsificationMethod, sparsify
from real_data import written_at_once
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

State = dict[str, Tensor]  # tensors of a model, by name


class Classifier(nn.Module):
    """A trunk with a head, which is a matrix (classes, features + 1) with the bias last, and not
    among the parameters.

    `features_of(trunk, inputs)` are the features that the head reads, (n, features).
    """

    def __init__(
        self, trunk: nn.Module, features_of: Callable[[Any, Tensor], Tensor], head: Tensor
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.features_of = features_of
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits, (n, classes)."""
        features = self.features_of(self.trunk, inputs)
        return functional.linear(features, self.head[:, :-1], self.head[:, -1])


def diagonal_fisher(network: nn.Module, inputs: Tensor, labels: Tensor, at_once: int = 4) -> State:
    """The diagonal of the empirical Fisher information, for each parameter that requires gradients:
    the mean over samples of the squared gradient of the label's log-likelihood.

    `network` maps a batch of inputs to logits, (n, classes). There are `at_once` gradients in
    memory at a time.
    """
    trained = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter.detach()

    def loss(parameters: State, sample: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, parameters, (sample[None],))
        return functional.cross_entropy(logits, label[None])

    gradients_of = vmap(grad(loss), in_dims=(None, 0, 0))
    fisher = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    batches = zip(inputs.split(at_once), labels.split(at_once), strict=True)
    # `vmap` has no batched form of the fused kernels of attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        for batch, labels_of_batch in batches:
            for name, gradients in gradients_of(trained, batch, labels_of_batch).items():
                fisher[name] += gradients.square().sum(dim=0) / len(inputs)
    return fisher


def normalized(fisher: State) -> State:
    """The same information divided by its L2 norm over all parameters, so that a model that is less
    sure of its labels does not count for more than others.
    """
    norm = torch.stack([each.double().norm() for each in fisher.values()]).norm()
    return {name: (each / norm).to(each.dtype) for name, each in fisher.items()}


def fisher_merge(models: Sequence[State], fishers: Sequence[State]) -> State:
    """The average of each parameter over models, weighed by their Fisher information. What no model
    has information on, because all of it is zero or missing, is averaged evenly.
    """
    merged = {}
    for name in models[0]:
        values = torch.stack([model[name] for model in models])
        merged[name] = values.mean(dim=0)
        if name in fishers[0]:
            # In double precision: the squares of small gradients underflow in products.
            weights = torch.stack([fisher[name] for fisher in fishers]).double()
            total = weights.sum(dim=0)
            weighed = (weights * values).sum(dim=0) / total
            merged[name] = torch.where(total > 0, weighed, merged[name]).to(values.dtype)
    return merged


@torch.no_grad()
def gram_matrices(network: nn.Module, inputs: Tensor, at_once: int = 64) -> State:
    """The Gram matrix XᵀX / n of the inputs X, (n, width), of each linear layer that `network`
    calls, by the name of its weight and in double precision. Each token is a row of X.
    """
    sums: State = {}
    rows: dict[str, int] = {}

    def add(name: str, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + x.T @ x
        rows[name] = rows.get(name, 0) + len(x)

    hooks = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            hooks.append(layer.register_forward_pre_hook(partial(add, f"{name}.weight")))
    try:
        for batch in inputs.split(at_once):
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / rows[name] for name, total in sums.items()}


def regmean_merge(
    models: Sequence[State], grams: Sequence[State], off_diagonal: float = 0.9
) -> State:
    """The models with each linear layer that has a Gram matrix merged in closed form:
    W = Σ Wᵢ Gᵢ (Σ Gᵢ)⁻¹, where the elements of Gᵢ off its diagonal are first multiplied by
    `off_diagonal`, as in the paper. Everything else, biases included, is averaged.
    """
    merged = {}
    for name in models[0]:
        values = torch.stack([model[name] for model in models])
        if name not in grams[0]:
            merged[name] = values.mean(dim=0)
            continue
        scaled = []
        for gram in grams:
            diagonal = torch.diag(gram[name].diagonal())
            scaled.append(off_diagonal * gram[name] + (1 - off_diagonal) * diagonal)
        each_gram = torch.stack(scaled)
        targets = (each_gram @ values.double().mT).sum(dim=0)
        merged[name] = torch.linalg.solve(each_gram.sum(dim=0), targets).T.to(values.dtype)
    return merged


@torch.no_grad()
def merge_parameters(
    classifiers: Sequence[Classifier], merge: Callable[[list[State]], State]
) -> nn.Module:
    """The trunk of the first classifier, changed in place: `merge` makes its parameters from those
    of all.
    """
    states = []
    for classifier in classifiers:
        state: State = dict(classifier.named_parameters())
        states.append(state)
    first = classifiers[0]
    first.load_state_dict(merge(states))
    return first.trunk


def trimmed_vectors(base: State, models: Sequence[State], density: float) -> list[State]:
    """The task vectors of the models with the first two steps of TIES: only the share `density` of
    each tensor's elements is kept, the largest, and of these only the ones that have the sign of
    their sum over models. mergekit's `ties` adds up the same, per tensor; AdaMerging's code trims
    all tensors of a model together.
    """
    vectors: list[State] = [{} for _ in models]
    for name, start in base.items():
        trimmed = []
        for model in models:
            vector = model[name] - start
            trimmed.append(sparsify(vector, density, SparsificationMethod.magnitude))
        stacked = torch.stack(trimmed)
        stacked = stacked * get_mask(stacked, "sum")
        for of_model, vector in zip(vectors, stacked, strict=True):
            of_model[name] = vector
    return vectors


def write_trimmed(
    base: Path, models: Mapping[str, Path], head: str, density: float, folder: Path
) -> dict[str, Path]:
    """Writes for each task a copy of its model in `folder` that is the base plus a trimmed task
    vector, and returns them. Tensors whose names begin with `head` stay the model's own.

    A model is a directory with one `model.safetensors`.
    """
    starts = load_file(base / "model.safetensors")
    states = [load_file(path / "model.safetensors") for path in models.values()]
    body = {name: tensor for name, tensor in starts.items() if not name.startswith(head)}
    vectors = trimmed_vectors(body, states, density)
    written = {}
    for (task, path), state, vector in zip(models.items(), states, vectors, strict=True):
        for name, start in body.items():
            state[name] = start + vector[name]
        with written_at_once(folder / task) as unfinished:
            shutil.copytree(path, unfinished, dirs_exist_ok=True)
            save_file(state, unfinished / "model.safetensors", metadata={"format": "pt"})
        written[task] = folder / task
    return written
