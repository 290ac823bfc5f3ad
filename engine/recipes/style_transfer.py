"""Style transfer: any image in the style of any other, by AdaIN.

Huang and Belongie 2017, https://arxiv.org/abs/1703.06868, section 6.1: images resized to 512, crops
of 256, batch 8, Adam 1e-4, 160,000 iterations as in the authors' code. They train on MS-COCO and
80,000 paintings of WikiArt, with VGG19's weights, which --vgg gives.

    python -m engine.train style_transfer
    python -m engine.train style_transfer --vgg vgg19-dcbb9e9d.pth
    python -m engine.train style_transfer --data.path FOLDER
    python -m engine.translate RUN_DIR INPUT... --style IMAGE --out DIR

FOLDER holds content/ and style/ (links will do), each with images, or with train/ and test/.
Not yet trained to its end.
"""

from engine.networks.adain import StylerSizes
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.stylising import Stylising
from pipelines.settings import Data


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="style_transfer", resolution=256, channels=3, batch=8, load=512),
        step=Stylising(
            styler=PlayerSettings(StylerSizes(), Adam(lr=1e-4, betas=(0.9, 0.999))),
        ),
        length=Length(steps=160_000),
        outputs=Outputs(samples=16, sample_every=20, checkpoint_every=20),
    )
