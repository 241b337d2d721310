"""Image files of every kind that Pillow writes, each made from a look that is known."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

HEIGHT, WIDTH = 56, 46  # what the example crops to: a file of this size is compared pixel by pixel
# How a file stores what is to be seen upright, by the EXIF orientation that says so (EXIF 2.32, tag 0x0112)
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: seen.swapaxes(0, 1)[::-1],  # "6: rotate by 90° clockwise to view"
    7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),
    8: lambda seen: seen.swapaxes(0, 1)[:, ::-1],
}


class Kind(NamedTuple):
    """A way to store a picture."""

    suffix: str
    mode: str  # of Pillow, when it is opened
    store: Callable[[np.ndarray], tuple[Image.Image, np.ndarray]]  # colours [H, W, 3] → the image, what it shows
    apart: float = 1  # mean difference in grey levels that the format and its colour space may cost
    options: dict | None = None  # of Image.save
    oriented: bool = False  # holds EXIF


def colours(seed: int) -> np.ndarray:
    """A smooth coloured picture without symmetry, `[HEIGHT, WIDTH, 3]` uint8."""
    few = np.random.default_rng(seed).integers(0, 256, (7, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(few).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def luma(seen: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, `[..., 3]` → `[...]`, 0 … 255, not rounded."""
    return seen.astype(np.float64) @ [0.299, 0.587, 0.114]


