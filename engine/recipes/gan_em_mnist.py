"""GAN-EM on MNIST: ten clusters of digits, found without labels.

Zhao et al. 2019, https://arxiv.org/abs/1812.00335; `engine.steps.gan_em` says what an iteration is
and what differs from the authors' code. Labels serve to measure the clusters alone.

    python -m engine.train gan_em_mnist

Measured: clustering accuracy 0.724 and 0.700, NMI 0.702 and 0.723 (seeds 0, 1) on the test split at
200,000 images, where k-means of the training pixels has 0.603 and 0.560, 0.542 and 0.503 (seeds 0,
1). One cluster each for 0, 1, 2, 6 and 7 with seed 0; 4 and 9 share two, 3, 5 and 8 three. Digits
are readable by eye, with stray pixels. 477 and 274 s on one thread of 2 shared cores of an Intel
Xeon without GPU, --compile off.
"""

from engine.networks import gan_em
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.gan_em import ExpectationMaximisation
from pipelines.settings import Data

# With an E-net at half this rate, updated half as often, from images without affine maps, seed 0
# had 0.49 after 100k images and 0.52 after 150k; with them 0.69 and more.
ADAM = Adam(lr=1e-3, betas=(0.0, 0.99), decay_kimg=100)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="mnist", resolution=28, channels=1, batch=64),
        step=ExpectationMaximisation(
            generator=PlayerSettings(gan_em.Generator(), ADAM, ema_kimg=10),
            discriminator=PlayerSettings(gan_em.Discriminator(), ADAM),
            encoder=PlayerSettings(gan_em.Encoder(width=16, hidden=128), ADAM),
            r1=0.5,
        ),
        length=Length(kimg=200),
        outputs=Outputs(log_every=10, sample_every=40, checkpoint_every=100),
    )
