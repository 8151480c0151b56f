"""Models some of whose linear modules are the base's weights plus a routed sum of task vectors (WEMoE and E-WEMoE).

`WEMoE<X>` is made of transformers' `<X>` when it is asked for: the same class, the same names, with those linear
modules swapped and a router for each group of them. By linearity (W + sum of c_i T_i) x is either one product with
merged weights or a sum of products; which is cheaper depends on how many tokens share a set of coefficients.

A model that does not generate has one set of coefficients per sample, the mean over its tokens. One that does takes
the mean over a prefix (`frozen`: the prompt in `generate`, else the first `routing_tokens` tokens; labels among them
are left out of the loss) or, at every position, over what is there up to it (`running`).
"""

import inspect
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_wemoe import Ensembling, config_class

_PREFIX = "WEMoE"
_STATE = "_wemoe_state"
# Weights are merged where at least so many tokens share a set of coefficients; below, vectors are applied one by one.
_MERGING = 4
_MERGED_AT_ONCE = 2**27  # elements of merged weights that are held at the same time


class Coefficients:
    """What the router of a group gave in this forward pass, for the linear modules of the group."""

    value: Tensor | None = None  # (experts,), (samples, experts), or (samples, tokens, experts)
    merged: dict[int, Any] | None = None  # by module, merged weights that are kept while a single sequence is decoded


