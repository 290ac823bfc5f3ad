"""How an image is cut and made smaller: the centre, and as Pillow does it."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.images import Fit


def test_fit_crops_the_centre_and_resizes():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[5:15, 10:20] = 200
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    image = content.getvalue()
    assert (Fit(10, 3, crop=10)(image, "x") == 200).all()
    assert (Fit(4, 1, crop=10)(image, "x") == 200).all()
    assert Fit(20, 3)(image, "x").shape == (20, 20, 3)  # the largest centred square
    assert Fit(20, 3)(image, "x")[5:15, 5:15].min() == 200
    assert Fit(5, 3)(image, "x", (10, 5, 20, 15)).min() == 200  # of the box alone
    with pytest.raises(ValueError, match=r"data\.crop=21 is larger than x \(30x20\)"):
        Fit(4, 1, crop=21)(image, "x")


@pytest.mark.parametrize("size", [(178, 218), (89, 109), (500, 375), (40, 64)])
def test_resizing_is_pillows_to_one_level(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=90)
    got = Fit(64, 3)(content.getvalue(), "x").astype(int)
    with Image.open(content) as image:
        left, top = (image.width - min(size)) // 2, (image.height - min(size)) // 2
        square = image.crop((left, top, left + min(size), top + min(size)))
        wanted = np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(got - wanted).max() <= 1 and np.abs(got - wanted).mean() < 0.05
