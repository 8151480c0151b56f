"""Outputs: what may be written where, and what of a model's directory is taken along."""

import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import snapshot_download

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import (
    check_new_file,
    check_output,
    check_room,
    copy_files,
    model_folder,
    new_file,
    staged,
)

LONGEST = 255  # bytes of a name, on the usual file systems


def names_in(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_place_where_no_file_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused = {
        tmp_path / "file": "exists and is not overwritten",
        tmp_path / "dangling": "exists and is not overwritten",
        tmp_path / "none" / "file": "there is no directory",
        tmp_path / "file" / "file": "there is no directory",
        tmp_path / ("é" * 128): "File name too long",
    }
    if Path("/proc/self").is_dir():
        refused["/proc/self/usage.json"] = "not a directory that you may write to"
    for path, complaint in refused.items():
        with pytest.raises(UserError, match=complaint):
            check_new_file(tmp_path / path)
    assert names_in(tmp_path) == ["dangling", "file"]


def test_a_file_of_the_longest_name_is_written(tmp_path):
    path = tmp_path / ("u" * (LONGEST - 5) + ".json")
    check_new_file(path)
    with new_file(path) as partial:
        partial.write_text("{}")
        assert not path.exists() and partial.suffix == ".json"
    assert names_in(tmp_path) == [path.name] and path.read_text() == "{}"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("before")
    with pytest.raises(RuntimeError), new_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    with pytest.raises(UserError, match=r"cannot write .*file\.json: No space"), new_file(path):
        raise OSError(28, "No space left on device")
    assert names_in(tmp_path) == ["file.json"] and path.read_text() == "before"


def test_a_place_where_no_directory_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    refused = {
        "file": "is a file",
        "pipe": "is a file",
        "file/out": "not a directory that you may write to",
        # Its own name would fit; that of the directory that it is written to first does not.
        "o" * (LONGEST - 10): "File name too long",
    }
    for name, complaint in refused.items():
        with pytest.raises(UserError, match=complaint):
            check_output(str(tmp_path / name))
    out = check_output(str(tmp_path / "new" / ("o" * 200)))
    with staged(out) as directory:
        (directory / "model").touch()
    assert (out / "model").exists()


def test_room_is_wanted_for_checkpoints_too(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "out", free // 4, free // 4)
    with pytest.raises(UserError, match=r"the output takes .* GB and its checkpoints .* GB, but"):
        check_room(tmp_path / "out", free // 4, free)


@pytest.fixture
def model(tmp_path):
    """A working directory of a model, with what lies about in such."""
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)
    (directory / "logs").mkdir()
    for name in (*KNOWN, *UNKNOWN):
        (directory / name).write_text(name)
    return directory


KNOWN = (
    "LICENSE",
    "LICENSE.md",
    "LICENSE-MIT.txt",
    "NOTICE",
    "README.md",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.4.0.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
UNKNOWN = (
    ".env",
    ".model-trained.partial-lock",
    "LICENSE.csv",
    "additional_chat_templates/rows.csv",
    "adapter_config.json",
    "config.json",
    "credentials.json",
    "id_rsa",
    "logs/events",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_other.py",
    "optimizer.pt",
    "tokenizer.lock.json",
    "train.csv",
    "training_args.bin",
    "vocab.pkl",
    "weights.bin",
)


def test_what_belongs_to_a_model_is_copied_and_nothing_else(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    copy_files(model, out)
    copied = [name for name in names_in(out) if (out / name).is_file()]
    assert copied == sorted(KNOWN)
    assert all((out / name).read_text() == name for name in copied)


def test_a_tokenizer_names_further_files_of_its_own(model, tmp_path):
    class Tokenizer:
        vocab_files_names: ClassVar = {"vocab_file": "my.vocabulary", "other": "../secret"}

    (model / "my.vocabulary").touch()
    (tmp_path / "secret").touch()
    out = tmp_path / "out"
    out.mkdir()
    copy_files(model, out, Tokenizer)
    assert (out / "my.vocabulary").exists() and not (tmp_path / "out" / "secret").exists()
    assert not list(out.rglob("secret"))


def test_no_link_is_followed_out_of_the_model(model, tmp_path, caplog):
    (tmp_path / "id_rsa").write_text("a key")
    (tmp_path / "tokenizer.json").write_text("another key")
    (model / "real").mkdir()
    (model / "real" / "vocab.json").write_text("words")
    links = {
        "LICENSE": tmp_path / "id_rsa",
        "tokenizer.json": tmp_path / "tokenizer.json",
        "NOTICE": model / ".env",  # inside, but nothing that would be copied under its own name
        "vocab.json": model / "real" / "vocab.json",
        "merges.txt": model / "real",
        "additional_chat_templates/tool_use.jinja": tmp_path / "id_rsa",
    }
    for name, target in links.items():
        (model / name).unlink()
        (model / name).symlink_to(target)
    (model / "spiece.model").unlink()
    os.mkfifo(model / "spiece.model")
    out = tmp_path / "out"
    out.mkdir()
    copy_files(model, out)
    left_out = {*links, "spiece.model"} - {"vocab.json"}
    copied = {name for name in names_in(out) if (out / name).is_file()}
    assert copied == set(KNOWN) - left_out
    assert (out / "vocab.json").read_text() == "words"
    assert all(f"{model / name} is not copied" in caplog.text for name in left_out)


def test_a_model_is_copied_through_a_link_to_its_directory(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    out = tmp_path / "out"
    out.mkdir()
    copy_files(model_folder(str(tmp_path / "link")), out)
    assert (out / "tokenizer.json").exists()


@pytest.fixture
def cached(tmp_path):
    """A cache of the Hub: files of a snapshot are links to blobs, one of them shared."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    for directory in (snapshot, repository / "blobs", repository / "refs", shared.parent):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "blobs" / "123").write_text("tokenizer")
    shared.write_text("words")
    (repository / "blobs" / "456").symlink_to("../../blobs/ab/" + "ab" * 32)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    (snapshot / "vocab.json").symlink_to("../../blobs/456")
    (tmp_path / "secret").write_text("a key")
    (snapshot / "LICENSE").symlink_to("../../../../secret")
    return tmp_path / "hub"


def test_a_snapshot_of_the_hub_is_copied(cached, tmp_path):
    snapshot = model_folder("owner/name", cache_dir=str(cached))
    assert snapshot == type(snapshot)(
        snapshot_download("owner/name", cache_dir=cached, local_files_only=True)
    )
    out = tmp_path / "out"
    out.mkdir()
    copy_files(snapshot, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "tokenizer.json": "tokenizer",
        "vocab.json": "words",
    }
    assert not any(path.is_symlink() for path in out.iterdir())


def test_every_tokenizer_of_transformers_finds_its_files(tmp_path):
    """What the installed transformers' tokenizers call their files, whichever they are."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    wanted = set()
    for name in {name for name in TOKENIZER_MAPPING_NAMES.values() if name}:
        try:
            wanted |= set(getattr(transformers, name).vocab_files_names.values())
        except (AttributeError, ImportError):
            continue
    assert len(wanted) > 15
    model = tmp_path / "model"
    model.mkdir()
    for name in wanted:
        (model / name).touch()
    (tmp_path / "out").mkdir()
    copy_files(model, tmp_path / "out")
    assert names_in(tmp_path / "out") == sorted(wanted)
