"""Every router and both ways of mixing, against loops over tokens and experts written from the
papers, and PEFT.

The loops take nothing from the package but the values that a router's parameters have. They run in
float64 on the base model, whose linear modules get their updates from hooks, and the logits are
compared. Formulas are numbered as in "Trade-offs in Ensembling, Merging and Routing Among
Parameter-Efficient Experts", and in "WEMoE" where it says so.
"""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import (
    ArrowConfig,
    PeftModel,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_routing import RoutedLoraConfig
from peft_routing.routers.prototypes import top_right_singular_vectors
from tests.peft_routing.adapters import TARGETS, make_base, save_lora

Updates = Callable[
    [str, Tensor], Tensor
]  # a module's name and its input, to what is added to its output

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.1}
ALPHAS = {
    "math": 8,
    "code": 16,
    "law": 4,
    "art": 2,
}  # over rank 4: scalings that float32 holds exactly
WEIGHTS = [0.5, -0.25, 1.5, 0.75]
CLUSTERS = {"math": "x", "code": "y", "law": "x", "art": "z"}
CONSTANT: dict[str, dict[str, Any]] = {
    "uniform": {"router": "uniform"},
    "fixed": {"router": "fixed", "weights": WEIGHTS},
    "global": {"router": "global"},
    "layer": {"router": "layer"},
    "mlp-0": {"router": "mlp", "mlp_layers": 0},
}
ROUTED: dict[str, dict[str, Any]] = {
    "linear": {"router": "linear"},
    "linear-abs": {"router": "linear", "init": "arrow"},
    "arrow": {"router": "arrow"},
    "hierarchical": {"router": "hierarchical", "clusters": CLUSTERS},
    "hierarchical-abs": {"router": "hierarchical", "clusters": CLUSTERS, "init": "arrow"},
    "mlp-1": {"router": "mlp", "mlp_layers": 1},
    "mlp-2": {"router": "mlp", "mlp_layers": 2},
}
ALL = CONSTANT | ROUTED
MIXINGS = ("full", "low_rank")
GRANULARITIES = ("token", "sequence")
LENGTHS = (6, 4, 2)  # with a prefix of 3: longer, longer, shorter
PREFIX = 3


@dataclass(frozen=True)
class Part:
    """One of the things that are mixed at a module: an expert, or the merged expert of a
    cluster."""

    update: Tensor  # s B A
    down: Tensor | None = None  # A
    up: Tensor | None = None  # s B


Parts = dict[str, list[Part]]  # of each adapted module


@dataclass
class Naive:
    """The formulas, for one hidden state at a time."""

    config: dict[str, Any]
    parts: Parts
    names: Sequence[str]
    state: dict[str, Tensor] = field(default_factory=dict)  # the router's parameters
    mixing: str = "full"
    granularity: str = "token"
    top_k: int | None = None
    temperature: float = 1.0
    prefix: int = PREFIX
    mask: Tensor | None = None
    at_start: bool = False

    def __call__(self, module: str, x: Tensor) -> Tensor:
        parts = (
            self.clusters_of(module)
            if self.config["router"] == "hierarchical"
            else self.parts[module]
        )
        prototypes = self.prototypes(module, parts)
        update = torch.zeros(*x.shape[:2], len(parts[0].update), dtype=x.dtype)
        for row, tokens in enumerate(x):
            real = [t for t in range(len(tokens)) if self.mask is None or self.mask[row, t]]
            scores = {t: self.scores(module, tokens[t], parts, prototypes) for t in real}
            if self.granularity == "sequence":
                chosen = real[: self.prefix]
                mean = sum(scores[t] for t in chosen) / len(chosen)
                scores = dict.fromkeys(real, mean)
            for t in real:
                update[row, t] = self.mix(self.coefficients(scores[t]), parts, tokens[t])
        return update

    def parameter(self, module: str, name: str) -> Tensor:
        return self.state[f"base_model.model.{module}.routed_lora_router.{name}"]

    def prototypes(self, module: str, parts: list[Part]) -> list[Tensor]:
        """2.4: the first right singular vector of each update; a router keeps it in float32."""
        if self.config["router"] != "arrow" and not self.at_start:
            return []
        return [first_right_singular_vector(part.update).float().double() for part in parts]

    def scores(self, module: str, h: Tensor, parts: list[Part], prototypes: list[Tensor]) -> Tensor:
        kind = self.config["router"]
        if kind == "uniform":
            return torch.full((len(parts),), 1 / len(parts), dtype=h.dtype)
        if kind == "fixed":
            return torch.tensor(self.config["weights"], dtype=h.dtype)
        if kind == "global":
            (logits,) = (
                value
                for key, value in self.state.items()
                if key.endswith("routed_lora_router.logits")
            )
            return logits
        if kind == "layer":
            return self.parameter(module, "logits")
        if kind == "mlp":
            return self.mlp(module, h)
        rows = prototypes or list(self.parameter(module, "weight"))
        products = torch.stack([(row * h).sum() for row in rows])
        return products.abs() if kind == "arrow" or self.config.get("init") == "arrow" else products

    def mlp(self, module: str, h: Tensor) -> Tensor:
        """WEMoE B.3: b0; W1 h + b1; W2 ReLU(W1 h + b1) + b2."""
        if self.config["mlp_layers"] == 2:
            h = self.parameter(module, "weight_in") @ h + self.parameter(module, "bias_in")
            h = torch.where(h > 0, h, torch.zeros_like(h))
        bias = self.parameter(module, "bias_out")
        return (
            bias
            if self.config["mlp_layers"] == 0
            else self.parameter(module, "weight_out") @ h + bias
        )

    def coefficients(self, scores: Tensor) -> Tensor:
        """B.4: softmax, a mask of the top k, and division by what is left; mlp's are not
        normalised.
        """
        kind = self.config["router"]
        if kind in ("uniform", "fixed"):
            return scores
        if kind == "mlp":
            return scores * self.masked(scores.abs())
        exponentials = torch.exp(scores / self.temperature)
        shares = exponentials / exponentials.sum()
        kept = shares * self.masked(shares)
        return kept / kept.sum()

    def masked(self, values: Tensor) -> Tensor:
        k = len(values) if self.top_k is None else self.top_k
        best = sorted(range(len(values)), key=lambda i: -values[i].item())[:k]
        return torch.tensor(
            [1.0 if i in best else 0.0 for i in range(len(values))], dtype=values.dtype
        )

    def mix(self, coefficients: Tensor, parts: list[Part], h: Tensor) -> Tensor:
        """B.2: W* h with W* the mixture of the updates, or B* A* h."""
        if self.mixing == "full":
            return sum(c * (part.update @ h) for c, part in zip(coefficients, parts, strict=True))
        down = sum(c * part.down for c, part in zip(coefficients, parts, strict=True))
        up = sum(c * part.up for c, part in zip(coefficients, parts, strict=True))
        return up @ (down @ h)

    def clusters_of(self, module: str) -> list[Part]:
        """5.3: the merged expert of each cluster, by the clusters' names; uniform merges at the
        start.
        """
        clusters = [self.config["clusters"][name] for name in self.names]
        logits = None if self.at_start else self.parameter(module, "logits")
        merged = []
        for cluster in sorted(set(clusters)):
            members = [i for i, of in enumerate(clusters) if of == cluster]
            weights = [1.0 if logits is None else logits[i].exp().item() for i in members]
            shares = [w / sum(weights) for w in weights]
            merged.append(
                merge_parts([self.parts[module][i] for i in members], shares, self.mixing)
            )
        return merged


