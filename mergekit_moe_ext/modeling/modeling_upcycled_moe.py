"""Models whose FFNs are mixtures of experts, for bases that have no mixture in transformers.

`UpcycledMoe<X>` is made of transformers' `<X>` when it is asked for: the same class, the same names
and the same code, in which the linear modules of every FFN hold those of all experts and a router
chooses `num_experts_per_tok` of them for each token. What an FFN does between its linear modules
(activation, dropout, norm) is done by the base's own code, on tokens that are sorted by expert.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, initialization
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import OutputRecorder

from .any_base import (
    as_config_of_base,
    check_architecture,
    keep_own_config,
    made_on_demand,
    subclass_of,
    with_own_arguments,
)
from .configuration_upcycled_moe import RoutedFFN, config_class, routed_ffns

_PREFIX = "UpcycledMoe"
_ALIGNMENT = 16  # bytes: rows that torch's grouped product takes are a multiple of it
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The rows (rows, in), which are sorted by expert, each times the matrix of its expert:
    (rows, out).

    `matrices` are (experts, in, out); `ends` (experts,), int32, are the numbers of rows up to the
    end of each expert's. transformers' own functions do it, which know on what devices torch can.
    """
    sizes = [size * matrices.element_size() for size in matrices.shape[1:]]
    is_aligned = all(size % _ALIGNMENT == 0 for size in sizes)
    if is_aligned and matrices.dtype in _GROUPED_DTYPES and not matrices.is_meta:
        return moe._grouped_mm(rows.contiguous(), matrices, offs=ends)
    rows = rows.to(matrices.dtype)
    return torch.ops.transformers.grouped_mm_fallback(rows, matrices, offs=ends)


