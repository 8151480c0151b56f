"""`task_vector`: experts whose updates point where the prompt's gradient goes (MergeME, App. C).

Neither updates nor gradients of weights are ever built. At a module, the gradient of a sequence is
G = sum over tokens of delta_t x_t^T, with x the module's input and delta the gradient of its
output. An expert's update is s B A. So <G, s B A> is s times the sum of (B^T delta_t) . (A x_t).
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
    """Coefficients (batch, experts): the softmax over the `top_k` largest cosines; the others
    are 0.

    The cosine is between an expert's update and minus the gradient of the base model's loss on the
    prompt. (The paper writes a task vector as base minus expert, so that its gradient has no
    minus.) Both are over the weights of all modules that the adapter has, as one long vector. The
    paper's gradient is over all parameters; outside these modules an update is 0, so its cosines
    are ours times one factor per sequence. An expert without an update has the cosine 0.

    A token is scored by being predicted, so the first one is not scored. Neither are padding, on
    either side, and the `special_ids`. Where nothing is left to score, all experts get the same
    coefficient. `token_type_ids` is not used.

    No parameter needs or gets a gradient. `rows_at_a_time` sequences go through the model together,
    which bounds the memory. `UserError` for a model that is not a causal language model, or does
    not have exactly one active routed adapter.
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
    """(experts,): the norm of an expert's s B A over all modules."""
    # |B A|² = tr((B A)^T (B A)) = tr((B^T B)(A A^T)), the sum over the products of two matrices of
    # (rank, rank): zeros that pad an expert to the largest rank add nothing.
    adapter, layers = active_adapter(model)
    squares: Any = 0.0
    for layer in layers:
        experts = layer.experts_of(adapter)
        pairs, scalings = updates(experts.factors(), experts.site)
        a = pad_sequence([wide(a) for a, _ in pairs], batch_first=True)  # (experts, rank, in)
        b = pad_sequence([wide(b).T for _, b in pairs], batch_first=True)  # (experts, rank, out)
        square = ((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2))
        square = square * torch.tensor(scalings, device=a.device) ** 2
        squares = squares + square.to(device)
    return squares.clamp(min=0).sqrt()


def _cosines(model: Any, prefixes: Prefixes, update_lengths: Tensor) -> Tensor:
    """(batch, experts): the cosines between updates and minus the gradients."""
    adapter, layers = active_adapter(model)
    products = _Products(adapter, len(prefixes.ids), len(update_lengths), update_lengths.device)
    # A backward pass down to the embeddings reaches the output of every module, whether or not any
    # parameter needs a gradient.
    embedded: list[Tensor] = []

    def embed(_: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handles = [model.get_input_embeddings().register_forward_hook(embed)]
    handles += [
        layer.get_base_layer().register_forward_hook(products.watch(layer)) for layer in layers
    ]
    try:
        # With all coefficients 0 the model is the base model.
        of_base = torch.zeros(len(update_lengths), device=prefixes.ids.device)
        losses = prefixes.losses(model, of_base)
        # The cosines of sums over tokens are those of means, whose gradients would be too small for
        # float16 at the length of a prompt.
        torch.autograd.grad((losses * prefixes.counts()).sum(), embedded)
    finally:
        for handle in handles:
            handle.remove()
    products.finish()
    lengths = products.gradients.clamp(min=0).sqrt()[:, None] * update_lengths
    return torch.where(lengths > 0, -products.between / lengths, 0)


class _Products:
    """The products of a batch's gradients with the experts' updates and with themselves.

    They are added up while the modules run backward, so that at any time the inputs and the output
    gradients of few modules are in memory.
    """

    def __init__(self, adapter: str, batch: int, experts: int, device: torch.device) -> None:
        self.adapter = adapter
        self.batch = batch
        self.between = torch.zeros(batch, experts, device=device)  # <gradient, update>
        self.gradients = torch.zeros(batch, device=device)  # <gradient, gradient>
        self._waiting: list[_Runs] = []

    def watch(self, layer: Any) -> Any:
        """A forward hook for a module's base layer."""
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
        """Adds the modules that ran more often in the forward pass than in the backward pass."""
        for runs in self._waiting:
            if runs.pairs:
                self._add(runs)

    @torch.no_grad()
    def _add(self, runs: "_Runs") -> None:
        """Adds the products of one module, and forgets its inputs and output gradients.

        A module that ran several times has one gradient, the sum over the tokens of all its runs.
        """
        inputs, deltas = zip(*runs.pairs, strict=True)
        x = self._joined(inputs)
        delta = self._joined(deltas)
        runs.pairs.clear()
        experts = runs.layer.experts_of(self.adapter)
        a = wide(experts.A)
        b = wide(experts.B)
        # The products of each row of A and B, which all experts have below each other, are added up
        # over the tokens, and then over the rows that belong to an expert.
        of_ranks = ((x.to(a.dtype) @ a.T) * (delta.to(b.dtype) @ b.mT)).sum(dim=1)
        of_experts = torch.zeros(
            self.batch, len(experts.site.ranks), dtype=of_ranks.dtype, device=of_ranks.device
        )
        of_experts = of_experts.index_add(1, experts.owners, of_ranks)
        of_experts = of_experts * experts.scalings(of_experts.dtype, of_experts.device)
        # The mean of the general experts is subtracted from each update, so its product is as well.
        general = experts.site.general
        if general:
            mean = of_experts[:, -general:].mean(dim=1, keepdim=True)
            of_experts = of_experts[:, :-general] - mean
        self.between = self.between + of_experts.to(self.between.device)
        self.gradients = self.gradients + squared_norms(x, delta).to(self.gradients.device)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """(batch, tokens, features): all runs of a module, one after the other along the tokens."""
        return wide(torch.cat([self._by_sequence(part) for part in parts], dim=1))

    def _by_sequence(self, values: Tensor) -> Tensor:
        """(batch, tokens, features), with all dimensions between as tokens.

        `ValueError` where a module has put several sequences into one dimension.
        """
        if self.batch > 1 and (values.ndim != 3 or len(values) != self.batch):
            raise ValueError(
                "cannot tell the sequences apart in a module's input of shape "
                f"{tuple(values.shape)}: rows_at_a_time=1 takes them one by one"
            )
        return values.reshape(self.batch, -1, values.shape[-1])


class _Runs:
    """The runs of one module in a pass."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.expected = 0  # runs in the forward pass
        # The inputs and output gradients of those that have run backward.
        self.pairs: list[tuple[Tensor, Tensor]] = []


def squared_norms(x: Tensor, delta: Tensor) -> Tensor:
    """(batch,): the squared norm of delta^T x, for x (batch, tokens, in) and delta (batch, tokens,
    out).
    """
    # |delta^T x|² is also the sum over the products of two matrices of (tokens, tokens), which cost
    # less for few tokens. Otherwise delta^T x is built, for one sequence at a time.
    tokens, size_in = x.shape[1:]
    size_out = delta.shape[2]
    if tokens * (size_in + size_out) <= size_in * size_out:
        return ((x @ x.mT) * (delta @ delta.mT)).sum(dim=(1, 2))
    norms = [
        (delta_of_one.T @ x_of_one).square().sum()
        for delta_of_one, x_of_one in zip(delta, x, strict=True)
    ]
    return torch.stack(norms)
