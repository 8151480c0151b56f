"""`task_vector`: experts whose updates point where the prompt's gradient goes (MergeME, App. C).

Neither is ever built. Per module a sequence's gradient is G = sum over tokens of delta_t x_t^T,
with x the module's input and delta the gradient of its output, and an expert's update is s B A. So
<G, s B A> is s times the sum of (B^T delta_t) . (A x_t).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peft_routing.choosers.experts import (
    active_adapter,
    check_top_k,
    expert_names,
    softmax_over_largest,
)
from peft_routing.choosers.prefixes import Prefixes, check_language_model, evaluating
from peft_routing.layer import updates
from peft_routing.routers import wide


def task_vector(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    token_type_ids: Tensor | None = None,
    top_k: int | None = None,
    special_ids: Sequence[int] = (),
    rows_at_a_time: int = 8,
) -> Tensor:
    """Coefficients (batch, experts): softmax over the `top_k` largest cosines, the others 0.

    The cosine is between minus the gradient of the base model's loss on the prompt and the expert's
    update. Both are taken over the weights of all modules that the adapter has, as one long vector;
    the paper's gradient is over all parameters, where an update is 0, so its cosines are these
    times one factor per sequence. An expert without an update has 0. (The paper writes a task
    vector as base minus expert, so its gradient has no minus.)

    A token is scored by being predicted, so the first is not; nor are padding, on either side, and
    the `special_ids`. With nothing to score all experts get the same. No parameter needs or gets a
    gradient. `rows_at_a_time` sequences go through the model together, which bounds the memory.
    `token_type_ids` is not used. `UserError` for a model that is no causal language model, or has
    not one active routed adapter.
    """
    check_language_model(model)
    count = len(expert_names(model))
    k = check_top_k(top_k, count)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        prefixes = Prefixes.read(input_ids, attention_mask, special_ids)
        coefficients = torch.full((len(input_ids), count), 1 / count, device=input_ids.device)
        scored = prefixes.scored()
        if not len(scored):
            return coefficients
        lengths = _update_lengths(model, input_ids.device)
        for rows in scored.split(rows_at_a_time):
            cosines = _cosines(model, prefixes.of(rows), lengths)
            coefficients[rows] = softmax_over_largest(cosines, k).to(coefficients)
    return coefficients


@torch.no_grad()
def _update_lengths(model: Any, device: torch.device) -> Tensor:
    """(experts,): the norm of s B A over all modules, from tr((B^T B)(A A^T))."""
    adapter, layers = active_adapter(model)
    squares: Any = 0.0
    for layer in layers:
        experts = layer.experts_of(adapter)
        pairs, scalings = updates(experts.factors(), experts.site)
        a = pad_sequence([wide(a) for a, _ in pairs], batch_first=True)  # (experts, rank, in)
        b = pad_sequence([wide(b).T for _, b in pairs], batch_first=True)
        square = ((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2)) * torch.tensor(
            scalings, device=a.device
        ) ** 2
        squares = squares + square.to(device)
    return squares.clamp(min=0).sqrt()


def _cosines(model: Any, prefixes: Prefixes, update_lengths: Tensor) -> Tensor:
    """(batch, experts)"""
    adapter, layers = active_adapter(model)
    products = _Products(adapter, len(prefixes.ids), len(update_lengths), update_lengths.device)
    embedded: list[Tensor] = []

    def embed(_: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handles = [model.get_input_embeddings().register_forward_hook(embed)]
    handles += [
        layer.get_base_layer().register_forward_hook(products.watch(layer)) for layer in layers
    ]
    try:
        base = torch.zeros(len(update_lengths), device=prefixes.ids.device)
        losses = prefixes.losses(model, base)
        # sums over tokens: the cosines are those of means, which float16 would lose at the length
        # of a prompt
        torch.autograd.grad((losses * prefixes.counts()).sum(), embedded)
    finally:
        for handle in handles:
            handle.remove()
    products.finish()
    lengths = products.gradients.clamp(min=0).sqrt()[:, None] * update_lengths
    return torch.where(lengths > 0, -products.between / lengths, 0)


class _Products:
    """Products of a batch's gradients with the experts' updates and with themselves.

    They are added up as modules run backward.
    """

    def __init__(self, adapter: str, batch: int, experts: int, device: torch.device) -> None:
        self.adapter, self.batch = adapter, batch
        self.between = torch.zeros(batch, experts, device=device)
        self.gradients = torch.zeros(batch, device=device)
        self._waiting: list[_Runs] = []

    def watch(self, layer: Any) -> Any:
        runs = _Runs(layer)
        self._waiting.append(runs)

        def forward(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            runs.expected += 1
            held = [inputs[0].detach()]

            def backward(delta: Tensor) -> None:
                runs.pairs.append((held.pop(), delta.detach()))
                if len(runs.pairs) == runs.expected:
                    self._add(runs)

            output.register_hook(backward)

        return forward

    def finish(self) -> None:
        """What ran in the forward pass more often than in the backward pass."""
        for runs in self._waiting:
            if runs.pairs:
                self._add(runs)

    @torch.no_grad()
    def _add(self, runs: "_Runs") -> None:
        inputs, deltas = zip(*runs.pairs, strict=True)
        x, delta = self._joined(inputs), self._joined(deltas)
        runs.pairs.clear()
        experts = runs.layer.experts_of(self.adapter)
        a, b = wide(experts.A), wide(experts.B)
        of_ranks = ((x.to(a.dtype) @ a.T) * (delta.to(b.dtype) @ b.mT)).sum(dim=1)
        of_experts = torch.zeros(
            self.batch, len(experts.site.ranks), dtype=of_ranks.dtype, device=of_ranks.device
        )
        of_experts = of_experts.index_add(1, experts.owners, of_ranks)
        of_experts = of_experts * experts.scalings(of_experts.dtype, of_experts.device)
        if general := experts.site.general:
            of_experts = of_experts[:, :-general] - of_experts[:, -general:].mean(
                dim=1, keepdim=True
            )
        self.between = self.between + of_experts.to(self.between.device)
        self.gradients = self.gradients + squared_norms(x, delta).to(self.gradients.device)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """(batch, tokens, features) of all runs of a module, one after the other along the
        tokens."""
        return wide(torch.cat([self._by_sequence(part) for part in parts], dim=1))

    def _by_sequence(self, values: Tensor) -> Tensor:
        """(batch, tokens, features)"""
        if self.batch > 1 and (values.ndim != 3 or len(values) != self.batch):
            raise ValueError(
                "cannot tell the sequences apart in a module's input of shape "
                f"{tuple(values.shape)}: rows_at_a_time=1 takes them one by one"
            )
        return values.reshape(self.batch, -1, values.shape[-1])


class _Runs:
    """One module's runs: how many forward, and inputs and output gradients of those backward."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.expected = layer, 0
        self.pairs: list[tuple[Tensor, Tensor]] = []


def squared_norms(x: Tensor, delta: Tensor) -> Tensor:
    """(batch,): of delta^T x, for (batch, tokens, in) and (batch, tokens, out)."""
    tokens, size_in, size_out = x.shape[1], x.shape[2], delta.shape[2]
    if tokens * (size_in + size_out) <= size_in * size_out:
        return ((x @ x.mT) * (delta @ delta.mT)).sum(dim=(1, 2))
    return torch.stack(
        [(one.T @ other).square().sum() for one, other in zip(delta, x, strict=True)]
    )