class TokenRouter(nn.Module):
    """A linear gate. The weights of the experts that it chooses sum up to one for every token."""

    def __init__(self, width: int, experts: int, chosen: int, like: Tensor) -> None:
        super().__init__()
        self.chosen = chosen
        self.weight = nn.Parameter(
            torch.empty(experts, width, dtype=like.dtype, device=like.device)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (tokens, experts), and weights and indices (tokens, chosen) of the experts chosen
        for x (tokens, width), whatever the model's dtype in float32.
        """
        with maybe_autocast(x.device.type, enabled=False):
            logits = functional.linear(x.float(), self.weight.float())
        highest, experts = logits.topk(self.chosen, dim=-1)
        return logits, highest.softmax(dim=-1), experts


@dataclass(frozen=True)
class Choice:
    """The choice of a router for the tokens that an FFN is given.

    x: the FFN's input (..., width).
    order: of all pairs of a token and an expert, sorted by expert, the number of each: (pairs,).
    experts: the expert of each pair, in that order.
    ends: see `grouped_product`.
    weights: (tokens, chosen).
    """

    x: Tensor
    order: Tensor
    experts: Tensor
    ends: Tensor
    weights: Tensor


def _thread() -> int:
    """The number of the thread. A compiled graph hands tensors on itself, and cannot ask for it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Dispatch:
    """What the linear modules of one FFN share while it runs: its router, and its choice.

    owner, name: the module that the router is in, and the router's name there. It is looked up at
        every call, since others may put a module of theirs in its place (PEFT's `modules_to_save`).
    choices: by thread, since a server may run the model in several.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name
        self.choices: dict[int, Choice] = {}

    def begin(self, x: Tensor) -> Choice:
        """The choice for the tokens x (..., width), which all readers of one input share."""
        thread = _thread()
        running = self.choices.get(thread)
        if running is not None and running.x is x:
            return running
        router = getattr(self.owner, self.name)
        logits, weights, experts = router(x.reshape(-1, x.shape[-1]))
        sorted_experts, order = experts.flatten().sort(stable=True)
        numbers = torch.arange(logits.shape[-1], device=experts.device)
        ends = torch.searchsorted(sorted_experts, numbers, right=True)
        choice = Choice(x, order, sorted_experts, ends.to(torch.int32), weights)
        self.choices[thread] = choice
        return choice

    def running(self, x: Tensor) -> Choice:
        """The choice for the pairs x (1, ..., pairs, width), which a reader has sent."""
        choice = self.choices.get(_thread())
        if choice is None or x.numel() != len(choice.order) * x.shape[-1]:
            raise RuntimeError("an FFN's modules were not called one after the other")
        return choice

    def end(self, x: Tensor) -> Choice:
        """The choice for the pairs x of an FFN that has run, which is forgotten here."""
        choice = self.running(x)
        del self.choices[_thread()]
        return choice


class ExpertLinear(nn.Module):
    """The linear modules of all experts at one place of an FFN, made like the one of the base.

    Between readers and writer tokens are (1, ..., pairs, width), with as many axes as the FFN's
    input has: pairs of a token and one of its experts, sorted by expert.
    """

    def __init__(self, dense: Any, experts: int, dispatch: Dispatch) -> None:
        super().__init__()
        self.is_transposed = isinstance(dense, Conv1D)
        self.dispatch = dispatch
        self.weight = _of_all(dense.weight, experts)
        self.register_parameter("bias", None)
        if dense.bias is not None:
            self.bias = _of_all(dense.bias, experts)

    def initialise(self, std: float) -> None:
        """Gives what was not loaded the random values that transformers would."""
        initialization.normal_(self.weight, std=std)
        if self.bias is not None:
            initialization.zeros_(self.bias)

    def product(self, rows: Tensor, choice: Choice) -> Tensor:
        """The rows (pairs, in), each mapped by its expert: (pairs, out)."""
        matrices = self.weight if self.is_transposed else self.weight.transpose(1, 2)
        output = grouped_product(rows, matrices, choice.ends)
        return output if self.bias is None else output + self.bias[choice.experts]


class Reader(ExpertLinear):
    def forward(self, x: Tensor) -> Tensor:
        choice = self.dispatch.begin(x)
        tokens = x.reshape(-1, x.shape[-1])
        rows = tokens[choice.order // choice.weights.shape[-1]]
        output = self.product(rows, choice)
        return output.view(*[1] * (x.ndim - 2), *output.shape)


class Inner(ExpertLinear):
    def forward(self, x: Tensor) -> Tensor:
        output = self.product(x.reshape(-1, x.shape[-1]), self.dispatch.running(x))
        return output.view(*x.shape[:-1], output.shape[-1])


class Writer(ExpertLinear):
    def forward(self, x: Tensor) -> Tensor:
        choice = self.dispatch.end(x)
        output = self.product(x.reshape(-1, x.shape[-1]), choice)
        places = torch.empty_like(choice.order)
        places[choice.order] = torch.arange(len(places), device=places.device)
        by_token = output[places].view(*choice.weights.shape, -1)
        mixed = (by_token * choice.weights[..., None]).sum(dim=1)
        return mixed.to(output.dtype).view(*choice.x.shape[:-1], mixed.shape[-1])


def _of_all(parameter: Tensor, experts: int) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(experts, *parameter.shape))


def put_experts(
    model: nn.Module, router_name: str, ffn: RoutedFFN, *, experts: int, chosen: int
) -> None:
    """Put all experts into an FFN's linear modules, and a router of this name into the model."""
    first: Any = model.get_submodule(ffn.readers[0])
    width = first.weight.shape[0 if isinstance(first, Conv1D) else 1]
    _put(model, router_name, TokenRouter(width, experts, chosen, first.weight))
    owner, _, name = router_name.rpartition(".")
    dispatch = Dispatch(model.get_submodule(owner), name)
    for reader in ffn.readers:
        _put(model, reader, Reader(model.get_submodule(reader), experts, dispatch))
    for inner in ffn.inner:
        _put(model, inner, Inner(model.get_submodule(inner), experts, dispatch))
    _put(model, ffn.writer, Writer(model.get_submodule(ffn.writer), experts, dispatch))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class Upcycled:
    """What `UpcycledMoe<X>` has besides what `<X>` has."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_architecture(type(self), config)
        with as_config_of_base(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        keep_own_config(self, config)
        for router, ffn in routed_ffns(config).items():
            put_experts(
                self,  # type: ignore[arg-type]
                router,
                ffn,
                experts=config.num_local_experts,
                chosen=config.num_experts_per_tok,
            )
        self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """transformers' initialisation, and then that of our modules which no file held."""
        super().initialize_weights()  # type: ignore[misc]
        config = self.config.get_text_config()  # type: ignore[attr-defined]
        std = getattr(config, "initializer_range", None) or 0.02
        # A trunk initialises the modules inside it by rules of its own, which do not know ours.
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, ExpertLinear):
                module.initialise(std)
            elif isinstance(module, TokenRouter):
                initialization.normal_(module.weight, std=std)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel leaves the routers on one device: use torchrun or accelerate launch",
        )

    def _forward(
        self,
        forward: Any,
        signature: inspect.Signature,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the base's `forward` gives, with the routers' logits and the load-balancing loss
        where they are asked for.
        """
        config = self.config  # type: ignore[attr-defined]
        is_asked = kwargs.pop("output_router_logits", None)
        if not (config.output_router_logits if is_asked is None else is_asked):
            return forward(self, *args, **kwargs)
        arguments = dict(zip(list(signature.parameters)[1:], args, strict=False)) | kwargs
        is_dict = arguments.pop("return_dict", None)
        with self._recorded() as logits:
            output = forward(self, **arguments, return_dict=True)
        self._check_gradient(logits)
        values = dict(output)
        values["router_logits"] = tuple(logits.values())
        values["aux_loss"] = self._balance(logits, arguments)
        if values.get("loss") is not None:
            aux_loss = values["aux_loss"].to(values["loss"].device)
            values["loss"] = values["loss"] + config.router_aux_loss_coef * aux_loss
        mixed = _with_router_logits(type(output))(**values)  # type: ignore[arg-type]
        return mixed.to_tuple() if is_dict is False else mixed

    @contextmanager
    def _recorded(self) -> Iterator[dict[str, Tensor]]:
        """A context with the logits of every router (tokens, experts), by its name."""
        logits: dict[str, Tensor] = {}

        def recorder(name: str) -> Any:
            def record(_module: Any, _inputs: Any, output: Any) -> None:
                logits[name] = output[0]

            return record

        hooks = []
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, TokenRouter):
                hooks.append(module.register_forward_hook(recorder(name)))
        try:
            yield logits
        finally:
            for hook in hooks:
                hook.remove()

    def _check_gradient(self, logits: dict[str, Tensor]) -> None:
        """`ValueError` where the loss that balances routers would not reach them."""
        if not self.training or not torch.is_grad_enabled():  # type: ignore[attr-defined]
            return
        for name, of_router in logits.items():
            router: Any = self.get_submodule(name)  # type: ignore[attr-defined]
            if router.weight.requires_grad and not of_router.requires_grad:
                raise ValueError(
                    f"the load-balancing loss has no gradient for {name}: gradient checkpointing "
                    "with use_reentrant=True cuts it off; take False",
                )

    def _balance(self, logits: dict[str, Tensor], arguments: dict[str, Any]) -> Tensor:
        """The load-balancing loss of Switch Transformers, the mean over the stacks of layers."""
        config = self.config  # type: ignore[attr-defined]
        stacks: dict[str, list[Tensor]] = {}
        for name, of_router in logits.items():
            in_decoder = config.is_encoder_decoder and "decoder" in name.split(".")
            mask_name = "decoder_attention_mask" if in_decoder else "attention_mask"
            stacks.setdefault(mask_name, []).append(of_router)
        losses = []
        for mask_name, of_stack in stacks.items():
            tokens = {len(each) for each in of_stack}
            mask = arguments.get(mask_name)
            # A mask beside a cache covers the tokens in it as well; and some models have other
            # tokens than those that their mask is for.
            if mask is not None and (mask.ndim != 2 or tokens != {mask.numel()}):
                mask = None
            losses.append(
                load_balancing_loss_func(
                    tuple(of_stack), config.num_local_experts, config.num_experts_per_tok, mask
                )
            )
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


@cache
def _with_router_logits(output: type) -> type:
    """The output class of a base, with what the routers give besides."""
    fields = [
        ("router_logits", tuple | None, field(default=None)),
        ("aux_loss", Tensor | None, field(default=None)),
    ]
    return make_dataclass(
        _PREFIX + output.__name__, fields, bases=(output,), namespace={"__module__": __name__}
    )


@cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`UpcycledMoe<X>` for `<X>`."""
    signature = inspect.signature(base.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(base.forward, signature, *args, **kwargs)

    forward.__signature__ = with_own_arguments(signature, "output_router_logits")  # type: ignore[attr-defined]
    recordable = dict(getattr(base, "_can_record_outputs", None) or {})
    members = {
        "config_class": config_class(base.config_class),
        "forward": forward,
        "_can_record_outputs": {**recordable, "router_logits": OutputRecorder(TokenRouter)},
    }
    return subclass_of(base, _PREFIX, Upcycled, __name__, members)


__getattr__ = made_on_demand(__name__, _PREFIX, model_class)
