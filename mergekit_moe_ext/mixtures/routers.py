"""What the routers of a mixture of experts choose, as they choose it.

transformers names the router classes of every architecture itself
(`_can_record_outputs["router_logits"]`). We hook those modules and take what they return; choosing
again from the logits would be wrong where a router adds a bias to them or drops tokens beyond a
capacity.

A sequence MoE has no such modules: it says itself what each text chose.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.modeling import SequenceMoEConfig

if TYPE_CHECKING:  # that file imports `datasets`, which a merge has no use for
    from _mergekit_moe_ext_common.data import RealTokens

PER_SEQUENCE = "sequence"  # instead of a router's name, where whole texts are routed


@dataclass(frozen=True)
class Choice:
    """What one router chose in one forward pass. A row is a token; the tokens of a batch stand one
    after the other.
    """

    logits: torch.Tensor  # (tokens, experts)
    weights: torch.Tensor  # (tokens, k), of the chosen experts
    experts: (
        torch.Tensor
    )  # (tokens, k), indices; -1 where a capacity was full and the token went nowhere


def routes_sequences(model: Any) -> bool:
    """Is it a sequence MoE, of this package's class or of a copy beside its weights?"""
    return model.config.model_type == SequenceMoEConfig.model_type


def coefficients_of_sequences(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(batch, experts): what each text chooses in a plain forward pass, by its first
    `routing_tokens` tokens.

    `batch` is padded on the right. Nothing behind the tokens that choose is run.
    """
    length = model.config.routing_tokens if model.config.routing_prefix == "prefix" else None
    first = {name: tensor[:, :length] for name, tensor in batch.items()}
    return model(**first, use_cache=False, logits_to_keep=1).coefficients


def router_names(model: nn.Module) -> list[str]:
    """In order. `UserError` if it is no mixture of experts."""
    return [PER_SEQUENCE] if routes_sequences(model) else list(routers_of(model))


def stack_of(name: str) -> str:
    """Of a module or tensor: `encoder`, `decoder`, or nothing where there is one stack only."""
    return next((part for part in name.split(".") if part in ("encoder", "decoder")), "")


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every router by its name in the model, in order. `UserError` if there is none."""
    return {name: router for name, (router, _index) in _routers(model).items()}


def _routers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Routers, and where in their output the logits are."""
    positions: dict[type, int] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorders = (getattr(module, "_can_record_outputs", None) or {}).get(
                "router_logits", []
            )
            for recorder in recorders if isinstance(recorders, list) else [recorders]:
                positions[recorder.target_class] = recorder.index
    routers = {
        name: (module, positions[type(module)])
        for name, module in model.named_modules()
        if type(module) in positions
    }
    if not routers:
        if hasattr(getattr(model, "config", None), "ensembling"):
            raise UserError(
                f"{type(model).__name__} weighs task vectors and has no router that chooses "
                "experts: "
                "`mergekit-moe-ext adapt` trains it, and examples/wemoe_routing.py looks into it"
            )
        raise UserError(f"{type(model).__name__} has no router that transformers knows of")
    return routers


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Choice]]:
    """Inside, a dictionary that holds every router's choice in the last forward pass, by the
    router's name.
    """
    choices: dict[str, Choice] = {}

    def record(name: str, logits_at: int) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            choices[name] = _choice(module, output, logits_at)

        return hook

    hooks = [
        router.register_forward_hook(record(name, logits_at))
        for name, (router, logits_at) in _routers(model).items()
    ]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


def _choice(router: nn.Module, output: Any, logits_at: int) -> Choice:
    """Two forms are known: (logits, weights, experts), and Switch's (dispatch mask, weights,
    logits).
    """
    if isinstance(output, tuple) and len(output) >= 3:
        if logits_at == 0 and not output[2].is_floating_point():
            return Choice(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in output[:3]))
        if logits_at == 2 and not output[0].is_floating_point():
            dispatch, weights, logits = (
                tensor.reshape(-1, tensor.shape[-1]) for tensor in output[:3]
            )
            sent, expert = dispatch.max(dim=-1, keepdim=True)
            if weights.shape == expert.shape:  # NLLB's second choice is not in what it returns
                return Choice(logits, weights, torch.where(sent > 0, expert, -1))
    raise UserError(
        f"{type(router).__name__} does not return what it chose in a form that is known here, "
        "so its use of experts cannot be counted"
    )


def tokens_routed_by(router: str, real: "RealTokens") -> torch.Tensor:
    """(tokens,): which of the tokens that reach a router are not padding."""
    tokens = real.targets if stack_of(router) == "decoder" else real.inputs
    return tokens.flatten()


def load_balancing_loss(choices: Mapping[str, Choice], real: "RealTokens") -> torch.Tensor:
    """Switch Transformers' equations 4 to 6, per layer and then averaged over the layers; a scalar.

    N * sum_i f_i P_i, with f_i the number of times that expert i was chosen per token and P_i the
    mean probability that the gate gives it. k if balanced. Padding is left out of both.
    transformers' own sums f and P over all layers first, which lets one layer make up for another.
    """
    losses = []
    for name, choice in choices.items():
        mask = tokens_routed_by(name, real).to(choice.logits.device)
        probabilities = choice.logits[mask].float().softmax(dim=-1)
        tokens, num_experts = probabilities.shape
        chosen = choice.experts[mask]
        counts = torch.bincount(chosen[chosen >= 0], minlength=num_experts)
        losses.append(num_experts * (counts / tokens * probabilities.mean(dim=0)).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
