"""Tiny decoders, and sequence MoEs put together from them by hand, without a merge."""

import copy
import inspect

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_moe_ext.modeling import SequenceMoEConfig, SequenceMoEForCausalLM
from tests.conftest import SPECIAL_TOKENS, TINY

PAD, EOS = 0, 1  # and no other special tokens
VOCAB = TINY["vocab_size"]


def dense(seed=0, family="llama", **config):
    """A decoder with weights so large, and norms and biases so uneven, that no two predict
    alike."""
    config = AutoConfig.for_model(
        family, **{**TINY, **SPECIAL_TOKENS, "num_hidden_layers": 2, **config}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def fine_tunes(number=3, **config):
    """Decoders that share a base, the first of them."""
    base = dense(0, **config)
    models = [base]
    for seed in range(1, number):
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        models.append(model)
    return models


def _config_of(source):
    values = source.config.to_diff_dict()
    for key in ("dtype", "transformers_version"):
        values.pop(key, None)
    if "final_logit_softcapping" in source.config.to_dict():
        values["final_logit_softcapping"] = None
    return {
        **values,
        "model_type": source.config.model_type,
        "architectures": [type(source).__name__],
    }


def mixture(sources, embed=None, head=None, **config):
    """A sequence MoE of copies of these decoders; with `embed` and `head`, which all experts then
    share.
    """
    config = SequenceMoEConfig(
        **{
            "experts": [_config_of(source) for source in sources],
            "hidden_size": max(source.config.hidden_size for source in sources),
            "vocab_size": VOCAB,
            "experts_per_sequence": len(sources) if config.get("routing") == "uniform" else 2,
            "embedding": "separate" if embed is None else "shared",
            "logit_softcaps": [
                getattr(source.config, "final_logit_softcapping", None) for source in sources
            ],
            "special_token_ids": [PAD, EOS],
            "tie_word_embeddings": False,
            **SPECIAL_TOKENS,
            **config,
        }
    )
    torch.manual_seed(7)
    model = SequenceMoEForCausalLM(config).eval()
    for expert, source in zip(model.experts, sources, strict=True):
        missing = expert.trunk.load_state_dict(source.state_dict(), strict=False).missing_keys
        assert not missing, missing
        if embed is None:
            expert.embed_tokens.load_state_dict(source.get_input_embeddings().state_dict())
            expert.lm_head.load_state_dict(source.get_output_embeddings().state_dict())
    if embed is not None:
        model.embed_tokens.load_state_dict(embed.state_dict())
        model.lm_head.load_state_dict(head.state_dict())
    return model


def words(rows=4, length=12, seed=0):
    """Tokens of which none is special."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, padding, side):
    """Each row's first or last tokens, as many as `padding` says, overwritten by padding; and the
    mask.
    """
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, number in enumerate(padding):
        where = slice(0, number) if side == "left" else slice(ids.shape[1] - number, None)
        ids[row, where], mask[row, where] = PAD, 0
    return ids, mask


def logits_of(source, ids, mask=None):
    """What a decoder alone predicts; positions are counted from the first token that is no
    padding."""
    more = {}
    if mask is not None and "position_ids" in inspect.signature(source.forward).parameters:
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        return source(input_ids=ids, attention_mask=mask, **more).logits


def only(expert, number, rows=1):
    """Coefficients that choose one expert."""
    return torch.nn.functional.one_hot(torch.full((rows,), expert), number).float()


class Calls:
    """Counts, per expert, how many sequences and tokens its decoder was given."""

    def __init__(self, model):
        self.seen = [[] for _ in model.experts]
        for index, expert in enumerate(model.experts):
            expert.trunk.register_forward_pre_hook(self._count(index), with_kwargs=True)

    def _count(self, index):
        def hook(_module, _args, kwargs):
            self.seen[index].append(tuple(kwargs["inputs_embeds"].shape[:2]))

        return hook

    def take(self):
        """Per expert the (rows, length) of its calls since the last time."""
        seen, self.seen[:] = list(self.seen), [[] for _ in self.seen]
        return seen
