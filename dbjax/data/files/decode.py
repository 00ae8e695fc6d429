"""One image file -> one square of pixels, by Pillow (extra `images`)."""

from typing import Any

import numpy as np

from dbjax.data.files.opening import Path, need

FITS = ("crop", "stretch")


def decode(path: Path, size: int, fit: str) -> np.ndarray:
    """Read an image and bring it to `size` by `size` pixels of three colours.

    Grey images get three equal colours, palettes are looked up, 16 bits become 8, and
    what is transparent lies on black. Pixels are averaged where the image shrinks. It
    is not turned, whatever its EXIF says.

    Args:
        path: of the file, of any format that Pillow reads.
        size: pixels on a side.
        fit: "crop" takes the largest square in the middle, "stretch" all of the image,
          however long it is.

    Returns:
        `[size, size, 3]` uint8.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: it is not an image, or is cut off.
    """
    image_lib = need("PIL.Image", "reading images", "images")
    try:
        with image_lib.open(path) as image:
            # A JPEG is decoded at half, a quarter or an eighth, if that is enough.
            scale = size / min(image.size)
            image.draft("RGB", tuple(-int(-side * scale // 1) for side in image.size))
            if fit == "crop":  # first, so that no pixel beyond the square is averaged
                short = min(image.size)
                left, top = ((side - short) // 2 for side in image.size)
                square = image.crop((left, top, left + short, top + short))
            else:
                square = image
            square = _colours(image_lib, square).resize(
                (size, size), image_lib.Resampling.BILINEAR
            )
            return np.asarray(square)
    except FileNotFoundError:
        raise
    except Exception as error:  # each of Pillow's readers has its own kinds
        with open(path, "rb") as file:
            head, length = file.read(8), file.seek(0, 2)
        raise ValueError(
            f"{path} is not an image that Pillow reads, or is cut off ({error}); it "
            f"has {length:,} bytes and begins with {head!r}"
        ) from error


def _colours(image_lib: Any, image: Any) -> Any:
    """Give the image in red, green and blue."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        image = image_lib.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = image_lib.new("RGBA", image.size, (0, 0, 0, 255))
        image = image_lib.alpha_composite(black, image)
    return image if image.mode == "RGB" else image.convert("RGB")
