"""Training a mixture of experts, its gates or all of it, on several sources at once.

That is MergeME 3.1 and appendix A. The Hugging Face Trainer does the work, on one process or, under
`accelerate launch`, on many. Ours differs from it where a mixture of experts would go wrong:

- The loss is the mean over all tokens of a step, whatever the processes, accumulation steps and
  padding. The load-balancing loss is averaged over them, not added up.
- Held-out losses hold no load-balancing loss.
- A checkpoint holds what is trained, in float32, by the names in the model. (The stock Trainer
  writes a fused expert as single experts, and on resuming drops them for names that it does not
  know.)
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from datasets import Dataset
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from _mergekit_moe_ext_common.cards import extend_card, sources_in_markdown
from _mergekit_moe_ext_common.data import collate, decoder_inputs, fingerprint, real_tokens
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    vocabulary_of,
)
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.runs import (
    Losses,
    Run,
    before_and_after,
    checkpoint_bytes,
    losses_before_and_after,
    model_identity,
)
from _mergekit_moe_ext_common.staging import copy_files, has_tokenizer, model_folder
from _mergekit_moe_ext_common.training import (
    TokenTrainer,
    TrainedOnly,
    dtypes_of,
    read_data,
    restore_dtypes,
)
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.outputs import complete_model
from mergekit_moe_ext.mixtures.routers import load_balancing_loss, recorded, routers_of
from mergekit_moe_ext.recipes import Recipe

LOG = logging.getLogger(__name__)
Part = Literal["gates", "all"]
LEARNING_RATES: dict[Part, float] = {"gates": 1e-3, "all": 1e-5}
_ON_CARD = ("learning_rate", "weight_decay", "seed", "processes")


class MoeTrainer(TrainedOnly, TokenTrainer):
    """The Trainer as the top of this file describes it."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, router_aux_loss: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step
        self._router_aux_loss = router_aux_loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        is_balanced = bool(self._router_aux_loss) and model.training
        # Choices are recorded only here, and not when gradient checkpointing runs the layers again:
        # what it recomputes would stay.
        recording: Any = recorded(self.model) if is_balanced else nullcontext({})
        with recording as choices:
            outputs = model(**_without_labels(inputs), use_cache=False)
        losses, counts = self.token_losses(outputs.logits, inputs["labels"])
        # The Trainer averages gradients over the processes: times their number it is the mean over
        # the tokens of all of them.
        tokens = counts.sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / tokens * self.accelerator.num_processes
        if is_balanced:
            balance = load_balancing_loss(choices, real_tokens(inputs))
            loss = loss + self._router_aux_loss * balance / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def train(
    model_path: str,
    output: str | None,
    part: Part,
    data: Sequence[str],
    reading: Reading,
    recipe: Recipe,
    *,
    weights: Mapping[str, float] | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
) -> Losses | None:
    """Train a mixture of experts and write the result to `output`.

    Returns the held-out loss of every source before and after; None in all but the main process.
    `output` is `<model>-trained` if not given. Checkpoints lie in `<output>.checkpoints` until the
    training is complete; `resume` goes on from the last one. Where there are several processes,
    their group is gone afterwards. `UserError` for what cannot be trained.
    """
    run = Run(output or f"{model_path.rstrip('/')}-trained", reading, splits=True)
    config = load_config(model_path, reading)
    headers = check_model(model_path, config, reading)
    rate = LEARNING_RATES[part] if recipe.learning_rate is None else recipe.learning_rate
    # Nothing is gained from frozen weights in float32.
    bf16 = recipe.bf16 or (part == "gates" and config.dtype == torch.bfloat16)
    recipe = replace(recipe, learning_rate=rate, bf16=bf16)
    arguments = run.arguments(
        recipe,
        learning_rate=rate,
        measure=bool(recipe.held_out or eval_data),
        ddp_find_unused_parameters=True,  # an expert that no token of this process chose
    )
    tokenizer = load_tokenizer(model_path, reading)
    with arguments.main_process_first(desc="reading the data"):
        training, held_out = read_data(data, weights, eval_data, tokenizer, config, reading, recipe)
    run.begin(_settings(model_path, part, training, recipe), resume=resume)

    model = load_model(model_path, config, reading, headers=headers, dtype="auto")
    dtypes = dtypes_of(model)
    _choose_parameters(model, part)
    size = sum(parameter.nbytes for parameter in model.parameters())
    run.check_room(size, checkpoint_bytes(model), arguments, len(training))
    _prepare_dtypes(model, recipe.bf16)
    batch = _batches(model, padding_token(tokenizer, vocabulary_of(config)))
    _check_gradient(model, batch([training[0]]), part, recipe)
    trainer = MoeTrainer(
        model,
        arguments,
        data_collator=batch,
        train_dataset=training,
        eval_dataset=held_out or None,
        router_aux_loss=recipe.router_aux_loss,
    )
    run.train(trainer)
    run.end_group()
    if not run.is_main:
        return None

    losses = losses_before_and_after(trainer, held_out)
    restore_dtypes(model, dtypes)
    run.check_converged(trainer, losses, "take a lower --learning-rate")
    with run.finish() as directory:
        source = model_folder(model_path)
        copy_files(source, directory, tokenizer)
        if not has_tokenizer(directory):
            # Read again: the one that cut the texts has cutting among its settings now.
            load_tokenizer(model_path, reading).save_pretrained(directory)
        model.save_pretrained(directory)
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
        complete_model(
            directory,
            model.config,
            source,
            model_path,
            is_trusted=reading.trust_remote_code,
        )
        extend_card(directory, _card(part, data, run.settings, losses))
    return losses