def _rgb(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    return Image.fromarray(np.ascontiguousarray(seen)), luma(seen)


def _grey(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    image = Image.fromarray(luma(seen).round().astype(np.uint8))
    return image, np.asarray(image)


def _bits(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    bright = luma(seen) > 128
    return Image.fromarray((bright * 255).astype(np.uint8)).convert("1"), bright * 255


def _palette(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    image = Image.fromarray(np.ascontiguousarray(seen)).quantize(64)
    return image, luma(np.asarray(image.getpalette()).reshape(-1, 3)[np.asarray(image)])


def _palette_with_hole(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    image, shown = _palette(seen)
    image.info["transparency"] = 0
    return image, np.where(np.asarray(image) == 0, 255, shown)


def _alpha(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    alpha = np.linspace(0, 255, seen.shape[1]).round().astype(np.uint8)[None].repeat(len(seen), 0)
    image = Image.fromarray(np.dstack((seen, alpha)))
    return image, 255 + (luma(seen) - 255) * (alpha / 255)


def _grey_alpha(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    image, shown = _alpha(luma(seen).round()[..., None].repeat(3, 2).astype(np.uint8))
    return image.convert("LA"), shown


def _deep(dtype: type, white: float) -> Callable[[np.ndarray], tuple[Image.Image, np.ndarray]]:
    def store(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        shown = luma(seen)
        shown[0, 0] = 255  # white is there, where a file does not say what it is
        values = shown * (white / 255)
        return Image.fromarray((values.round() if white > 1 else values).astype(dtype)), shown

    return store


def _as(mode: str) -> Callable[[np.ndarray], tuple[Image.Image, np.ndarray]]:
    return lambda seen: (Image.fromarray(np.ascontiguousarray(seen)).convert(mode), luma(seen))


def _lab(seen: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    from PIL import ImageCms

    rgb = Image.fromarray(np.ascontiguousarray(seen))
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB"), luma(seen)


def _kinds() -> dict[str, Kind]:
    lossless = {"lossless": True, "exact": True}
    kinds = {
        "png 1": Kind(".png", "1", _bits, oriented=True),
        "png L": Kind(".png", "L", _grey, oriented=True),
        "png LA": Kind(".png", "LA", _grey_alpha, oriented=True),
        "png P": Kind(".png", "P", _palette, oriented=True),
        "png P with a hole": Kind(".png", "P", _palette_with_hole, options={"transparency": 0}, oriented=True),
        "png RGB": Kind(".png", "RGB", _rgb, oriented=True),
        "png RGBA": Kind(".png", "RGBA", _alpha, oriented=True),
        "png 16 bits": Kind(".png", "I;16", _deep(np.uint16, 65535), oriented=True),
        "jpeg L": Kind(".jpg", "L", _grey, 3, {"quality": 95}, True),
        "jpeg RGB": Kind(".jpeg", "RGB", _rgb, 3, {"quality": 95, "subsampling": 0}, True),
        "jpeg CMYK": Kind(".jpg", "CMYK", _as("CMYK"), 3, {"quality": 95, "subsampling": 0}, True),
        "tiff 1": Kind(".tif", "1", _bits, oriented=True),
        "tiff L": Kind(".tif", "L", _grey, oriented=True),
        "tiff P": Kind(".tiff", "P", _palette, oriented=True),
        "tiff RGB": Kind(".tiff", "RGB", _rgb, options={"compression": "tiff_lzw"}, oriented=True),
        "tiff RGBA": Kind(".tiff", "RGBA", _alpha, oriented=True),
        "tiff CMYK": Kind(".tif", "CMYK", _as("CMYK"), oriented=True),
        "tiff LAB": Kind(".tif", "LAB", _lab, 3, oriented=True),
        "tiff 16 bits": Kind(".tif", "I;16", _deep(np.uint16, 65535), oriented=True),
        "tiff 32 bits": Kind(".tif", "I", _deep(np.int32, 2**31 - 1), oriented=True),
        "tiff float": Kind(".tif", "F", _deep(np.float32, 1), oriented=True),
        "tiff float to 255": Kind(".tif", "F", _deep(np.float32, 255), oriented=True),
        "bmp 1": Kind(".bmp", "1", _bits),
        "bmp L": Kind(".bmp", "L", _grey),
        "bmp P": Kind(".bmp", "P", _palette),
        "bmp RGB": Kind(".bmp", "RGB", _rgb),
        "gif": Kind(".gif", "P", _palette),
        "pbm": Kind(".pbm", "1", _bits),
        "pgm": Kind(".pgm", "L", _grey),
        "pgm 16 bits": Kind(".pgm", "I", _deep(np.int32, 65535)),
        "ppm": Kind(".ppm", "RGB", _rgb),
        "tga RGBA": Kind(".tga", "RGBA", _alpha),
        "pcx": Kind(".pcx", "RGB", _rgb),
        "sgi": Kind(".sgi", "RGB", _rgb),
        "png named jpg": Kind(".jpg", "RGB", _rgb, options={"format": "PNG"}),
        "png without a suffix": Kind("", "L", _grey, options={"format": "PNG"}),
    }
    if ".pfm" in Image.registered_extensions():  # Pillow 10.1 knows none
        kinds["pfm"] = Kind(".pfm", "F", _deep(np.float32, 1), options={"format": "PPM"})
    if features.check("webp"):
        kinds["webp"] = Kind(".webp", "RGB", _rgb, options=lossless, oriented=True)
        kinds["webp RGBA"] = Kind(".webp", "RGBA", _alpha, options=lossless, oriented=True)
    if features.check("jpg_2000"):
        kinds["jpeg 2000"] = Kind(".jp2", "RGB", _rgb)
    if features.check("avif"):
        kinds["avif"] = Kind(".avif", "RGB", _rgb, 4, {"quality": 95}, True)
    return kinds


KINDS = _kinds()


def write(path: Path, kind: Kind, seed: int, orientation: int = 1) -> np.ndarray:
    """Writes an image file and returns the grey levels that it shows, `[HEIGHT, WIDTH]` float64."""
    image, shown = kind.store(np.ascontiguousarray(STORED[orientation](colours(seed))))
    upright = {6: 8, 8: 6}.get(orientation, orientation)  # a quarter turn is undone by the opposite one
    options = dict(kind.options or {})
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    content = io.BytesIO()  # Pillow cannot write a TIFF into a file whose name is not UTF-8
    image.save(content, options.pop("format", None) or Image.registered_extensions()[kind.suffix], **options)
    path.write_bytes(content.getvalue())
    return STORED[upright](shown.astype(np.float64))


def spoil(path: Path, seed: int) -> None:
    """Cuts the file short, or overwrites bytes of it."""
    dice, content = random.Random(seed), bytearray(path.read_bytes())
    if dice.random() < 0.5:
        content = content[: dice.randrange(len(content))]
    else:
        for _ in range(8):
            content[dice.randrange(len(content))] = dice.randrange(256)
    path.write_bytes(content)
