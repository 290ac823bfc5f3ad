"""Every variant of the kernels of losses and of batches, for `kernels.inspect`."""

from kernels import gan_bce_triton, gaussian_kl_triton, image_batch_triton
from kernels.inspect import Variant

# Element-passes: reads and writes of a tensor as large as the logits, or as the mean; of the
# Gaussian with a sample and without; for images in bytes, one read and a float written.
PASSES = {
    "loss_kernel": (1, 1),
    "gradient_kernel": (2, 2),
    "forward_kernel": (4, 2),
    "backward_kernel": (6, 4),
    "gather_kernel": (5, 5),
}


def variants() -> list[Variant]:
    """Each term and dtype of the adversarial losses, each dtype of the Gaussian KL, and common
    shapes of images."""
    found = []
    for module in (gan_bce_triton, gaussian_kl_triton, image_batch_triton):
        for name, kernel, types, constants, warps, aligned in module.variants():
            passes = PASSES[kernel.fn.__name__]["without sample" in name]
            constant = constants.get("KIND") == "linear" and "gradient" in name  # reads no logits
            stores = constant or kernel is image_batch_triton.gather_kernel  # floats of bytes
            wide = "STG" if stores else "LDG"
            found.append(Variant(name, kernel, types, constants, warps, aligned, wide, passes))
    return found