def merge_parts(parts: list[Part], shares: list[float], mixing: str) -> Part:
    if mixing == "full":
        return Part(sum(share * part.update for share, part in zip(shares, parts, strict=True)))
    down = sum(share * part.down for share, part in zip(shares, parts, strict=True))
    up = sum(share * part.up for share, part in zip(shares, parts, strict=True))
    return Part(up @ down, down, up)


def first_right_singular_vector(update: Tensor) -> Tensor:
    """Zeros for an update that is zero."""
    _, values, vh = torch.linalg.svd(update.double())
    return vh[0] if values[0] > 0 else torch.zeros_like(vh[0])


def hooked_logits(modules: Sequence[str], update: Updates, **inputs: Tensor) -> Tensor:
    """Of the plain model, with an update added to what the modules give."""

    def added(name: str) -> Callable:
        return lambda linear, args, output: output + update(name, args[0])

    handles = [
        plain_base().get_submodule(name).register_forward_hook(added(name)) for name in modules
    ]
    try:
        return logits_of(plain_base(), **inputs)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits_of(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def route(experts: dict[str, str], base: Any, seed: int | None = None, **config: Any) -> Any:
    """A routed model; with a seed, what its router learns is random."""
    model = get_peft_model(
        base, RoutedLoraConfig(experts=experts, **{"routing_tokens": PREFIX, **config})
    ).eval()
    generator = torch.Generator().manual_seed(seed or 0)
    for name, parameter in model.named_parameters():
        if seed is not None and ".routed_lora_router." in name and config["router"] != "arrow":
            parameter.data = (
                torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.5
            )
    return model


def read_factors(path: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module."""
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    modules = [
        key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")
    ]
    return {
        module.removeprefix("base_model.model."): (
            tensors[f"{module}.lora_A.weight"],
            tensors[f"{module}.lora_B.weight"],
        )
        for module in modules
    }


def read_parts(experts: dict[str, str]) -> Parts:
    """Of experts that all have the same modules, with the scaling alpha / r."""
    parts: Parts = {}
    for path in experts.values():
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        for module, (a, b) in read_factors(path).items():
            up = b * (config["lora_alpha"] / config["r"])
            parts.setdefault(module, []).append(Part(up @ a, a, up))
    return parts


def batch(side: str) -> dict[str, Tensor]:
    """Sequences of LENGTHS, padded on one side; without a mask where there is nothing to pad."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(2, 96, (length,), generator=generator) for length in LENGTHS]
    if side == "none":
        return {"input_ids": torch.stack([rows[0], rows[0].flip(0)])}
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
    return {"input_ids": padded, "attention_mask": mask}


def assert_as_by_hand(routed: Any, naive: Naive, side: str) -> None:
    """At all real tokens; and the update can be seen."""
    inputs = batch(side)
    naive.state = {
        k: v for k, v in get_peft_model_state_dict(routed).items() if ".routed_lora_router." in k
    }
    naive.mask = inputs.get("attention_mask")
    real = torch.ones_like(inputs["input_ids"]).bool() if naive.mask is None else naive.mask.bool()
    expected = hooked_logits(list(naive.parts), naive, **inputs)[real]
    assert (expected - logits_of(plain_base(), **inputs)[real]).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(routed, **inputs)[real], expected, atol=1e-9, rtol=0)


def fresh_base(**config: Any) -> Any:
    return make_base(dtype=torch.float64, **{**SMALL, **config})


@functools.cache
def plain_base() -> Any:
    """The same weights, never adapted."""
    return fresh_base()


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four, in float64, each with its own scaling."""
    root = tmp_path_factory.mktemp("experts")
    return {
        name: str(
            save_lora(
                root / name,
                seed,
                fresh_base(),
                lora_alpha=alpha,
                target_modules=["v_proj", "down_proj"],
            )
        )
        for seed, (name, alpha) in enumerate(ALPHAS.items(), 1)
    }


@pytest.fixture(scope="session")
def parts(experts: dict[str, str]) -> Parts:
    return read_parts(experts)


def every_top_k() -> list[Any]:
    """The values of `top_k` for every router, where it takes one."""
    cases = []
    for name in ALL:
        values = (None,) if name in ("uniform", "fixed") else (None, 1, 2)
        cases += [pytest.param(name, k, id=f"{name}-{k or 'all'}") for k in values]
    return cases


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("name", "top_k"), every_top_k())
def test_logits_are_those_of_the_loops(
    experts: dict[str, str],
    parts: Parts,
    name: str,
    top_k: int | None,
    mixing: str,
    granularity: str,
) -> None:
    options = {"mixing": mixing, "granularity": granularity}
    routed = route(experts, fresh_base(), 3, top_k=top_k, **options, **ALL[name]).double()
    by_default = 3 if name == "arrow" else None
    naive = Naive(ALL[name], parts, list(experts), top_k=top_k or by_default, **options)
    for side in ("left", "right"):
        assert_as_by_hand(routed, naive, side)


@pytest.mark.parametrize("temperature", [0.25, 4.0])
@pytest.mark.parametrize("name", ["global", "layer", "linear", "arrow", "hierarchical-abs"])
def test_temperature_divides_the_scores(
    experts: dict[str, str], parts: Parts, name: str, temperature: float
) -> None:
    options = {"mixing": "full", "top_k": 2}
    routed = route(
        experts, fresh_base(), 3, router_temperature=temperature, **options, **ALL[name]
    ).double()
    naive = Naive(ALL[name], parts, list(experts), temperature=temperature, **options)
    assert_as_by_hand(routed, naive, "none")


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("name", [*ROUTED])
def test_a_sequence_chooses_by_its_prefix(
    experts: dict[str, str], parts: Parts, name: str, tokens: int
) -> None:
    options = {"mixing": "full", "granularity": "sequence", "top_k": 2}
    routed = route(experts, fresh_base(), 3, routing_tokens=tokens, **options, **ALL[name]).double()
    naive = Naive(ALL[name], parts, list(experts), prefix=tokens, **options)
    for side in ("left", "none"):
        assert_as_by_hand(routed, naive, side)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", ["linear-abs", "hierarchical-abs"])
def test_prototypes_start_a_learned_router(
    experts: dict[str, str], parts: Parts, name: str, mixing: str, granularity: str
) -> None:
    options = {"mixing": mixing, "granularity": granularity, "top_k": 2}
    routed = route(experts, fresh_base(), **options, **ALL[name]).double()
    naive = Naive(ALL[name], parts, list(experts), at_start=True, **options)
    assert_as_by_hand(routed, naive, "left")


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", ["global", "layer", "linear", "mlp-0"])
def test_learned_routers_start_as_a_merge(
    experts: dict[str, str], parts: Parts, name: str, mixing: str
) -> None:
    start = {"init_lambda": 0.25} if name == "mlp-0" else {}
    routed = route(experts, fresh_base(), mixing=mixing, **start, **ALL[name]).double()
    naive = Naive(ALL["uniform"], parts, list(experts), mixing=mixing)
    assert_as_by_hand(routed, naive, "left")


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_hierarchy_starts_as_uniform_merges_across_and_inside(
    experts: dict[str, str], parts: Parts, mixing: str
) -> None:
    routed = route(experts, fresh_base(), mixing=mixing, **ALL["hierarchical"]).double()
    shares = [1 / 6, 1 / 3, 1 / 6, 1 / 3]  # of three clusters, the first of two experts
    naive = Naive({"router": "fixed", "weights": shares}, parts, list(experts), mixing=mixing)
    assert_as_by_hand(routed, naive, "left")


@pytest.mark.parametrize("layers", [1, 2])
def test_a_new_mlp_is_near_its_lambda_and_depends_on_the_input(
    experts: dict[str, str], parts: Parts, layers: int
) -> None:
    config = {"router": "mlp", "mlp_layers": layers}
    routed = route(experts, fresh_base(), mixing="full", **config).double()
    inputs = batch("none")
    fixed = Naive({"router": "fixed", "weights": [0.3] * 4}, parts, list(experts))
    near = hooked_logits(list(parts), fixed, **inputs)
    apart = (logits_of(routed, **inputs) - near).abs().max()
    moved = (near - logits_of(plain_base(), **inputs)).abs().max()
    assert 1e-6 < apart < 0.5 * moved


@pytest.mark.parametrize("weights", [None, [0.7, 0.2, 0.1]])
def test_weights_that_float32_lacks_are_exact_in_float64(
    experts: dict[str, str], parts: Parts, weights: list[float] | None
) -> None:
    """As 1/3, of which float32 is some 1e-8 off."""
    three = {name: path for name, path in experts.items() if name != "art"}
    config = {"router": "uniform"} if weights is None else {"router": "fixed", "weights": weights}
    naive = Naive(
        config, {module: of_experts[:3] for module, of_experts in parts.items()}, list(three)
    )
    assert_as_by_hand(route(three, fresh_base(), mixing="full", **config).double(), naive, "none")


@pytest.mark.parametrize("changes", [{"r": 3}, {"r": 6, "use_rslora": True}])
def test_scalings_that_float32_lacks_are_exact_in_float64(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """8 / 3 and 8 / sqrt(6)."""
    experts = {
        n: str(save_lora(tmp_path / n, seed, base=fresh_base(), **changes))
        for seed, n in enumerate("ab")
    }
    naive = Naive({"router": "fixed", "weights": [1, 0.5]}, parts_by_peft(experts), list(experts))
    assert_as_by_hand(
        route(experts, fresh_base(), mixing="full", **naive.config).double(), naive, "none"
    )


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def flat_update(rank: int, n_out: int, n_in: int, seed: int) -> tuple[Tensor, Tensor]:
    """A and B of an update with singular values 0.99**i, which neither of them has by itself."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, n_out)
    values = 0.99 ** torch.arange(rank, dtype=torch.float64)
    inside = torch.randn(rank, rank, generator=generator, dtype=torch.float64) + 3 * torch.eye(rank)
    a = inside @ orthonormal(n_in, rank, generator).T
    b = orthonormal(n_out, rank, generator) @ torch.diag(values) @ torch.linalg.inv(inside)
    return a, b


def angle(first: Tensor, second: Tensor) -> float:
    """Between two lines, also where it is tiny."""
    first, second = first.double() / first.double().norm(), second.double() / second.double().norm()
    apart = min((first - second).norm().item(), (first + second).norm().item())
    return 2 * torch.asin(torch.tensor(apart / 2).clamp(max=1)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_out", "n_in"), [(48, 64), (64, 48), (8, 64)])
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_prototypes_are_exact_on_flat_spectra(
    rank: int, n_out: int, n_in: int, dtype: torch.dtype
) -> None:
    pairs = [tuple(t.to(dtype) for t in flat_update(rank, n_out, n_in, seed)) for seed in range(3)]
    found = top_right_singular_vectors(pairs)
    assert found.dtype == torch.float64
    for vector, (a, b) in zip(found, pairs, strict=True):
        assert abs(vector.norm().item() - 1) < 1e-12
        assert angle(vector, first_right_singular_vector(b.double() @ a.double())) < 1e-9


@pytest.mark.parametrize("rank", [4, 16])
def test_power_steps_are_visibly_off_on_flat_spectra(rank: int) -> None:
    config = ArrowConfig(top_k=1, rng_seed=0)
    config.task_adapter_names = ["task_0"]
    peft = ArrowLoraLinearLayer(64, config)
    for seed in range(5):
        a, b = flat_update(rank, 48, 64, seed)
        spectrum = torch.linalg.svdvals(b @ a)[:rank]
        torch.testing.assert_close(
            spectrum, 0.99 ** torch.arange(rank, dtype=torch.float64), atol=1e-12, rtol=0
        )
        exact = first_right_singular_vector(b @ a)
        assert angle(peft.top_right_singular_vec_from_BA(a, b), exact) > 0.1
        assert angle(top_right_singular_vectors([(a, b)])[0], exact) < 1e-9


def test_an_update_of_zero_has_no_prototype() -> None:
    a, b = flat_update(4, 48, 64, seed=1)
    disjoint_a, disjoint_b = torch.zeros_like(a), torch.zeros_like(b)
    disjoint_a[:2], disjoint_b[:, 2:] = a[:2], b[:, 2:]
    pairs = [
        (a, torch.zeros_like(b)),
        (torch.zeros_like(a), b),
        (a, b),
        (torch.zeros(0, 64), torch.zeros(48, 0)),
        (disjoint_a, disjoint_b),
    ]
    lengths = top_right_singular_vectors(pairs).norm(dim=1)
    torch.testing.assert_close(
        lengths, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    )


def test_updates_of_rank_zero_alone() -> None:
    empty = (torch.zeros(0, 64), torch.zeros(48, 0))
    assert torch.equal(
        top_right_singular_vectors([empty] * 2), torch.zeros(2, 64, dtype=torch.float64)
    )


def test_prototypes_of_mixed_ranks_keep_their_places() -> None:
    pairs = [flat_update(rank, 48, 64, seed) for seed, rank in enumerate([4, 1, 16, 4, 7, 1])]
    for vector, (a, b) in zip(top_right_singular_vectors(pairs), pairs, strict=True):
        assert angle(vector, first_right_singular_vector(b @ a)) < 1e-9


def test_a_factor_may_lack_rank() -> None:
    """As where an adapter uses less than its rank, or a cluster holds the same expert twice."""
    a, b = flat_update(4, 48, 64, seed=1)
    for pair in (
        (torch.cat([a, a]), torch.cat([b, b], dim=1)),
        (a[[0, 0, 1, 1]], b),
        (a, b[:, [0, 0, 1, 1]]),
    ):
        (vector,) = top_right_singular_vectors([pair])
        assert angle(vector, first_right_singular_vector(pair[1] @ pair[0])) < 1e-9


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    rank=st.integers(1, 12),
    n_in=st.integers(12, 40),
    n_out=st.integers(2, 40),
    scale_a=st.floats(1e-6, 1e6),
    scale_b=st.floats(1e-6, 1e6),
)
def test_rotation_and_scale_of_the_rank_space_do_not_matter(
    seed: int, rank: int, n_in: int, n_out: int, scale_a: float, scale_b: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, n_in, generator=generator, dtype=torch.float64)
    b = torch.randn(n_out, rank, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(b @ a)
    assume(values[0] - values[1] > 1e-3 * values[0])  # or there is no one vector
    rotation = orthonormal(rank, rank, generator)
    pairs = [(a, b), (rotation @ a, b @ rotation.T), (scale_a * a, -scale_b * b)]
    plain, rotated, scaled = top_right_singular_vectors(pairs)
    assert angle(plain, rotated) < 1e-8
    assert angle(plain, scaled) < 1e-8
    assert angle(plain, first_right_singular_vector(b @ a)) < 1e-8


def save_steep(path: Path, seed: int) -> str:
    """An adapter whose updates are of rank 1, but for a little noise: what a power iteration is
    good at.
    """
    save_lora(path, seed, base=make_base(**SMALL))
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path / "adapter_model.safetensors")
    for key, old in tensors.items():
        column, row = (torch.randn(size, generator=generator) for size in old.shape)
        noise = torch.randn(old.shape, generator=generator)
        tensors[key] = 0.2 * torch.outer(column, row) + 0.002 * noise
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(path)


def load_all(experts: dict[str, str], base: Any) -> Any:
    """PEFT's own model with every expert as an adapter."""
    (first, path), *others = experts.items()
    model = PeftModel.from_pretrained(base, path, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_arrow_is_pefts_where_power_steps_converge(
    tmp_path: Path, top_k: int, temperature: float
) -> None:
    experts = {name: save_steep(tmp_path / name, seed) for seed, name in enumerate(ALPHAS, 1)}
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    theirs = create_arrow_model(make_base(**SMALL), list(experts.values()), config).eval()
    ours = route(
        experts, make_base(**SMALL), router="arrow", top_k=top_k, router_temperature=temperature
    )
    expected = logits_of(theirs, **batch("left"))
    plain = route(experts, make_base(**SMALL), router="uniform", mixing="full")
    assert (expected - logits_of(plain, **batch("left"))).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(ours, **batch("left")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_fixed_merge_is_pefts_concatenation(
    experts: dict[str, str], weights: list[float] | None
) -> None:
    theirs = load_all(experts, fresh_base()).double()
    given = weights or [0.25] * 4
    theirs.add_weighted_adapter(list(experts), given, adapter_name="merged", combination_type="cat")
    theirs.set_adapter("merged")
    router = {"router": "fixed", "weights": weights} if weights else {"router": "uniform"}
    ours = route(experts, fresh_base(), mixing="full", **router).double()
    expected = logits_of(theirs, **batch("none"))
    assert (expected - logits_of(plain_base(), **batch("none"))).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(ours, **batch("none")), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(
    "name", ["uniform", "global", "layer", "linear", "linear-abs", "arrow", "hierarchical"]
)
def test_one_expert_is_its_lora(experts: dict[str, str], name: str, mixing: str) -> None:
    """Its coefficient is 1, whatever the router has learned."""
    config = {**ALL[name], **({"clusters": {"code": 0}} if name == "hierarchical" else {})}
    alone = {"code": experts["code"]}
    ours = route(alone, fresh_base(), 3, mixing=mixing, **config).double()
    theirs = PeftModel.from_pretrained(fresh_base(), experts["code"]).double()
    expected = logits_of(theirs, **batch("none"))
    assert (expected - logits_of(plain_base(), **batch("none"))).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(ours, **batch("none")), expected, atol=1e-9, rtol=0)


def test_a_weight_of_one_is_that_expert(experts: dict[str, str]) -> None:
    ours = route(
        experts,
        fresh_base(),
        mixing="full",
        router="fixed",
        weights={"law": 1, "math": 0, "art": 0, "code": 0},
    )
    theirs = PeftModel.from_pretrained(fresh_base(), experts["law"]).double()
    inputs = batch("none")
    torch.testing.assert_close(
        logits_of(ours.double(), **inputs), logits_of(theirs, **inputs), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_linear_from_arrow_is_arrow(
    experts: dict[str, str], mixing: str, granularity: str, top_k: int
) -> None:
    options = {"mixing": mixing, "granularity": granularity, "top_k": top_k}
    learned = route(experts, fresh_base(), router="linear", init="arrow", **options)
    arrow = route(experts, fresh_base(), router="arrow", **options)
    other = route(experts, fresh_base(), router="linear", **options)
    expected = logits_of(arrow, **batch("left"))
    assert torch.equal(logits_of(learned, **batch("left")), expected)
    assert not torch.allclose(logits_of(other, **batch("left")), expected, atol=1e-3)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("clusters", [(0, 1, 0, 1), ("b", "a", "a", "a"), (0, 0, 0, 0)])
def test_rows_of_a_hierarchy_are_prototypes_of_uniform_merges(
    experts: dict[str, str], parts: Parts, mixing: str, clusters: tuple[Any, ...]
) -> None:
    of = dict(zip(experts, clusters, strict=True))
    routed = route(
        experts, fresh_base(), mixing=mixing, router="hierarchical", clusters=of, init="arrow"
    )
    state = get_peft_model_state_dict(routed)
    for module, of_experts in parts.items():
        rows = state[f"base_model.model.{module}.routed_lora_router.weight"]
        assert len(rows) == len(set(clusters))
        for row, cluster in zip(rows, sorted(set(clusters)), strict=True):
            members = [
                part for part, own in zip(of_experts, clusters, strict=True) if own == cluster
            ]
            merged = merge_parts(members, [1 / len(members)] * len(members), mixing)
            assert angle(row, first_right_singular_vector(merged.update)) < 1e-6


def test_the_two_mixings_have_different_hierarchies(experts: dict[str, str]) -> None:
    full, low_rank = (
        get_peft_model_state_dict(
            route(experts, fresh_base(), mixing=mixing, **ALL["hierarchical-abs"])
        )
        for mixing in MIXINGS
    )
    key = "base_model.model.model.layers.0.self_attn.v_proj.routed_lora_router.weight"
    assert angle(full[key][0], low_rank[key][0]) > 0.1  # of two experts
    assert angle(full[key][1], low_rank[key][1]) < 1e-6  # of one


@pytest.fixture(scope="session")
def gpt2_experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("gpt2")
    return {
        name: str(
            save_lora(
                root / name,
                seed,
                fresh_base(family="gpt2"),
                target_modules=["c_attn", "c_fc"],
                lora_alpha=alpha,
            )
        )
        for seed, (name, alpha) in enumerate(ALPHAS.items(), 1)
    }


def weights_of(model: Any) -> dict[str, Tensor]:
    """Copies, by the names that they have in a plain model."""
    return {
        name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", [*CONSTANT])
def test_a_merged_model_is_a_plain_one_with_the_same_logits(
    experts: dict[str, str], gpt2_experts: dict[str, str], name: str, mixing: str, family: str
) -> None:
    of_family = gpt2_experts if family == "gpt2" else experts
    base = fresh_base(family=family)
    before = weights_of(base)
    routed = route(of_family, base, 3, mixing=mixing, **ALL[name]).double()
    expected = logits_of(routed, **batch("left"))
    assert (expected - logits_of(fresh_base(family=family), **batch("left"))).abs().max() > 1e-2
    state = {k: v.clone() for k, v in get_peft_model_state_dict(routed).items()}
    merged = routed.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, **batch("left")), expected, atol=1e-9, rtol=0)

    naive = Naive(ALL[name], read_parts(of_family), list(of_family), mixing=mixing, state=state)
    after = weights_of(merged)
    assert after.keys() == before.keys() > {f"{module}.weight" for module in naive.parts}
    for key, weight in before.items():
        module = key.removesuffix(".weight")
        if module not in naive.parts:
            assert torch.equal(after[key], weight)
            continue
        of_module = naive.parts[module]
        hidden = torch.zeros(of_module[0].update.shape[1], dtype=torch.float64)
        update = merge_by_hand(
            naive, naive.coefficients(naive.scores(module, hidden, of_module, [])), of_module
        )
        update = update.T if family == "gpt2" else update
        torch.testing.assert_close(after[key], weight + update, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [*ROUTED])
def test_what_depends_on_the_input_cannot_be_merged(experts: dict[str, str], name: str) -> None:
    base = fresh_base()
    before = weights_of(base)
    routed = route(experts, base, 3, **ALL[name])
    expected = logits_of(routed, **batch("none"))
    for merge in (routed.merge_and_unload, routed.merge_adapter):
        with pytest.raises(ValueError, match="depend on the input"):
            merge()
    after = weights_of(routed.get_base_model())
    assert all(torch.equal(after[key], weight) for key, weight in before.items())
    assert torch.equal(logits_of(routed, **batch("none")), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", [*CONSTANT])
def test_merging_and_back(
    experts: dict[str, str], gpt2_experts: dict[str, str], name: str, mixing: str, family: str
) -> None:
    base = fresh_base(family=family)
    before = weights_of(base)
    routed = route(
        gpt2_experts if family == "gpt2" else experts, base, 3, mixing=mixing, **ALL[name]
    ).double()
    expected = logits_of(routed, **batch("none"))
    routed.merge_adapter()
    merged = weights_of(routed.get_base_model())
    assert any((merged[key] - weight).abs().max() > 1e-2 for key, weight in before.items())
    torch.testing.assert_close(logits_of(routed, **batch("none")), expected, atol=1e-9, rtol=0)
    routed.unmerge_adapter()
    after = weights_of(routed.get_base_model())
    for key, weight in before.items():
        torch.testing.assert_close(after[key], weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(logits_of(routed, **batch("none")), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_safe_merge_refuses_nan(experts: dict[str, str], mixing: str) -> None:
    for unload in (True, False):
        routed = route(experts, fresh_base(), router="uniform", mixing=mixing)
        broken = routed.get_parameter(
            "base_model.model.model.layers.0.mlp.down_proj.routed_lora_experts.default.B"
        )
        broken.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            routed.merge_and_unload(safe_merge=True) if unload else routed.merge_adapter(
                safe_merge=True
            )
        layer = routed.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
        assert torch.equal(
            layer.get_base_layer().weight, plain_base().model.layers[0].mlp.down_proj.weight
        )


def test_a_merge_of_bfloat16_is_rounded_once(low_experts: dict[str, str]) -> None:
    module = "model.layers.1.mlp.down_proj"
    base = make_base(dtype=torch.bfloat16, **SMALL)
    before = base.get_submodule(module).weight.detach().double()
    merged = route(low_experts, base, router="uniform", mixing="full").merge_and_unload()
    weight = merged.get_submodule(module).weight
    assert weight.dtype == torch.bfloat16
    pairs = [read_factors(path)[module] for path in low_experts.values()]
    exact = before + sum(2 * b.double() @ a.double() for a, b in pairs) / 4
    assert (weight == exact.bfloat16()).double().mean() > 0.99


def merge_by_hand(naive: Naive, coefficients: Tensor, parts: list[Part]) -> Tensor:
    """The update as one matrix, column by column."""
    unit_vectors = torch.eye(parts[0].update.shape[1], dtype=torch.float64)
    return torch.stack([naive.mix(coefficients, parts, unit) for unit in unit_vectors], dim=1)


MIXED: dict[str, dict[str, Any]] = {  # with scalings that float32 holds exactly
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {
        "r": 16,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
    },
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"down_proj": 7, r"layers\.[01]\.self_attn\.v_proj": 3},
    },
    "rs-patterns": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {r".*\.0\.self_attn\.q_proj": 1},
        "alpha_pattern": {"q_proj": 11},
        "target_modules": r".*\.0\..*(q_proj|gate_proj)",
    },
}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("mixed")
    return {
        name: str(save_lora(root / name, seed, base=fresh_base(), **config))
        for seed, (name, config) in enumerate(MIXED.items(), 1)
    }


def parts_by_peft(experts: dict[str, str]) -> Parts:
    """The updates as PEFT's own LoRA layers make them; zeros where an expert has none."""
    weights = weights_of(plain_base())
    updates: list[dict[str, Tensor]] = []
    for path in experts.values():
        model = PeftModel.from_pretrained(fresh_base(), path).double().get_base_model()
        layers = {
            name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
        }
        updates.append(
            {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
        )
    parts = {}
    adapted = set().union(*updates)
    for name, _ in plain_base().named_modules():
        if name in adapted:
            absent = torch.zeros_like(weights[f"{name}.weight"])
            parts[name] = [Part(of_expert.get(name, absent)) for of_expert in updates]
    return parts


def test_mixed_experts_differ(mixed: dict[str, str]) -> None:
    """Guards the tests below: in ranks, and in modules that only some of them have."""
    ranks = {}
    for name, path in mixed.items():
        ranks[name] = {module: len(a) for module, (a, _) in read_factors(path).items()}
    assert ranks["patterns"]["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["rs-patterns"]["model.layers.0.self_attn.q_proj"] == 1
    assert len({tuple(sorted(of)) for of in ranks.values()}) == 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", [*ALL])
def test_full_mixing_is_that_of_pefts_updates(
    mixed: dict[str, str], name: str, granularity: str
) -> None:
    clusters = dict(zip(mixed, "xyxz", strict=True))
    config = {**ALL[name], **({"clusters": clusters} if "clusters" in ALL[name] else {})}
    routed = route(
        mixed, fresh_base(), 3, mixing="full", granularity=granularity, **config
    ).double()
    top_k = 3 if name == "arrow" else None
    naive = Naive(config, parts_by_peft(mixed), list(mixed), top_k=top_k, granularity=granularity)
    assert_as_by_hand(routed, naive, "left")


def test_prototypes_of_absent_experts_score_nothing(mixed: dict[str, str]) -> None:
    state = get_peft_model_state_dict(route(mixed, fresh_base(), router="arrow"))
    for module, of_experts in parts_by_peft(mixed).items():
        rows = state[f"base_model.model.{module}.routed_lora_router.weight"]
        for row, part in zip(rows, of_experts, strict=True):
            if part.update.any():
                assert angle(row, first_right_singular_vector(part.update)) < 1e-6
            else:
                assert not row.any()


@pytest.mark.parametrize("name", ["uniform", "linear", "arrow", "hierarchical"])
def test_low_rank_needs_one_rank(mixed: dict[str, str], name: str) -> None:
    clusters = {"clusters": dict.fromkeys(mixed, 0)} if name == "hierarchical" else {}
    with pytest.raises(ValueError, match="low_rank"):
        route(mixed, fresh_base(), mixing="low_rank", **{**ALL[name], **clusters})


@pytest.mark.parametrize(
    ("first", "second", "mixing"),
    [
        ({}, {}, "low_rank"),
        ({}, {"lora_alpha": 3, "use_rslora": True}, "low_rank"),
        ({}, {"r": 2}, "full"),
        ({}, {"rank_pattern": {"layers.1.self_attn.v_proj": 2}}, "full"),
        ({}, {"target_modules": TARGETS[:2]}, "full"),
    ],
)
def test_the_default_is_full_where_ranks_or_targets_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: dict, second: dict, mixing: str
) -> None:
    experts = {
        name: str(save_lora(tmp_path / name, seed, base=fresh_base(), a_seed=0, **config))
        for seed, (name, config) in enumerate((("a", first), ("b", second)))
    }
    with caplog.at_level(logging.INFO, logger="peft_routing"):
        routed = route(experts, fresh_base(), 3, router="layer")
    said = [record.message for record in caplog.records if record.name.startswith("peft_routing")]
    assert routed.peft_config["default"].mixing == mixing
    assert len(said) == (mixing == "full") and all("mixing is full" in line for line in said)
    explicit = route(experts, fresh_base(), 3, router="layer", mixing=mixing)
    assert torch.equal(logits_of(routed, **batch("none")), logits_of(explicit, **batch("none")))


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("shared", [0.0, 0.3, 0.9])
def test_low_rank_is_the_default_where_it_keeps_the_mean_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, shared: float
) -> None:
    """The update of `uniform` against the mean of the experts' updates, from their files. Each A is
    a part of one A, and a part of its own.
    """
    experts = {}
    for seed in range(count):
        path = save_lora(tmp_path / str(seed), seed, base=fresh_base())
        tensors = load_file(path / "adapter_model.safetensors")
        of_one = torch.Generator().manual_seed(99)
        for name, tensor in tensors.items():
            if "lora_A" in name:
                one = torch.randn(tensor.shape, generator=of_one) * 0.2
                tensors[name] = shared**0.5 * one + (1 - shared) ** 0.5 * tensor
        save_file(tensors, path / "adapter_model.safetensors")
        experts[str(seed)] = str(path)
    routed = route(experts, fresh_base(), count, router="uniform")
    mixing = routed.peft_config["default"].mixing
    assert mixing == ("low_rank" if shared == 0.9 else "full")
    said = [record.message for record in caplog.records if record.name.startswith("peft_routing")]
    assert len(said) == (mixing == "full") and all("initial A" in line for line in said)
    for module, parts in parts_by_peft(experts).items():
        mean = sum(part.update for part in parts) / count
        update = routed.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        kept = torch.nn.functional.cosine_similarity(update.double().flatten(), mean.flatten(), 0)
        assert kept > (0.89 if mixing == "low_rank" else 0.999999)


@pytest.mark.parametrize(("factor", "mixing"), [(1.5, "low_rank"), (10.0, "full")])
def test_low_rank_is_no_default_where_one_a_is_much_longer(
    tmp_path: Path, factor: float, mixing: str
) -> None:
    """The same A but for its length, and a shorter B for that: the update stays."""
    paths = [save_lora(tmp_path / str(seed), seed, fresh_base(), a_seed=0) for seed in (0, 1)]
    file = paths[0] / "adapter_model.safetensors"
    rescaled = {}
    for name, tensor in load_file(file).items():
        rescaled[name] = tensor * factor if "lora_A" in name else tensor / factor
    save_file(rescaled, file)
    experts = {path.name: str(path) for path in paths}
    routed = route(experts, fresh_base(), router="uniform")
    assert routed.peft_config["default"].mixing == mixing
    for module, parts in parts_by_peft(experts).items():
        mean = sum(part.update for part in parts) / 2
        update = routed.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        assert (update.norm() / mean.norm() - 1).abs() < 0.15


def test_arrow_mixes_in_full_by_default(experts: dict[str, str]) -> None:
    routed = route(experts, fresh_base(), router="arrow")
    assert torch.equal(
        logits_of(routed, **batch("none")),
        logits_of(route(experts, fresh_base(), router="arrow", mixing="full"), **batch("none")),
    )


def v_proj(model: Any) -> Any:
    return model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")


def hidden(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["linear", "global", "hierarchical"])
def test_ties_still_choose_k(experts: dict[str, str], name: str) -> None:
    """All scores are 0: of four experts, or three clusters, two have one half each."""
    routed = route(experts, fresh_base(), top_k=2, **ALL[name])
    coefficients = v_proj(routed).router_of("default")(hidden(5, 32))
    if name == "hierarchical":
        of_clusters = [
            coefficients[..., [i for i, n in enumerate(experts) if CLUSTERS[n] == c]] for c in "xyz"
        ]
        coefficients = torch.stack([part.sum(dim=-1) for part in of_clusters], dim=-1)
    n = coefficients.shape[-1]
    expected = torch.tensor([0.0] * (n - 2) + [0.5, 0.5]).expand(*coefficients.shape)
    torch.testing.assert_close(coefficients.sort(dim=-1).values.float(), expected)


def test_an_mlp_keeps_by_magnitude_and_breaks_ties(experts: dict[str, str]) -> None:
    routed = route(experts, fresh_base(), router="mlp", mlp_layers=0, top_k=2)
    router = v_proj(routed).router_of("default")
    router.bias_out.data = torch.tensor([0.1, -3.0, 2.0, 0.5])
    torch.testing.assert_close(router(hidden(1, 32)), torch.tensor([0.0, -3.0, 2.0, 0.0]))
    router.bias_out.data = torch.tensor([0.5, -0.5, 0.5, -0.5])
    kept = router(hidden(1, 32))
    assert (kept != 0).sum() == 2 and (kept.abs().sum() == 1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", [*ALL])
def test_hidden_states_of_zero_get_no_update(
    experts: dict[str, str], name: str, granularity: str
) -> None:
    routed = route(experts, fresh_base(), 3, granularity=granularity, **ALL[name])
    zeros = torch.zeros(2, 5, 32, dtype=torch.float64)
    assert torch.equal(
        logits_of(routed, inputs_embeds=zeros), logits_of(plain_base(), inputs_embeds=zeros)
    )
    with_states = logits_of(routed, inputs_embeds=hidden(2, 5, 32))
    assert not torch.allclose(
        with_states, logits_of(plain_base(), inputs_embeds=hidden(2, 5, 32)), atol=1e-2
    )


@pytest.fixture(
    scope="module", params=[(name, mixing) for name in ALL for mixing in MIXINGS], ids="-".join
)
def layer(request: pytest.FixtureRequest, experts: dict[str, str]) -> Any:
    """Of every router and mixing, with the top 2 where it takes one."""
    name, mixing = request.param
    chosen = {} if name in ("uniform", "fixed") else {"top_k": 2}
    return v_proj(route(experts, fresh_base(), 3, mixing=mixing, **chosen, **ALL[name]))


def test_nan_stays_in_its_token(layer: Any) -> None:
    clean = hidden(2, 5, 32)
    broken = clean.clone()
    broken[1, 2, 7] = torch.nan
    expected, found = layer(clean), layer(broken)
    assert found[1, 2].isnan().all()
    found[1, 2] = expected[1, 2]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_no_rows_give_no_rows(layer: Any) -> None:
    for shape in ((0, 5), (2, 0), (0,)):
        assert layer(hidden(*shape, 32)).shape == (*shape, 16)


@pytest.mark.parametrize("late", [5.0, torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["linear", "arrow", "mlp-1"])
def test_a_sequence_does_not_choose_by_what_follows_its_prefix(
    experts: dict[str, str], name: str, late: float
) -> None:
    """The last hidden state that the last module sees, of a sequence twice as long as the
    prefix."""
    routed = route(experts, fresh_base(), 3, granularity="sequence", **ALL[name])
    embeddings = hidden(2, 2 * PREFIX, 32)
    expected = logits_of(routed, inputs_embeds=embeddings)

    def changed(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[0, -1] = late
        return (x,)

    routed.get_submodule("base_model.model.model.layers.1.mlp.down_proj").register_forward_pre_hook(
        changed
    )
    found = logits_of(routed, inputs_embeds=embeddings)
    assert not torch.allclose(found[0, -1], expected[0, -1], atol=1e-2)
    found[0, -1] = expected[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(
    "name", ["linear", "linear-abs", "arrow", "hierarchical", "hierarchical-abs"]
)
def test_very_large_scores_choose_one(
    experts: dict[str, str], name: str, mixing: str, dtype: torch.dtype
) -> None:
    everything = {} if name.startswith("hierarchical") else {"top_k": 4}
    layers = [
        v_proj(route(experts, fresh_base(), 3, mixing=mixing, **config).to(dtype))
        for config in ({**ALL[name], **everything}, {**ALL[name], "top_k": 1})
    ]
    x = hidden(2, 5, 32).to(dtype)
    of_all, of_one = (layer(1e30 * x) for layer in layers)
    assert of_all.isfinite().all()
    torch.testing.assert_close(of_all, of_one, atol=0, rtol=1e-4)
    assert not torch.allclose(layers[0](x), layers[1](x), atol=1e-3)


@pytest.fixture(scope="session")
def low_experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In bfloat16."""
    root = tmp_path_factory.mktemp("low")
    experts = {}
    for seed, name in enumerate(ALPHAS):
        path = save_lora(root / name, seed, base=make_base(**SMALL))
        tensors = load_file(path / "adapter_model.safetensors")
        low = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        save_file(low, path / "adapter_model.safetensors", metadata={"format": "pt"})
        experts[name] = str(path)
    return experts


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", [*ALL])
def test_bfloat16_is_near_float32(low_experts: dict[str, str], name: str, mixing: str) -> None:
    low, high = (
        route(
            low_experts,
            make_base(dtype=torch.bfloat16, **SMALL).to(dtype),
            3,
            mixing=mixing,
            expert_dtype=str(dtype).removeprefix("torch."),
            **ALL[name],
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    for key, value in get_peft_model_state_dict(low).items():
        assert value.dtype == (torch.float32 if "_router." in key else torch.bfloat16)
    x = hidden(2, 5, 32)
    found, expected = v_proj(low)(x.bfloat16()), v_proj(high)(x.bfloat16().float())
    assert found.dtype == torch.bfloat16 and expected.dtype == torch.float32
    plain = v_proj(high).get_base_layer()(x.bfloat16().float())
    assert (found.float() - expected).norm() < 0.02 * (expected - plain).norm()
    assert logits_of(low, **batch("left"))[batch("left")["attention_mask"].bool()].isfinite().all()


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", ["uniform", "arrow", "mlp-2"])
def test_wider_experts_leave_the_dtype_of_the_base(
    experts: dict[str, str], name: str, mixing: str
) -> None:
    low = route(experts, make_base(dtype=torch.bfloat16, **SMALL), 3, mixing=mixing, **ALL[name])
    high = route(
        experts, make_base(dtype=torch.bfloat16, **SMALL).double(), 3, mixing=mixing, **ALL[name]
    )
    x = hidden(2, 5, 32).bfloat16()
    found, expected = v_proj(low)(x), v_proj(high)(x.double())
    assert found.dtype == logits_of(low, **batch("none")).dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.02 * expected.norm()