class EnsembledLinear(nn.Module):
    """A linear map whose weight is that of the base plus a weighed sum of task vectors."""

    vectors: Tensor
    values: Tensor
    columns: Tensor
    row_ends: Tensor
    bias_vectors: Tensor

    def __init__(self, base: Any, experts: int, kept: int | None, coefficients: Coefficients) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.is_transposed = isinstance(base, Conv1D)
        self.coefficients, self.kept = coefficients, kept
        shape, like = self.weight.shape, {"dtype": self.weight.dtype, "device": self.weight.device}
        if kept is None:
            self.register_buffer("vectors", torch.zeros(experts, *shape, **like))
        else:
            index = torch.uint16 if shape[1] <= 2**16 else torch.int32
            self.register_buffer("values", torch.zeros(experts, kept, **like))
            self.register_buffer("columns", torch.zeros(experts, kept, dtype=index, device=like["device"]))
            ends = torch.full((experts, shape[0]), kept, dtype=torch.int32, device=like["device"])
            self.register_buffer("row_ends", ends)
        if self.bias is not None:
            self.register_buffer("bias_vectors", torch.zeros(experts, *self.bias.shape, **like))

    def forward(self, x: Tensor) -> Tensor:
        c = self.coefficients.value
        assert c is not None, "an ensembled module must be called through its model"
        c = c.to(x.dtype)
        if (kept := self.coefficients.merged) is not None:
            if id(self) not in kept:
                kept[id(self)] = self.merged(c[0]), self._merged_bias(c[0])
            return self._linear(x, *kept[id(self)])
        if c.ndim == 1:
            return self._linear(x, self.merged(c), self._merged_bias(c))
        if c.ndim == 3 or x.ndim < 3 or x.shape[1] < _MERGING:
            return self._one_by_one(x, c)
        at_once = max(1, _MERGED_AT_ONCE // self.weight.numel())
        parts = zip(x.split(at_once), c.split(at_once), strict=True)
        return torch.cat([self._samples(*part) for part in parts])

    def merged(self, c: Tensor) -> Tensor:
        """(experts,) or (samples, experts) to weights (…, *weight.shape)."""
        flat = self.weight.flatten()
        if self.kept is None:
            return (flat + c @ self.vectors.flatten(1)).unflatten(-1, self.weight.shape)
        if c.ndim == 1:
            return flat.index_add(0, self._places().flatten(), (c[:, None] * self.values).flatten()).view_as(
                self.weight
            )
        merged = flat.repeat(len(c), 1)
        merged = merged.index_add(1, self._places().flatten(), (c[..., None] * self.values).flatten(1))
        return merged.unflatten(-1, self.weight.shape)

    def _places(self) -> Tensor:
        """Where in the flat weight each kept element lies: (experts, kept)."""
        rows, width = self.weight.shape
        ends = self.row_ends.long()
        counts = torch.diff(ends, prepend=ends.new_zeros(len(ends), 1), dim=1)
        row = torch.arange(rows, device=ends.device).repeat(len(ends))
        row = row.repeat_interleave(counts.flatten(), output_size=self.columns.numel()).view(self.columns.shape)
        return row * width + self.columns.long()

    def _merged_bias(self, c: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias + c @ self.bias_vectors

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight.T if self.is_transposed else weight, bias)

    def _samples(self, x: Tensor, c: Tensor) -> Tensor:
        """(samples, …, in) and (samples, experts), by one weight per sample."""
        weight = self.merged(c)
        weight = weight if self.is_transposed else weight.mT
        y = (x.flatten(1, -2) @ weight).unflatten(1, x.shape[1:-1])
        bias = self._merged_bias(c)
        return y if bias is None else y + bias.view(len(c), *[1] * (x.ndim - 2), -1)

    def _one_by_one(self, x: Tensor, c: Tensor) -> Tensor:
        """(…, in) and coefficients of as many or fewer leading dimensions, by one product per expert."""
        c = c.view(*c.shape[:-1], *[1] * (x.ndim - c.ndim), c.shape[-1])
        y = self._linear(x, self.weight, self.bias)
        for index in range(c.shape[-1]):
            y = y + c[..., index, None] * self._by_vector(x, index)
        return y if self.bias is None else y + c @ self.bias_vectors

    def _by_vector(self, x: Tensor, index: int) -> Tensor:
        """The product with one task vector; where it is sparse and x has few tokens, element by element."""
        if self.kept is None:
            return self._linear(x, self.vectors[index], None)
        places, values = self._places()[index], self.values[index]
        if x.shape[:-1].numel() > _MERGING:
            vector = torch.zeros_like(self.weight).flatten().index_add(0, places, values)
            return self._linear(x, vector.view_as(self.weight), None)
        rows, columns = places // self.weight.shape[1], places % self.weight.shape[1]
        out, into = (columns, rows) if self.is_transposed else (rows, columns)
        size = self.weight.shape[1 if self.is_transposed else 0]
        return x.new_zeros(*x.shape[:-1], size).index_add(-1, out, x[..., into] * values)


class Router(nn.Module):
    """Hidden states to coefficients, before they are averaged (WEMoE, equations 3 and 4)."""

    def __init__(self, width: int, ensembling: Ensembling) -> None:
        super().__init__()
        self.init_lambda, self.init_std = ensembling.init_lambda, ensembling.init_std
        layers, experts = ensembling.router_layers, len(ensembling.experts)
        if layers == 2:
            self.hidden = nn.Linear(width, width)
        if layers:
            self.weight = nn.Parameter(torch.zeros(experts, width))
        self.bias = nn.Parameter(torch.zeros(experts))

    @property
    def is_constant(self) -> bool:
        return not hasattr(self, "weight")

    def forward(self, h: Tensor) -> Tensor:
        """(…, width) to (…, experts)"""
        h = h.to(self.weight.dtype)
        if hasattr(self, "hidden"):
            h = functional.relu(self.hidden(h))
        return functional.linear(h, self.weight, self.bias)


class Call:
    """One forward pass of the whole model."""

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self.generates = model.can_generate()
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.mask = arguments.get("attention_mask")
        self.decoder_mask = arguments.get("decoder_attention_mask")
        self.given = arguments.get("coefficients")
        self.cache = arguments.get("past_key_values")
        self.fills_cache = self.cache is not None and self.cache.get_seq_length() == 0
        if self.fills_cache:
            setattr(self.cache, _STATE, {})

    def state(self) -> dict[str, Any] | None:
        """What is kept with the cache; None where there is none."""
        return None if self.cache is None else getattr(self.cache, _STATE, None)

    def real(self, h: Tensor, *, in_decoder: bool) -> Tensor:
        """Which tokens of h (samples, tokens, width) are no padding."""
        mask = self.decoder_mask if in_decoder and self.is_encoder_decoder else self.mask
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(h) or mask.shape[1] < h.shape[1]:
            return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        return mask[:, -h.shape[1] :].bool().to(h.device)


class Ensemble:
    """What `WEMoE<X>` has besides what `<X>` has."""

    training: bool

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.ensembling = Ensembling(**config.ensembling)
        self._call: Call | None = None
        if self.ensembling.heads:
            self._swap_head()
        self._coefficients = {name: Coefficients() for name in self.ensembling.groups}
        self.routers: Any = nn.ModuleDict()
        for index, (name, linears) in enumerate(self.ensembling.groups.items()):
            group = self.get_submodule(name)  # type: ignore[attr-defined]
            for linear in linears:
                self._swap(linear, name)
            width = _width_into(self.get_submodule(linears[0]))  # type: ignore[attr-defined]
            key = "0" if self.ensembling.shared_router else str(index)
            if key not in self.routers:
                self.routers[key] = Router(width, self.ensembling)
            group.register_forward_pre_hook(partial(_choose, self, name, key), with_kwargs=True)
        if (encoder := self._encoder()) is not None:
            encoder.register_forward_pre_hook(partial(_enter_encoder, self), with_kwargs=True)
        self.post_init()  # type: ignore[attr-defined]

    def _encoder(self) -> Any:
        """That of an encoder-decoder, which `generate` calls on its own."""
        return self.get_encoder() if getattr(self.config, "is_encoder_decoder", False) else None  # type: ignore[attr-defined]

    def _swap(self, name: str, group: str) -> None:
        parent, _, last = name.rpartition(".")
        base = self.get_submodule(name)  # type: ignore[attr-defined]
        kept = self.ensembling.kept.get(name)
        ensembled = EnsembledLinear(base, len(self.ensembling.experts), kept, self._coefficients[group])
        setattr(self.get_submodule(parent), last, ensembled)  # type: ignore[attr-defined]

    def _swap_head(self) -> None:
        parent, _, last = self.ensembling.head.rpartition(".")
        head = self.get_submodule(self.ensembling.head)  # type: ignore[attr-defined]
        setattr(self.get_submodule(parent), last, TaskHeads(head, self.ensembling.heads))  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            nn.init.constant_(module.bias, module.init_lambda)
            if not module.is_constant:
                nn.init.normal_(module.weight, std=module.init_std)
            if hasattr(module, "hidden"):
                nn.init.normal_(module.hidden.weight, std=module.init_std)
                nn.init.zeros_(module.hidden.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _forward(self, forward: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        arguments.pop("self")
        arguments |= arguments.pop("kwargs", {})
        self._call = Call(self, arguments)
        for name in ("coefficients", "task"):
            arguments.pop(name, None)
        labels = arguments.get("labels")
        if self.ensembling.heads:
            self._choose_head(kwargs.get("task"))
            arguments.pop("labels", None)
        elif isinstance(labels, Tensor):
            arguments |= self._without_prefix(arguments, self._call)
        try:
            output = forward(self, **arguments)
        finally:
            if not self.training:  # gradient checkpointing runs layers again afterwards
                self._call = None
        if self.ensembling.heads and labels is not None:
            output.loss = functional.cross_entropy(output.logits.float(), labels)
        return output

    def _choose_head(self, task: str | None) -> None:
        tasks = list(self.ensembling.heads)
        if (task is None and len(tasks) > 1) or (task is not None and task not in tasks):
            raise ValueError(f"task={task!r}: choose a head, one of {', '.join(tasks)}")
        self.get_submodule(self.ensembling.head).task = task or tasks[0]  # type: ignore[attr-defined]

    def _without_prefix(self, arguments: dict[str, Any], call: "Call") -> dict[str, Any]:
        """Labels that had no part in the choice, and as many fewer items where the Trainer has counted them."""
        labels = arguments["labels"]
        frozen = call.generates and not call.is_encoder_decoder and self.ensembling.mode == "frozen"
        if not frozen or call.given is not None or self.ensembling.router_layers == 0 or labels.ndim != 2:
            return {}
        prefix = self._prefix(call, labels[..., None])
        kept = labels.masked_fill(prefix, -100)
        items = arguments.get("num_items_in_batch")
        if items is None:
            return {"labels": kept}
        after, before = ((part[:, 1:] != -100).sum().clamp(min=1) for part in (kept, labels))
        return {"labels": kept, "num_items_in_batch": items * after / before}

    def _prefix(self, call: "Call", h: Tensor) -> Tensor:
        real = call.real(h, in_decoder=False)
        return real if call.fills_cache else real & (real.cumsum(dim=1) <= self.ensembling.routing_tokens)

    def _route(self, name: str, key: str, h: Tensor) -> Tensor:
        """The coefficients of a group whose module gets the input h."""
        call, router, holder = self._call, self.routers[key], self._coefficients[name]
        if call is None:
            raise RuntimeError("an ensembled module must be called through its model, which knows about padding")
        holder.merged = None
        if call.given is not None:
            return call.given[:, list(self.ensembling.groups).index(name)]
        if router.is_constant:
            return router.bias
        if h.ndim != 3:
            raise ValueError(f"cannot tell samples apart in an input of shape {tuple(h.shape)} of {name}")
        in_decoder = call.is_encoder_decoder and "decoder" in name.split(".")
        real, state = call.real(h, in_decoder=in_decoder), call.state()
        if not call.generates or (call.is_encoder_decoder and not in_decoder):
            return _mean(router(h), real)
        if in_decoder or self.ensembling.mode == "running":
            return _running_mean(router(h), real, state, name)
        if state is not None and not call.fills_cache:
            if name not in state:
                raise ValueError("this cache was not filled by this model: start with an empty one")
            if len(h) == 1 and not torch.is_grad_enabled():
                holder.merged = state.setdefault("merged", {})
            return state[name]
        coefficients = _mean(router(h), self._prefix(call, h))
        if state is not None:
            state[name] = coefficients
        return coefficients

    @torch.no_grad()
    def coefficients(self, **inputs: Any) -> Tensor:
        """What the routers give to these inputs: (samples, groups, experts). Not for `running`."""
        self(**inputs)  # type: ignore[operator]
        values = [self._coefficients[name].value for name in self.ensembling.groups]
        samples = max(value.shape[0] if value is not None and value.ndim == 2 else 1 for value in values)
        return torch.stack([value.expand(samples, -1) for value in values if value is not None], dim=1)


class TaskHeads(nn.ModuleDict):
    """One head per task, of which `task=` chooses one."""

    def __init__(self, head: Any, classes: dict[str, int]) -> None:
        bias = head.bias is not None
        super().__init__({task: nn.Linear(head.in_features, number, bias=bias) for task, number in classes.items()})
        self.task = next(iter(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self[self.task](x)


def _choose(model: Any, name: str, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    h = args[0] if args else kwargs["hidden_states"]
    model._coefficients[name].value = model._route(name, key, h)


def _enter_encoder(model: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if model._call is None:
        model._call = Call(model, kwargs)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """(samples, tokens, n) over the chosen tokens to (samples, n)."""
    return torch.where(chosen[..., None], values, 0).sum(dim=1) / chosen.sum(dim=1, keepdim=True).clamp(min=1)


def _running_mean(values: Tensor, real: Tensor, state: dict[str, Any] | None, name: str) -> Tensor:
    """(samples, tokens, n): at every position over the tokens up to it, those in the cache included."""
    total, count = (state or {}).get(name, (0, 0))
    totals = torch.where(real[..., None], values, 0).cumsum(dim=1) + total
    counts = real.cumsum(dim=1)[..., None] + count
    if state is not None:
        state[name] = totals[:, -1:], counts[:, -1:]
    return totals / counts.clamp(min=1)


def _width_into(linear: EnsembledLinear) -> int:
    return linear.weight.shape[0 if linear.is_transposed else 1]


@cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`WEMoE<X>` for `<X>`."""
    signature = inspect.signature(base.forward)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("coefficients", "task")]
    *first, last = signature.parameters.values()
    ending = [*more, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [last, *more]
    signature = signature.replace(parameters=[*first, *ending])

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(base.forward, signature, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {
        "config_class": config_class(base.config_class),
        "forward": forward,
        "_auto_class": auto_class_of(base.__name__),
        "__module__": __name__,
    }
    return type(_PREFIX + base.__name__, (Ensemble, base), members)


_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def auto_class_of(name: str) -> str:
    """Which of transformers' Auto classes loads this architecture."""
    for auto in _AUTO_CLASSES:
        for known in getattr(transformers, auto)._model_mapping._model_mapping.values():
            if name in ([known] if isinstance(known, str) else known):
                return auto
    raise ValueError(f"none of {', '.join(_AUTO_CLASSES)} loads a {name}")


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(base)
