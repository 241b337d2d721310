"""Reading one image file as it looks when it is viewed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .cartoon import HEIGHT, WIDTH


def read_face(file: Path) -> np.ndarray:
    """The image as grey levels, cropped to the middle and resized: `[HEIGHT, WIDTH]` uint8.

    Upright by its EXIF orientation; 16 and 32 bits a pixel brought to 8; what is transparent over white; the first
    of several frames.

    Raises:
        Exception: whatever Pillow's reader of that format raises.
    """
    # Opened here: given a name, Pillow 13.0 maps an uncompressed TIFF into memory, with width and height swapped where
    # its orientation is 5 to 8
    with open(file, "rb") as stream, Image.open(stream) as image:
        format = image.format
        grey = _grey(ImageOps.exif_transpose(image), format)
    return np.asarray(ImageOps.fit(grey, (WIDTH, HEIGHT), method=Image.Resampling.BOX))


def _grey(image: Image.Image, format: str | None) -> Image.Image:
    """Any mode of Pillow → mode "L"."""
    if image.mode[0] in "IF":
        return _from_deep(image, format)
    if image.mode == "LAB":
        from PIL import ImageCms  # an optional part of Pillow

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB").convert("L")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("L")


def _from_deep(image: Image.Image, format: str | None) -> Image.Image:
    """Modes I;16 (16 bits), I (32) and F (floating point). Pillow's own conversion cuts everything above 255 off."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)  # [H, W]
    if image.mode.startswith("I;16") or (format in ("PNG", "PPM") and image.mode == "I"):
        white = 65535.0
    else:  # the file does not say what is white: the smallest of the usual values that no pixel exceeds
        white = next((white for white in (1.0, 255.0, 65535.0) if values.max() <= white), values.max())
    grey = (values.clip(0, white) * (255 / white)).round().astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
