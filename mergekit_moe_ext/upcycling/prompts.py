"""The states of prompts in a dense model, at the places where the gates of its mixture of experts
will read.

The modes are those of mergekit-moe, with two faults mended: states are taken as the FFN receives
them, after the norm before it, since that is what the gate will receive; and padding does not
count.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from tqdm import tqdm

from _mergekit_moe_ext_common.checkpoints import check_finite
from _mergekit_moe_ext_common.loading import load_config, load_model
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.merging.wrappers import language_config

LOG = logging.getLogger(__name__)
Tokens = tuple[tuple[int, ...], ...]  # prompts, as token ids
_BATCH = 8  # prompts per forward pass
_DEGENERATE = 5.0  # the condition number of a gate from which on mergekit-moe warns


def hidden_states(
    model: Any, ffns: Sequence[str], prompts: Tokens, *, average: bool
) -> torch.Tensor:
    """The inputs of each of the modules `ffns`, averaged over the prompts: (len(ffns), hidden),
    float32, on the CPU.

    With `average` the mean over a prompt's tokens counts, else its last token.
    """
    # With --multi-gpu mergekit makes a GPU the default device.
    on_cpu = torch.device("cpu")
    received: dict[str, torch.Tensor] = {}

    def recorder(name: str) -> Any:
        def record(_module: Any, inputs: Any) -> None:
            received[name] = inputs[0]

        return record

    hooks = []
    for name in ffns:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(recorder(name)))
    total = torch.zeros(len(ffns), language_config(model.config).hidden_size, device=on_cpu)
    try:
        for start in range(0, len(prompts), _BATCH):
            ids, real = _padded(prompts[start : start + _BATCH])
            inputs = {"input_ids": ids, "attention_mask": real.long()}
            if model.config.is_encoder_decoder:  # both read the prompt
                inputs["decoder_input_ids"] = ids
                inputs["decoder_attention_mask"] = real.long()
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            with torch.no_grad():
                model(**inputs, use_cache=False)
            weights = _weights_of_tokens(real, average)
            for layer, name in enumerate(ffns):
                # Some modules receive (prompts * tokens, hidden).
                states = received.pop(name).float().cpu().reshape(*ids.shape, -1)
                total[layer] += torch.einsum("pt,pth->h", weights, states)
    finally:
        for hook in hooks:
            hook.remove()
    return total / len(prompts)


def _padded(prompts: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch (prompts, tokens) on the CPU, padded at the right: the token ids, and
    where they are not padding.
    """
    on_cpu = torch.device("cpu")
    rows = [torch.tensor(prompt, device=on_cpu) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=on_cpu)
    real = torch.arange(ids.shape[1], device=on_cpu) < lengths[:, None]
    return ids, real


def _weights_of_tokens(real: torch.Tensor, average: bool) -> torch.Tensor:
    """What each token (prompts, tokens) counts for, 1 in sum for each prompt: all tokens that are
    not padding alike, or the last of them alone.
    """
    lengths = real.sum(dim=1, keepdim=True)
    if average:
        return real / lengths
    places = torch.arange(real.shape[1], device=real.device)
    return (places == lengths - 1).float()


def embedding_states(embedding: torch.Tensor, prompts: Tokens) -> torch.Tensor:
    """The direction of the sum of the prompts' token embeddings: a vector (hidden,) of length one,
    in float32.
    """
    tokens = torch.tensor(list(itertools.chain.from_iterable(prompts)), device=embedding.device)
    return _direction(embedding[tokens].float().sum(dim=0))


def _direction(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def warn_of_degenerate(gates: torch.Tensor) -> None:
    """Log a warning of layers whose gates can hardly tell the experts apart.

    `gates` are (layers, experts, hidden).
    """
    degenerate = []
    for layer, gate in enumerate(gates):
        if torch.linalg.cond(gate.float()).item() > _DEGENERATE:
            degenerate.append(str(layer))
    if degenerate:
        where = "all layers" if len(degenerate) == len(gates) else f"layers {', '.join(degenerate)}"
        LOG.warning(
            "the gates of %s are degenerate: your prompts may be too similar, and one or more "
            "experts will be chosen too seldom",
            where,
        )


def opened(path: str, device: str, trust_remote_code: bool, quiet: bool) -> Any:
    """The model in a directory, in the dtype that it is stored in, for forward passes."""
    reading = Reading(trust_remote_code=trust_remote_code, quiet=quiet)
    device_map = "auto" if device.startswith("cuda") else None
    config = load_config(path, reading)
    architecture = None  # the Auto class of decoders or encoder-decoders
    if hasattr(config, "routed_ffns"):  # a generic mixture, which is of any kind
        auto = next(name for name in config.auto_map if name != "AutoConfig")
        architecture = getattr(transformers, auto)
    return load_model(
        path, config, reading, architecture=architecture, dtype="auto", device_map=device_map
    )


class PromptStates(Task[torch.Tensor]):
    """The states of positive minus negative prompts, per gate and expert, scaled to length one:
    (gates, experts, hidden).
    """

    model: ModelReference
    prompts: tuple[tuple[Tokens, Tokens], ...]  # positive and negative, per expert
    ffns: tuple[str, ...]  # the modules in the dense model, one per gate
    mode: str
    embedding: str  # the name of the input embedding
    device: str
    lora_merge_cache: str | None
    transformers_cache: str | None
    trust_remote_code: bool
    quiet: bool

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> torch.Tensor:
        if self.mode == "cheap_embed":
            embedding = LoaderCache().get(self.model).get_tensor(self.embedding)
            check_finite({self.embedding: embedding}, self.model)

            def states(prompts: Tokens) -> torch.Tensor:
                return embedding_states(embedding, prompts).expand(len(self.ffns), -1)
        else:
            source = self.model.merged(self.lora_merge_cache, self.trust_remote_code)
            path = source.local_path(self.transformers_cache)
            model = opened(path, self.device, self.trust_remote_code, self.quiet)

            def states(prompts: Tokens) -> torch.Tensor:
                return hidden_states(model, self.ffns, prompts, average=self.mode == "hidden_avg")

        gates = []
        for positive, negative in tqdm(self.prompts, desc="prompts", disable=self.quiet):
            gate = states(positive)
            gates.append(_direction(gate - states(negative) if negative else gate))
        stacked = torch.stack(gates, dim=1)
        warn_of_degenerate(stacked)
        return stacked