def _settings(model_path: str, part: Part, training: Dataset, recipe: Recipe) -> dict[str, Any]:
    reference = ModelReference.model_validate(model_path)
    return {
        "model": model_identity(model_path),
        "train": part,
        "weights": checkpoint_fingerprint(reference, MergeOptions()),
        "data": fingerprint(training),
        **asdict(recipe),
    }


def _choose_parameters(model: Any, part: Part) -> None:
    """Turns gradients off for all parameters that are not trained."""
    # Asked for also where all is trained: a model without routers is not a mixture of experts.
    routers = routers_of(model)
    if part == "all":
        return
    trainable = set()
    for router in routers.values():
        trainable |= {id(parameter) for parameter in router.parameters()}
    for parameter in model.parameters():
        # What the architecture itself keeps fixed stays so.
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trainable)


def _prepare_dtypes(model: Any, bf16: bool) -> None:
    """Makes what is trained float32, and without --bf16 the rest as well.

    In bfloat16 small steps would be rounded away.
    """
    for parameter in model.parameters():
        if parameter.requires_grad or not bf16:
            parameter.data = parameter.data.float()


def _batches(model: Any, pad_token_id: int) -> Any:
    """A data collator with the tokens themselves as a decoder's `labels`, else the targets."""

    def batch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tensors = collate(rows, pad_token_id)
        if "labels" in tensors:
            tensors["decoder_input_ids"] = decoder_inputs(model, tensors["labels"])
        else:
            is_padding = tensors["attention_mask"] == 0
            tensors["labels"] = tensors["input_ids"].masked_fill(is_padding, -100)
        return tensors

    return batch


def _without_labels(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _check_gradient(
    model: Any,
    batch: dict[str, torch.Tensor],
    part: Part,
    recipe: Recipe,
) -> None:
    """Finds gates that keep one expert and give it all the weight: no loss has a gradient for them.

    `UserError` where the gates alone are trained, else a warning.
    """
    if recipe.router_aux_loss or (getattr(model.config, "num_experts_per_tok", None) or 1) > 1:
        return
    model.eval()
    start = {name: tensor[:, :16] for name, tensor in _without_labels(batch).items()}
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16)
    with autocast, recorded(model) as choices:
        model(**start, use_cache=False)
    for name, choice in choices.items():
        if choice.weights.shape[-1] > 1:
            continue
        router = [p for p in model.get_submodule(name).parameters() if p.requires_grad]
        # The weight of the one expert is the router's probability, or that divided by itself, which
        # is constant. Rounding leaves the constant a small gradient, hence the comparison.
        weights_norm = _gradient_norm(choice.weights.sum(), router)
        probability = choice.logits.float().softmax(-1).amax(-1)
        probability_norm = _gradient_norm(probability.sum(), router)
        is_constant = weights_norm <= (0.01 if recipe.bf16 else 1e-4) * probability_norm
        if not is_constant:
            continue
        complaint = (
            "the gates of this model choose one expert and give it all the weight (as "
            f"{name} does), so the loss has no gradient for them; give --router-aux-loss, or merge "
            "with experts_per_token: 2"
        )
        if part == "gates":
            raise UserError(complaint)
        LOG.warning("%s", complaint)
        return


def _gradient_norm(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> float:
    """The sum of the norms of the gradients of `value` for each of the parameters."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return sum(gradient.norm().item() for gradient in gradients if gradient is not None)


def _card(
    part: Part,
    data: Sequence[str],
    settings: Mapping[str, Any],
    losses: Losses,
) -> list[str]:
    subject = "the gates alone were" if part == "gates" else "all parameters were"
    sources = sources_in_markdown(data)
    numbers = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in _ON_CARD)
    lines = [
        "## Training",
        "",
        f"After merging, {subject} trained with mergekit-moe-ext on {sources}: {numbers}.",
    ]
    if losses:
        lines += ["", before_and_after(losses, markdown=True)]
    return lines
