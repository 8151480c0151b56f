"""What fusions answer to the prompts of tasks, beside the loss: `compare --metric`.

A task's rows have the prompt and the right answer as `--completions-only` reads them. What a
subject answers is kept in the cache, and is not generated again.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _mergekit_moe_ext_common.checkpoints import damage
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.generation import answers_to
from _mergekit_moe_ext_common.metrics import score_of
from _mergekit_moe_ext_common.staging import new_file
from peft_routing.fusion.cache import Cache, Subject, Texts, for_each
from peft_routing.fusion.candidates import Candidate
from peft_routing.fusion.report import Row
from peft_routing.fusion.rows import subject_of

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """The prompts of one task's test, and the right answers.

    prompts: the token ids of each.
    longest: the number of tokens of the longest right answer, which bounds what is generated.
    """

    texts: Texts
    prompts: list[list[int]]
    references: list[str]
    longest: int

    @classmethod
    def of(
        cls, texts: Texts, tokenizer: Any, *, is_encoder_decoder: bool, max_length: int | None
    ) -> "Questions":
        """The questions of rows that have labels.

        Rows of which nothing is left to answer are left out. A warning says so, and where rows are
        so long that their right answers may have been cut. `UserError` where no row is left, and
        for a prompt of no tokens.
        """
        prompts = []
        answers = []
        cut = 0
        for row in texts.rows:
            answer = [label for label in row["labels"] if label != -100]
            if not answer:
                continue
            prompt = row["input_ids"]
            if not is_encoder_decoder:
                prompt = prompt[: -len(answer)]  # the answer comes last in the same row
            if not prompt:
                raise UserError(
                    f"task {texts.task!r}, {texts.split}: a prompt has no token, and a decoder has "
                    "nothing to go on from: put words before the answer, or take the row out"
                )
            prompts.append(prompt)
            answers.append(answer)
            if max_length is not None and len(row["labels"]) >= max_length:
                cut += 1
        if not prompts:
            raise UserError(f"task {texts.task!r}, {texts.split}: there is no answer to generate")
        left_out = len(texts.rows) - len(prompts)
        if left_out or cut:
            LOG.warning(
                "task %r, %s: of %d rows %d are left out, since nothing of their answers is left "
                "within --max-length, and %d are as long as that: their answers may be cut",
                texts.task,
                texts.split,
                len(texts.rows),
                left_out,
                cut,
            )
        references = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return cls(texts, prompts, references, max(map(len, answers)))


def scored(
    rows: Sequence[Row],
    metric: str,
    questions: Sequence[Questions],
    cache: Cache,
    experts: Mapping[str, str],
    candidates: Mapping[str, Candidate],
    load_base: Callable[[], Any],
    tokenizer: Any,
    pad_token_id: int,
    *,
    batch_size: int,
    quiet: bool,
) -> list[Row]:
    """The rows with the score of each task's answers.

    What is not in the cache is generated, on as many processes as accelerate has started.
    `UserError` where the metric returns no number.
    """
    of_rows = []
    for row in rows:
        of_rows.append(
            [subject_of(row, experts, candidates, each.texts.task) for each in questions]
        )
    by_task = {each.texts.task: each for each in questions}

    def answer_and_keep(model: Any, subject: Subject, texts: Texts, bar: Any) -> None:
        asked = by_task[texts.task]
        numbers = range(len(asked.prompts))
        answers = answers_to(
            model,
            tokenizer,
            asked.prompts,
            numbers,
            pad_token_id=pad_token_id,
            max_new_tokens=asked.longest,
            batch_size=batch_size,
        )
        bar.update(len(texts.rows))
        with new_file(_file(cache, subject, asked)) as partial:
            partial.write_text(json.dumps([answers[number] for number in numbers]))

    for_each(_lacking(of_rows, questions, cache), answer_and_keep, load_base, quiet=quiet)
    with_scores = []
    for row, subjects in zip(rows, of_rows, strict=True):
        scores = []
        for subject, each in zip(subjects, questions, strict=True):
            answers = _read(_file(cache, subject, each), len(each.prompts))
            scores.append(score_of(metric, answers, each.references))
        with_scores.append(replace(row, scores=scores))
    return with_scores


def _lacking(
    of_rows: Sequence[Sequence[Subject]], questions: Sequence[Questions], cache: Cache
) -> list[tuple[Subject, list[Texts]]]:
    """The subjects whose answers the cache lacks, each with the texts that it is yet to answer.

    of_rows: by row the subject that answers each task's questions. Several rows may have the same.
    """
    subject_by_fingerprint: dict[str, Subject] = {}
    texts_by_fingerprint: dict[str, dict[Path, Texts]] = {}
    for subjects in of_rows:
        for subject, each in zip(subjects, questions, strict=True):
            file = _file(cache, subject, each)
            if not file.exists():
                subject_by_fingerprint[subject.fingerprint] = subject
                texts_by_fingerprint.setdefault(subject.fingerprint, {})[file] = each.texts
    lacking = []
    for fingerprint, texts in texts_by_fingerprint.items():
        lacking.append((subject_by_fingerprint[fingerprint], list(texts.values())))
    return lacking


def _file(cache: Cache, subject: Subject, questions: Questions) -> Path:
    """The file of a subject's answers to a task's prompts."""
    measured = cache.path(subject, questions.texts)
    return measured.with_name(f"{measured.stem}.answers-{questions.longest}.json")


def _read(file: Path, count: int) -> list[str]:
    """The answers in a file. `UserError` where it does not hold so many."""
    remedy = "remove it, and they are generated again"
    try:
        answers = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{damage(file, error)}; {remedy}") from error
    is_whole = isinstance(answers, list) and all(isinstance(each, str) for each in answers)
    if not is_whole or len(answers) != count:
        raise UserError(f"{file} does not hold {count} answers; {remedy}")
    return answers
