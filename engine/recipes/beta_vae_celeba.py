"""beta-VAE on CelebA, 64x64: ten latents, beta 10 on the KL.

Higgins et al. 2017, https://openreview.net/forum?id=Sy2fzU9gl. beta weighs the KL summed over
latents against half the squared error summed over pixels, both averaged over images: with means
instead of sums the same number would mean something else.

    python -m engine.train beta_vae_celeba

Measured, short of its full length: loss 297 after 48,000 images of a subset of 8,000, at 1,831
images/s on two cores of an AMD EPYC (Zen 5) without GPU.
"""

from engine.networks import vae
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.autoencoder import Variational
from pipelines.settings import Data

ADAM = Adam(lr=1e-4, betas=(0.9, 0.999))
NETWORK = vae.Convolutional(latent=10, widths=(32, 32, 64, 64))


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="celeba", resolution=64, channels=3, batch=64, flip=True),
        step=Variational(autoencoder=PlayerSettings(NETWORK, ADAM), pixels="gaussian", beta=10.0),
        length=Length(epochs=50),
        outputs=Outputs(log_every=5, sample_every=100, checkpoint_every=100),
    )
