"""An ensemble distilled into one plain LoRA (Trade-offs 3.2.2).

The ensemble reads every text once, or again in each step. Of each token to come the probabilities
of its 64 likeliest are kept, and the rest's as one number. An ordinary LoRA on the base model is
trained to have the same: the Kullback-Leibler divergence of the two is its loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm

from _mergekit_moe_ext_common.cards import extend_card, sources_in_markdown
from _mergekit_moe_ext_common.checkpoints import weight_files
from _mergekit_moe_ext_common.data import collate, fingerprint
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.fingerprints import weights_fingerprint
from _mergekit_moe_ext_common.loading import (
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
)
from _mergekit_moe_ext_common.training import TokenTrainer, read_data
from peft_routing.adapter_files import fingerprint as adapter_fingerprint
from peft_routing.choosers.experts import check_known
from peft_routing.fusion.generation import Ensemble, ensemble
from peft_routing.loading import base_of, check_routed, load_adapter_config, load_routed
from peft_routing.recipes import Distilling

TOP = 64
_IDS = "top_ids"
_VALUES = "top_log_probabilities"


def distil(
    adapter: str,
    data: Sequence[str],
    output: str,
    reading: Reading,
    recipe: Distilling,
    *,
    coefficients: Mapping[str, float] | None,
    beta: float,
    rank: int,
    learning_rate: float,
    base: str | None,
    weights: Mapping[str, float] | None,
    eval_data: Sequence[str],
    resume: bool,
    on_the_fly: bool,
) -> Losses:
    """Trains a LoRA to match the ensemble of a routed adapter's experts, and writes it to `output`.

    Returns each source's held-out divergence before and after, in nats per token; nothing in all
    but the main process. `UserError` for what cannot be trained or read.
    """
    run = Run(output, reading)
    measure = bool(recipe.held_out or eval_data)
    arguments = run.arguments(
        recipe,
        learning_rate=learning_rate,
        measure=measure,
        label_names=["labels"],
    )
    config = load_adapter_config(adapter)
    check_known(coefficients or {}, config.names, "coefficients")
    base, base_config = base_of(base, config, reading)
    if base_config.is_encoder_decoder:
        raise UserError(f"{base} is an encoder-decoder; ensembles of decoders alone are distilled")
    headers = check_routed(adapter, config, base, base_config, reading)
    tokenizer = load_tokenizer(base, reading)
    with arguments.main_process_first(desc="reading the data"):
        training, held_out = read_data(
            data,
            weights,
            eval_data,
            tokenizer,
            base_config,
            reading,
            recipe,
            completions_only=recipe.completions_only,
        )
    settings = {
        "adapter": adapter_fingerprint(adapter, adapter),
        "base_model": base,
        "base_weights": weights_fingerprint(weight_files(base)),
        "data": fingerprint(training),
        "held_out_data": {name: fingerprint(rows) for name, rows in held_out.items()},
        **asdict(recipe),
        "coefficients": dict(coefficients or {}),
        "beta": beta,
        "rank": rank,
        "learning_rate": learning_rate,
    }
    run.begin(settings, resume=resume)

    pad_token_id = padding_token(tokenizer, vocabulary_of(base_config))
    routed = load_routed(adapter, config, base, base_config, reading, headers=headers)
    mixture = ensemble(routed.to(arguments.device).eval(), coefficients, beta=beta)
    teacher: Ensemble | None = mixture
    if not on_the_fly:
        training, held_out = _with_targets_of_all(
            mixture,
            training,
            held_out,
            pad_token_id,
            recipe.per_device_eval_batch_size,
            is_hidden=reading.quiet or arguments.process_index > 0,
        )
        teacher = None
        del routed, mixture  # so that no two models are in memory

    model = load_model(base, base_config, reading, headers=headers, dtype="auto")
    student = _student(model, config.sites, rank, recipe.seed)
    size = checkpoint_bytes(student)
    run.check_room(size, size, arguments, len(training))
    trainer = Distillation(
        student,
        arguments,
        teacher=teacher,
        data_collator=lambda rows: _collated(rows, pad_token_id),
        train_dataset=training,
        eval_dataset=held_out or None,
    )
    run.train(trainer)
    losses = losses_before_and_after(trainer, held_out)
    run.check_converged(trainer, losses, "take a lower --learning-rate")
    run.end_group()
    if not run.is_main:
        return {}
    with run.finish() as directory:
        trainer.model.save_pretrained(str(directory))
        extend_card(directory, _card(data, recipe, losses, learning_rate))
    return losses


def _with_targets_of_all(
    mixture: Ensemble,
    training: Dataset,
    held_out: Mapping[str, Dataset],
    pad_token_id: int,
    batch_size: int,
    *,
    is_hidden: bool,
) -> tuple[Dataset, dict[str, Dataset]]:
    """All rows with what the ensemble expects after each token, under one bar unless that is
    hidden.
    """
    total = len(training) + sum(map(len, held_out.values()))
    measured = {}
    with tqdm(total=total, desc="the ensemble reads", unit="rows", disable=is_hidden) as bar:
        training = with_targets(mixture, training, pad_token_id, batch_size, bar=bar)
        for name, rows in held_out.items():
            measured[name] = with_targets(mixture, rows, pad_token_id, batch_size, bar=bar)
    return training, measured


def _student(model: Any, sites: Iterable[str], rank: int, seed: int) -> Any:
    """The base model with a new LoRA on the modules that the experts lie on."""
    targets = sorted({module.rpartition(".")[2] for module in sites})
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


@torch.no_grad()
def with_targets(
    mixture: Ensemble,
    rows: Dataset,
    pad_token_id: int,
    batch_size: int,
    top: int = TOP,
    *,
    bar: Any = None,
) -> Dataset:
    """The rows with what the ensemble expects after each token: the ids of the likeliest (tokens,
    top), and the logarithms of their probabilities.

    Each process reads its share of the rows, and gets what the others have read. `bar` shows how
    many rows are done.
    """
    state = PartialState()
    ids: list[Any] = []
    values: list[Any] = []
    # A batch per process at a time, so that little is under way between them.
    for start in range(0, len(rows), batch_size * state.num_processes):
        first = start + batch_size * state.process_index
        own = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        targets = gather_object(_targets_of_batch(mixture, own, pad_token_id, top))
        for of_ids, of_values in targets:
            ids.append(of_ids)
            values.append(of_values)
        if bar is not None:
            bar.update(len(targets))
    columns = rows.to_dict()
    return Dataset.from_dict({**columns, _IDS: ids, _VALUES: values})


def _targets_of_batch(
    mixture: Ensemble, rows: Sequence[Mapping[str, Any]], pad_token_id: int, top: int
) -> list[tuple[Any, Any]]:
    """For each row the ids of the likeliest and the logarithms of their probabilities, both
    (tokens, top), in NumPy; none where there are no rows.
    """
    if not rows:
        return []
    device = next(mixture.model.parameters()).device
    batch = collate([{"input_ids": row["input_ids"]} for row in rows], pad_token_id)
    logits = mixture(**{key: each.to(device) for key, each in batch.items()}).logits
    targets = []
    for row, of_row in zip(rows, logits, strict=True):
        ids, values = _likeliest(of_row[: len(row["input_ids"])], top)
        targets.append((ids.int().cpu().numpy(), values.cpu().numpy()))
    return targets


def _likeliest(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ids of the likeliest tokens (…, top), and the logarithms of their probabilities, of
    logits (…, vocabulary).
    """
    values, ids = logits.log_softmax(dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
    return ids, values


def kl_of_likeliest(logits: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """(tokens,): the divergence from logits (tokens, vocabulary) to probabilities of which only the
    likeliest are known, with all others as one event.

    Args:
        ids: (tokens, top), the likeliest.
        log_probabilities: (tokens, top), the logarithms of their probabilities.
    """
    own = logits.float().log_softmax(dim=-1).gather(-1, ids)
    probabilities = log_probabilities.exp()
    of_likeliest = (probabilities * (log_probabilities - own)).sum(dim=-1)
    if ids.shape[-1] == logits.shape[-1]:
        return of_likeliest
    rest = _log_of_rest(log_probabilities)
    return of_likeliest + rest.exp() * (rest - _log_of_rest(own))


def _log_of_rest(log_probabilities: Tensor) -> Tensor:
    """(tokens,): the logarithm of what probabilities lack of 1, at least of 1e-6."""
    whole = log_probabilities.logsumexp(dim=-1).clamp(max=-1e-6)
    return torch.log(-torch.expm1(whole))


class Distillation(TokenTrainer):
    """The Trainer, whose loss is the mean of `kl_of_likeliest` over the tokens of a step, whatever
    its batches and processes.

    teacher: the ensemble, which reads each batch again; None where the rows have its targets.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, teacher: Ensemble | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = teacher
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        sums, _ = self._of_rows(model, inputs)
        # The Trainer averages gradients over the processes: times their number it is the mean over
        # the tokens of all of them.
        loss = sums.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[None, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums, counts = self._of_rows(model, inputs)
        return None, sums, counts

    def _of_rows(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum of the divergences of each row's tokens, and their number, both (rows,)."""
        ids = inputs["input_ids"]
        logits = model(
            input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
        divergences = kl_of_likeliest(logits, *self._targets(inputs))
        # Where a token is to be predicted after this one.
        counted = torch.zeros_like(ids, dtype=torch.bool)
        counted[:, :-1] = inputs["labels"][:, 1:] != -100
        return divergences.masked_fill(~counted, 0).sum(dim=1), counted.sum(dim=1)

    def _targets(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the ensemble expects after each token: ids and log-probabilities (rows, tokens,
        top).
        """
        if self._teacher is None:
            return inputs[_IDS], inputs[_VALUES]
        ids = inputs["input_ids"]
        # As when it reads them beforehand: in its own dtype, whatever the student trains in.
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            output = self._teacher(input_ids=ids, attention_mask=inputs["attention_mask"])
        return _likeliest(output.logits, TOP)


def _collated(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch with the ensemble's targets, if rows have them, padded on the right as the tokens
    are.
    """
    names = [name for name in ("input_ids", "labels") if name in rows[0]]
    tokens = []
    for row in rows:
        tokens.append({name: row[name] for name in names})
    batch = collate(tokens, pad_token_id)
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for name in (_IDS, _VALUES) if _IDS in rows[0] else ():
        tensors = [torch.as_tensor(row[name]) for row in rows]
        batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return batch


def _card(
    data: Sequence[str], recipe: Distilling, losses: Losses, learning_rate: float
) -> list[str]:
    lines = [
        "## Distillation",
        "",
        f"From an ensemble, on {sources_in_markdown(data)}: {recipe.length}, "
        f"learning rate {learning_rate:g}, seed {recipe.seed}. The loss is the divergence from the "
        "ensemble, in nats per token.",
    ]
    if losses:
        lines += ["", before_and_after(losses, markdown=True)]
    return lines
