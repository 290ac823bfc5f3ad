"""Every variant of the losses' kernels, for `kernels.inspect`."""

from kernels import gan_bce_triton, gaussian_kl_triton
from kernels.inspect import Variant

# Element-passes: reads and writes of a tensor as large as the logits, or as the mean; of the
# Gaussian with a sample and without.
PASSES = {
    "loss_kernel": (1, 1),
    "gradient_kernel": (2, 2),
    "forward_kernel": (4, 2),
    "backward_kernel": (6, 4),
}


def variants() -> list[Variant]:
    """Each term and dtype of the adversarial losses, and each dtype of the Gaussian KL."""
    found = []
    for module in (gan_bce_triton, gaussian_kl_triton):
        for name, kernel, types, constants, warps, aligned in module.variants():
            passes = PASSES[kernel.fn.__name__]["without sample" in name]
            constant = constants.get("KIND") == "linear" and "gradient" in name  # reads no logits
            wide = "STG" if constant else "LDG"
            found.append(Variant(name, kernel, types, constants, warps, aligned, wide, passes))
    return found
