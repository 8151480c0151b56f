"""Three tasks of the paper's three kinds, made of real texts, and texts to pretrain on.

    news        classification: the topic of an article, of five
    dictionary  extraction: the field that an entry is of, a part of its text, of twenty
    code        generation: the first line of a function's docstring, from the rest of it

A row has an `input`, which begins with the prompt of its task as in the paper (A.1), and a
`target`. No document is in two of the parts that are trained, validated and tested on.
"""

import ast
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from real_data import documents

Row = dict[str, str]
VALIDATION = 0.10  # share of the documents
TEST = 0.15
WORDS = 20  # of an input: the beginning of an article, an entry or a function
DOCSTRING_WORDS = range(3, 9)
# The twenty commonest of about a thousand, so that each has rows to learn it by.
FIELDS = (
    *("architecture", "body", "character", "communications", "company", "computer", "database"),
    *("hardware", "jargon", "language", "mathematics", "messaging", "networking"),
    *("operating system", "person", "processor", "programming", "storage", "tool", "web"),
)
SENTINELS = 10
CORRUPTED = 0.15  # share of the words that are hidden in pretraining, as in T5
SPAN = 3  # words that are hidden together, in the mean
METRICS = {"news": "accuracy", "dictionary": "exact_match", "code": "rouge_l"}
TASKS = tuple(METRICS)


@dataclass(frozen=True)
class Sizes:
    """The numbers of rows of the files, the same for each task.

    pretraining_words: the number of words of a row to pretrain on.
    """

    pretraining: int
    pretraining_words: int
    training: int
    validation: int
    test: int


def news_rows(name: str, article: str) -> Iterator[Row]:
    """An article and its topic, which is the folder that it lies in."""
    topic = Path(name).parent.name
    yield {"input": f"Classify: {_beginning(article)}", "target": topic}


def dictionary_rows(name: str, entry: str) -> Iterator[Row]:
    """An entry and its field, which stands in angle brackets; nothing of an entry of another field
    than the commonest.
    """
    context = _beginning(entry)
    field = re.search(r"<([^<>]+)>", context)
    if field and field[1] in FIELDS:
        yield {"input": f"Question: field? Context: {context}", "target": field[1]}


def code_rows(name: str, source: str) -> Iterator[Row]:
    """The functions of a file without their docstrings, and the first lines of these. Names are
    taken apart into their words, which docstrings are made of.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a file for another version of Python
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        first_line = (ast.get_docstring(node) or "").partition("\n")[0]
        if len(first_line.split()) in DOCSTRING_WORDS:
            del node.body[0]
            function = f"def {node.name}({ast.unparse(node.args)}): "
            function += " ".join(ast.unparse(statement) for statement in node.body)
            words = _beginning(function.replace("_", " "))
            yield {"input": f"Summarize: {words}", "target": _beginning(first_line)}


def _beginning(text: str) -> str:
    """The first words of a text, on one line."""
    return " ".join(text.split()[:WORDS])


ROWS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    "news": news_rows,
    "dictionary": dictionary_rows,
    "code": code_rows,
}


def write_texts(folder: Path, sizes: Sizes) -> None:
    """Writes the rows of all tasks and of the pretraining, unless it is done already.

    Of each task that is `<task>-train.jsonl`, `-validation` and `-test`; `pretraining.jsonl` has
    as many rows of each task's training documents.
    """
    if folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}")
    partial.mkdir(parents=True, exist_ok=True)
    corrupted = []
    for task in TASKS:
        parts = _parts(documents(task))
        counts = {
            "train": sizes.training,
            "validation": sizes.validation,
            "test": sizes.test,
        }
        for part, count in counts.items():
            rows: list[Row] = []
            for name, text in parts[part]:
                rows += ROWS[task](name, text)
            random.Random(0).shuffle(rows)
            _write_rows(partial / f"{task}-{part}.jsonl", rows[:count])
        texts = [text for _name, text in parts["train"]]
        corrupted += corrupted_rows(texts, sizes.pretraining // len(TASKS), sizes.pretraining_words)
    random.Random(0).shuffle(corrupted)
    _write_rows(partial / "pretraining.jsonl", corrupted)
    partial.rename(folder)


def _parts(texts: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """The documents of the three parts, with their names, in a random order that is always the
    same.
    """
    order = sorted(texts.items())
    random.Random(0).shuffle(order)
    validation = round(VALIDATION * len(order))
    test = validation + round(TEST * len(order))
    return {
        "validation": order[:validation],
        "test": order[validation:test],
        "train": order[test:],
    }


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))


def corrupted_rows(texts: Sequence[str], count: int, words: int) -> list[Row]:
    """At most `count` pieces of the texts, of so many words each, with spans of words hidden (T5's
    pretraining). The texts are read in turns, so that long ones do not push out the others.
    """
    generator = random.Random(0)
    rows: list[Row] = []
    start = 0
    while len(rows) < count:
        pieces = []
        for text in texts:
            piece = text.split()[start : start + words]
            if len(piece) == words:
                pieces.append(piece)
        if not pieces:
            break
        rows += [corrupted(piece, generator) for piece in pieces]
        start += words
    return rows[:count]


def corrupted(words: Sequence[str], generator: random.Random) -> Row:
    """The words with some spans replaced by `<extra_id_0>`, `<extra_id_1>` …, and these spans."""
    spans = max(1, round(CORRUPTED * len(words) / SPAN))
    # Each span lies somewhere in its own part of the text, so that no two of them touch.
    part = len(words) // spans
    shown = []
    hidden = []
    for span in range(spans):
        stop = len(words) if span == spans - 1 else (span + 1) * part
        of_part = words[span * part : stop]
        length = generator.randint(1, 2 * SPAN - 1)
        begin = generator.randint(1, max(1, part - length))
        sentinel = f"<extra_id_{span}>"
        shown += [*of_part[:begin], sentinel, *of_part[begin + length :]]
        hidden += [sentinel, *of_part[begin : begin + length]]
    hidden.append(f"<extra_id_{spans}>")
    return {"input": " ".join(shown), "target": " ".join(hidden)}


def write_tasks(
    path: Path,
    folder: Path,
    tasks: Sequence[str],
    answer_tokens: int,
    single_task_scores: dict[str, float] | None = None,
    measured: str = "validation",
) -> Path:
    """Writes the file that `--tasks` reads. `measured` is the part whose answers are measured."""
    document = {}
    for task in tasks:
        entry: dict[str, object] = {
            "data": str(folder / f"{task}-train.jsonl"),
            "eval_data": str(folder / f"{task}-{measured}.jsonl"),
            "prompt": "{input}",
            "target": "target",
            "metric": METRICS[task],
            "max_new_tokens": answer_tokens,
        }
        if single_task_scores:
            entry["single_task_score"] = single_task_scores[task]
        document[task] = entry
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path
