"""PixelRNN on binary MNIST, 28x28: seven Row LSTM layers of 16 units, exact likelihood.

van den Oord, Kalchbrenner and Kavukcuoglu 2016, https://arxiv.org/abs/1601.06759, section 3 and
table 1; batch 16 as in section 5.1. The paper gives 80.54 nats for its Row LSTM (table 4) without
its size, so layers and units are those of its best Diagonal BiLSTM. It has RMSProp at rates set by
hand, skip connections to the output and one fixed binary MNIST; here Adam, residual connections
alone, and binary draws made anew from the grey images (of test images the same ones each time).

    python -m engine.train pixelrnn_mnist

Measured, short of its full size and length: test NLL 87.9 nats (0.162 bits a pixel; independent
pixels: 205.8) and many samples readable as digits with three layers at 2e-3 after 36,000 images,
0.6 of an epoch, in 17 minutes on one thread of 2 shared, busy cores of an Intel Xeon without GPU.
"""

from engine.networks.pixelrnn import PixelRNN
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.autoregressive import Autoregressive
from pipelines.settings import Data

ADAM = Adam(lr=2e-3, betas=(0.9, 0.999), decay_kimg=1000)
NETWORK = PixelRNN(layers=7, hidden=16, head=32)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="mnist", resolution=28, channels=1, batch=16),
        step=Autoregressive(model=PlayerSettings(NETWORK, ADAM, clip=1.0)),
        length=Length(epochs=50),
        outputs=Outputs(log_every=6, sample_every=60, checkpoint_every=60),
    )
