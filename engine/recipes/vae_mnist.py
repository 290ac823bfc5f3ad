"""VAE on MNIST: 784-400-20, binary cross-entropy on grey targets.

Kingma and Welling 2014, https://arxiv.org/abs/1312.6114, with Adam in place of Adagrad.

    python -m engine.train vae_mnist

Measured: test ELBO -105.7 and -105.5 nats (seeds 0, 1) after 10 epochs, in about a minute on one
thread of 2 shared cores of an AMD EPYC (Zen 5) without GPU.
"""

from engine.networks import vae
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.autoencoder import Variational
from pipelines.settings import Data

ADAM = Adam(lr=2e-3, betas=(0.9, 0.999), decay_kimg=400)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="mnist", resolution=28, channels=1, batch=100),  # batch: paper, section 5
        step=Variational(
            autoencoder=PlayerSettings(vae.Dense(hidden=400, latent=20), ADAM),
            pixels="bernoulli",
        ),
        length=Length(epochs=10),
        outputs=Outputs(log_every=12, sample_every=60, checkpoint_every=120),
    )
