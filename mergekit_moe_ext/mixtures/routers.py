"""The choices of a mixture's routers, recorded as they are made.

transformers itself names the router classes of every architecture
(`_can_record_outputs["router_logits"]`). We hook those modules and take what they return; choosing
again from the logits would be wrong where a router adds a bias to them. A router with an expert
capacity returns only the choices that fit; those that it dropped are found again.

A sequence MoE has no such modules: it returns the choice of each text itself.
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

PER_SEQUENCE = "sequence"  # in place of a router's name, where whole texts are routed


@dataclass(frozen=True)
class Choice:
    """The choice of one router in one forward pass. A row is a token; the tokens of a batch stand
    one after the other.

    logits: (tokens, experts).
    weights: (tokens, k), those of the chosen experts.
    experts: (tokens, k), their indices; -1 in the places of a token that chose fewer than k.
    dropped: (tokens, k), True where the chosen expert was full and the token went nowhere; None for
        a router without an expert capacity.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    dropped: torch.Tensor | None = None


def routes_sequences(config: Any) -> bool:
    """Whether it is the configuration of a sequence MoE, of this package's class or of a copy
    beside its weights.
    """
    return config.model_type == SequenceMoEConfig.model_type


def coefficients_of_sequences(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The coefficients (batch, experts) that each text chooses in a plain forward pass, by its
    first `routing_tokens` tokens.

    `batch` is padded on the right. Only the tokens that choose are run through the model.
    """
    length = model.config.routing_tokens if model.config.routing_prefix == "prefix" else None
    prefix = {name: tensor[:, :length] for name, tensor in batch.items()}
    return model(**prefix, use_cache=False, logits_to_keep=1).coefficients


def router_names(model: nn.Module) -> list[str]:
    """The names of a model's routers, in order. `UserError` if it is not a mixture of experts."""
    return [PER_SEQUENCE] if routes_sequences(model.config) else list(routers_of(model))


def stack_of(name: str) -> str:
    """The stack that a module or tensor belongs to: `encoder`, `decoder`, or an empty text where
    there is one stack only.
    """
    for part in name.split("."):
        if part in ("encoder", "decoder"):
            return part
    return ""


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every router by its name in the model, in order. `UserError` if there is none."""
    return {name: router for name, (router, _index) in _routers(model).items()}


def _routers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The routers, and the position of the logits in their outputs."""
    positions: dict[type, int] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recordable = getattr(module, "_can_record_outputs", None) or {}
            recorders = recordable.get("router_logits", [])
            if not isinstance(recorders, list):
                recorders = [recorders]
            for recorder in recorders:
                positions[recorder.target_class] = recorder.index
    routers = {}
    for name, module in model.named_modules():
        if type(module) in positions:
            routers[name] = (module, positions[type(module)])
    if not routers:
        if hasattr(getattr(model, "config", None), "ensembling"):
            raise UserError(
                f"{type(model).__name__} weighs task vectors and has no router that chooses "
                "experts: `mergekit-moe-ext adapt` trains it, and examples/wemoe_routing.py looks "
                "into it"
            )
        raise UserError(f"{type(model).__name__} has no router that transformers knows of")
    return routers


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Choice]]:
    """A context with a dictionary of every router's choice in the last forward pass, by the
    router's name.
    """
    choices: dict[str, Choice] = {}

    def record(name: str, logits_at: int) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            choices[name] = _choice(module, output, logits_at)

        return hook

    hooks = []
    for name, (router, logits_at) in _routers(model).items():
        hooks.append(router.register_forward_hook(record(name, logits_at)))
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


def _choice(router: Any, output: Any, logits_at: int) -> Choice:
    """The choice in a router's output, of which three forms are known: (logits, weights, experts),
    Switch's and Llama 4's. `UserError` for any other.
    """
    parts = output if isinstance(output, tuple) else ()
    choice = None
    if len(parts) == 2 and logits_at == 1:
        choice = _choice_of_llama4(*parts)
    elif len(parts) >= 3 and logits_at == 0 and not parts[2].is_floating_point():
        choice = Choice(
            logits=_by_token(parts[0]), weights=_by_token(parts[1]), experts=_by_token(parts[2])
        )
    elif len(parts) >= 3 and logits_at == 2 and not parts[0].is_floating_point():
        choice = _choice_of_switch(router, *parts[:3])
    if choice is None:
        raise UserError(
            f"{type(router).__name__} does not return what it chose in a form that is known here, "
            "so its use of experts cannot be counted"
        )
    return choice


def _choice_of_llama4(weights_of_all: torch.Tensor, logits: torch.Tensor) -> Choice:
    """The choice by the weights of all experts (…, experts), 0 for those that were not chosen."""
    weights_of_all = _by_token(weights_of_all)
    most_chosen = int((weights_of_all > 0).sum(dim=-1).max())
    weights, experts = weights_of_all.topk(most_chosen, dim=-1)
    experts = experts.masked_fill(weights == 0, -1)
    return Choice(logits=_by_token(logits), weights=weights, experts=experts)


def _choice_of_switch(
    router: Any, dispatch_mask: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
) -> Choice | None:
    """The choice of a router with an expert capacity, which returns a mask (…, experts) of what it
    sends where; None for NLLB, which chooses two experts and does not return the second.
    """
    # The mask is zero for a token that came after its expert's capacity was full.
    is_sent, sent_to = _by_token(dispatch_mask).max(dim=-1, keepdim=True)
    weights = _by_token(weights)
    logits = _by_token(logits)
    if weights.shape != sent_to.shape:
        return None
    # The router takes the largest probability in these dtypes, where more of them tie than of the
    # logits.
    probabilities = logits.softmax(dim=-1, dtype=router.dtype).to(weights.dtype)
    largest = probabilities.argmax(dim=-1, keepdim=True)
    return Choice(
        logits=logits,
        weights=weights,
        experts=torch.where(is_sent > 0, sent_to, largest),
        dropped=is_sent == 0,
    )


def _by_token(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor (…, n), one per token: (tokens, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def tokens_routed_by(router: str, real: "RealTokens") -> torch.Tensor:
    """Booleans (tokens,): whether each token that reaches a router is not padding."""
    tokens = real.targets if stack_of(router) == "decoder" else real.inputs
    return tokens.flatten()


def load_balancing_loss(choices: Mapping[str, Choice], real: "RealTokens") -> torch.Tensor:
    """The load-balancing loss of Switch Transformers (equations 4 to 6), a scalar: the mean over
    the layers of N * sum_i f_i P_i.

    f_i is the number of times that expert i was chosen per token, whether or not it had room, and
    P_i the mean probability that the gate gives it; padding is left out of both. The loss is k if
    the load is balanced. transformers' own sums f and P over all layers first, which lets one layer
    make up for another.
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
