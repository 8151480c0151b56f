"""Training a mixture of experts: its gates, or all of it, on several sources at once (MergeME 3.1 and appendix A).

The Hugging Face Trainer does the work, on one process or, under `accelerate launch`, on many. Ours differs from it
where a mixture of experts would go wrong:

- The loss is the mean over all tokens of a step, whatever the processes, accumulation steps and padding. The
  load-balancing loss is averaged over them, not added up.
- Held-out losses hold no load-balancing loss.
- A checkpoint holds what is trained, in float32, by the names in the model. (The stock Trainer writes a fused expert
  as single experts, and on resuming drops them for names that it does not know.)
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import click
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from _mergekit_moe_ext_common.data import collate, decoder_inputs, fingerprint, real_tokens
from _mergekit_moe_ext_common.loading import load_config, load_model, load_tokenizer, padding_token, silence
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.staging import check_output, check_room, copy_files, extend_card, staged
from _mergekit_moe_ext_common.training import (
    TokenTrainer,
    TrainedOnly,
    first_and_last,
    keep_settings,
    last_checkpoints,
    part_processes,
    read_data,
    training_arguments,
)
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.mixtures.routers import load_balancing_loss, recorded, routers_of
from mergekit_moe_ext.recipes import Recipe

LOG = logging.getLogger(__name__)
Part = Literal["gates", "all"]
LEARNING_RATES: dict[Part, float] = {"gates": 1e-3, "all": 1e-5}
_ON_CARD = ("learning_rate", "weight_decay", "seed", "processes")


class MoeTrainer(TrainedOnly, TokenTrainer):
    """See the top of this file."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, router_aux_loss: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step
        self._router_aux_loss = router_aux_loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        balancing = bool(self._router_aux_loss) and model.training
        # only here, and not when gradient checkpointing runs the layers again: what it recomputes would stay
        recording: Any = recorded(self.model) if balancing else nullcontext({})
        with recording as choices:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        losses, counts = self.token_losses(outputs.logits, labels)
        processes = self.accelerator.num_processes  # over which the gradients are averaged
        loss = losses.sum() / (num_items_in_batch if num_items_in_batch is not None else counts.sum()) * processes
        if balancing:
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
) -> dict[str, tuple[float, float]] | None:
    """Train a mixture of experts and write the result to `output`, `<model>-trained` if not given.

    Returns the held-out loss of every source before and after; None in all but the main process. Checkpoints lie in
    `<output>.checkpoints` until the training is complete; `resume` goes on from the last one. Where there are several
    processes, their group is gone afterwards.
    """
    silence(reading)
    out = check_output(output or f"{model_path.rstrip('/')}-trained")
    checkpoints = out.with_name(f"{out.name}.checkpoints")
    config = load_config(model_path, reading)
    if part == "gates" and config.dtype == torch.bfloat16:  # nothing is gained from frozen weights in float32
        recipe = replace(recipe, bf16=True)
    arguments = training_arguments(
        recipe,
        reading,
        checkpoints,
        learning_rate=LEARNING_RATES[part] if recipe.learning_rate is None else recipe.learning_rate,
        measure=bool(recipe.held_out or eval_data),
        ddp_find_unused_parameters=True,  # an expert that no token of this process chose
    )
    tokenizer = load_tokenizer(model_path, reading)
    with arguments.main_process_first(desc="reading the data"):
        training, held_out = read_data(data, weights or {}, eval_data, tokenizer, config, reading, recipe)
    settings = {
        "model": str(Path(model_path).resolve()) if Path(model_path).exists() else model_path,
        "train": part,
        "weights": checkpoint_fingerprint(ModelReference.model_validate(model_path), MergeOptions()),
        "data": fingerprint(training),
        **asdict(recipe),
        "learning_rate": arguments.learning_rate,
        "processes": arguments.world_size,
    }
    checkpoint = last_checkpoints(checkpoints, settings, resume=resume)[""]

    model = load_model(model_path, config, reading, dtype="auto")
    check_room(out, sum(p.nbytes for p in model.parameters()))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    _choose_parameters(model, part)
    _prepare_dtypes(model, recipe.bf16)
    batch = _batches(model, padding_token(tokenizer))
    _check_gradient(model, batch([training[0]]), part, recipe)

    trainer = MoeTrainer(
        model,
        arguments,
        data_collator=batch,
        train_dataset=training,
        eval_dataset=held_out or None,
        router_aux_loss=recipe.router_aux_loss,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise click.ClickException(
            "FSDP and DeepSpeed are not supported yet: every process holds the whole model; use `accelerate launch "
            "--multi_gpu`"
        )
    if arguments.should_save:
        keep_settings(checkpoints, settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = first_and_last(trainer.state.log_history, held_out)

    part_processes(trainer)
    if not arguments.should_save:
        return None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
    with staged(out) as directory:
        copy_files(Path(model_path), directory)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
        _extend_card(directory, part, data, settings, losses)
    shutil.rmtree(checkpoints)
    return losses


def _choose_parameters(model: Any, part: Part) -> None:
    """Leaves gradients to what is trained only."""
    routers = routers_of(model)  # also where all is trained: a model without routers is no mixture of experts
    if part == "gates":
        of_routers = {id(p) for router in routers.values() for p in router.parameters()}
        for parameter in model.parameters():  # what the architecture itself keeps fixed stays so
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in of_routers)


def _prepare_dtypes(model: Any, bf16: bool) -> None:
    """What is trained becomes float32: in bfloat16 small steps would be rounded away. The rest too, without --bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad or not bf16:
            parameter.data = parameter.data.float()


def _batches(model: Any, pad_token_id: int) -> Any:
    """A data collator: `labels` are the tokens themselves for a decoder, the targets for an encoder-decoder."""

    def batch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tensors = collate(rows, pad_token_id)
        if "labels" in tensors:
            tensors["decoder_input_ids"] = decoder_inputs(model, tensors["labels"])
        else:
            tensors["labels"] = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)
        return tensors

    return batch


def _check_gradient(model: Any, batch: dict[str, torch.Tensor], part: Part, recipe: Recipe) -> None:
    """Finds gates that keep one expert and give it all the weight: they change nothing, and so they learn nothing."""
    if recipe.router_aux_loss or (getattr(model.config, "num_experts_per_tok", None) or 1) > 1:
        return
    model.eval()
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16)
    with autocast, recorded(model) as choices:
        model(**{name: tensor[:, :16] for name, tensor in batch.items() if name != "labels"}, use_cache=False)
    for name, choice in choices.items():
        if choice.weights.shape[-1] > 1:
            continue
        router = [p for p in model.get_submodule(name).parameters() if p.requires_grad]
        of_weights = _gradient_norm(choice.weights.sum(), router)
        of_softmax = _gradient_norm(choice.logits.float().softmax(-1).amax(-1).sum(), router)
        if of_weights <= (0.01 if recipe.bf16 else 1e-4) * of_softmax:
            complaint = (
                f"the gates of this model choose one expert and give it all the weight (as {name} does), so the loss "
                "has no gradient for them; give --router-aux-loss, or merge with experts_per_token: 2"
            )
            if part == "gates":
                raise click.ClickException(complaint)
            LOG.warning("%s", complaint)
            return


def _gradient_norm(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> float:
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return sum(gradient.norm().item() for gradient in gradients if gradient is not None)


def _extend_card(
    directory: Path, part: Part, data: Sequence[str], settings: Mapping[str, Any], losses: Mapping[str, Any]
) -> None:
    lines = [
        "## Training",
        "",
        f"After merging, {'the gates alone were' if part == 'gates' else 'all parameters were'} trained with "
        f"mergekit-moe-ext on {', '.join(data)}: "
        + ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in _ON_CARD)
        + ".",
    ]
    if losses:
        lines += ["", "| held-out loss | before | after |", "|---|---:|---:|"]
        lines += [f"| {name} | {before:.4f} | {after:.4f} |" for name, (before, after) in losses.items()]
    extend_card(directory, lines)
