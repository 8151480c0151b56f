"""The configuration of a sequence MoE: whole decoders as experts (MergeME)."""

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

COMBINATIONS = ("logits", "probabilities")
ROUTINGS = ("perplexity", "task_vector", "learned", "uniform")


class SequenceMoEConfig(PretrainedConfig):
    """The configuration of `SequenceMoEForCausalLM`.

    Args:
        experts: each expert's own transformers configuration, a dictionary with its `model_type`.
        expert_names: the names of the experts, for display alone.
        hidden_size: the width of the shared embedding and head; d_m in MergeME 3.2.
        vocab_size: the size of the vocabulary, the same for all experts.
        routing: the source of the coefficients: `perplexity` (MergeME 3.1.3), `task_vector`
            (appendix C), `learned` (3.2) or `uniform`.
        experts_per_sequence: the number of experts that a sequence chooses; all of them where
            routing is uniform.
        embedding: `shared` (one embedding and one head) or `separate` (each expert its own).
        projector: the kind of the projectors between the shared embedding, an expert and the shared
            head, `linear` or `mlp`; None for no projectors.
        projector_residual: whether an `mlp` projector's output is added to its input, which is cut
            or padded with zeros to size.
        shared_parameters: patterns (`re.search`) of the names of a decoder's parameters that all
            experts share.
        logit_softcaps: each expert's cap on logits (Gemma-2's `final_logit_softcapping`), or None.
        combine: the quantity of the chosen experts that is added up, `logits` (the paper) or
            `probabilities`, of which the model then gives the logarithms as its logits.
        mixed_ffns: the names in a decoder of the FFNs whose outputs are added up, layer by layer,
            in one pass over the first expert's stack; None where experts run apart, and what comes
            out of them is added up. Experts share all but these FFNs.
        head_bias: whether the shared head, or the head of every expert, has a bias.
        tie_word_embeddings: whether the shared head is the shared embedding; experts that have
            their own say so in their own configurations.
        routing_tokens: the number of tokens of a sequence that choose, outside `generate`, which
            takes the prompt.
        routing_prefix: `prefix`, or `sequence`: the whole sequence chooses, as in the paper, which
            leaks later tokens into the prediction of earlier ones.
        special_token_ids: the tokens that perplexity does not count.
        base_expert: the index of the expert that is the base of the others, for `task_vector`; a
            learned router reads its embedding where embeddings are separate.
        task_vector_layers: the numbers of the decoder layers that are compared; None compares all
            parameters.
        router_aux_loss_coef: the weight of the load-balancing loss in training.
    """

    model_type = "sequence_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "past_key_values",
        "coefficients",
        "aux_loss",
    ]

    def __init__(
        self,
        experts: list[dict[str, Any]] | None = None,
        expert_names: list[str] | None = None,
        hidden_size: int = 0,
        vocab_size: int = 0,
        routing: str = "perplexity",
        experts_per_sequence: int = 1,
        embedding: str = "separate",
        projector: str | None = None,
        projector_residual: bool = False,
        shared_parameters: list[str] | None = None,
        logit_softcaps: list[float | None] | None = None,
        head_bias: bool = False,
        tie_word_embeddings: bool = False,
        routing_tokens: int = 32,
        routing_prefix: str = "prefix",
        special_token_ids: list[int] | None = None,
        base_expert: int = 0,
        task_vector_layers: list[int] | None = None,
        router_aux_loss_coef: float = 0.0,
        combine: str = "logits",
        mixed_ffns: list[str] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.experts = experts or []
        self.expert_names = expert_names or [str(index) for index in range(len(self.experts))]
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        layers = [expert.num_hidden_layers for expert in self.expert_configs()]
        self.num_hidden_layers = max(layers, default=0)
        self.routing = routing
        self.experts_per_sequence = experts_per_sequence
        self.embedding = embedding
        self.projector = projector
        self.projector_residual = projector_residual
        self.shared_parameters = shared_parameters or []
        self.logit_softcaps = logit_softcaps or [None] * len(self.experts)
        self.head_bias = head_bias
        self.tie_word_embeddings = tie_word_embeddings
        self.routing_tokens = routing_tokens
        self.routing_prefix = routing_prefix
        self.special_token_ids = special_token_ids or []
        self.base_expert = base_expert
        self.task_vector_layers = task_vector_layers
        self.router_aux_loss_coef = router_aux_loss_coef
        self.combine = combine
        self.mixed_ffns = mixed_ffns
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs.pop("num_hidden_layers", None)
        super().__init__(**kwargs)
        if not self.experts:  # transformers makes an empty configuration to compare with
            return
        if routing not in ROUTINGS:
            raise ValueError(f"routing={routing!r} is none of {', '.join(ROUTINGS)}")
        if embedding not in ("shared", "separate"):
            raise ValueError(f"embedding={embedding!r} is neither 'shared' nor 'separate'")
        number = len(self.experts)
        if not 1 <= experts_per_sequence <= number:
            raise ValueError(
                f"experts_per_sequence={experts_per_sequence}, but there are {number} experts",
            )
        if routing == "uniform" and experts_per_sequence != number:
            raise ValueError(
                f"routing='uniform' takes all {number} experts, not {experts_per_sequence} of them",
            )
        if routing_prefix not in ("prefix", "sequence"):
            raise ValueError(
                f"routing_prefix={routing_prefix!r} is neither 'prefix' nor 'sequence'",
            )
        if combine not in COMBINATIONS:
            raise ValueError(f"combine={combine!r} is none of {', '.join(COMBINATIONS)}")
        if mixed_ffns and (embedding != "shared" or combine != "logits"):
            raise ValueError("mixed_ffns= need embedding='shared' and combine='logits'")
        if routing_tokens < 1:
            raise ValueError(f"routing_tokens={routing_tokens} is below 1")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json. `ValueError` where that is of another package's
        model, whose type has the same name: transformers takes it for ours where this is installed.
        """
        experts = config_dict.get("experts")
        is_ours = isinstance(experts, list) and all(isinstance(each, dict) for each in experts)
        if not (is_ours and experts):
            architecture = (config_dict.get("architectures") or ["model"])[0]
            raise ValueError(
                f"this {architecture} has the model type {cls.model_type!r}, but no `experts` as "
                "the sequence mixtures of mergekit-moe-ext have them. If it is another package's, "
                "load it with that package's code in a process that has the environment variable "
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 and does not import mergekit_moe_ext"
            )
        return super().from_dict(config_dict, **kwargs)

    def expert_configs(self) -> list[PretrainedConfig]:
        """The experts' own configurations."""
        return [AutoConfig.for_model(**expert) for expert in self.experts]


SequenceMoEConfig.register_for_auto_class()
