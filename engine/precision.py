"""Which dtype the forward passes compute in, decided once with its reason."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from launch.environment import accelerate_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Autocast policy: parameters, optimizer and losses stay float32."""

    name: str
    reason: str
    device_type: str

    def autocast(self) -> AbstractContextManager:
        """Context in which forward passes run."""
        dtype = DTYPES[self.name]
        return torch.autocast(self.device_type, dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling, which fp16's small exponent range needs and the others do not."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None


def has_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether the device multiplies bf16 in hardware, and what tells so."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    if torch.cpu._is_amx_tile_supported():
        return True, "CPU with AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "CPU with AVX512-BF16"
    return False, "CPU without bf16 instructions"


def choose_precision(setting: str, device: torch.device) -> Precision:
    """The policy for a setting (auto, fp32, bf16, fp16); auto takes what accelerate was told, if it
    was. Raises ValueError for fp16 on a CPU, and for what only accelerate knows."""
    reason = "as asked"
    if setting == "auto" and (wanted := accelerate_precision()):
        setting, reason = wanted, "accelerate's mixed_precision"
    if setting == "fp16" and device.type != "cuda":
        raise ValueError(
            "precision=fp16 is for GPUs only (a CPU is some hundred times slower in it); "
            "use --precision bf16 or --precision fp32"
        )
    if setting not in ("auto", *DTYPES):
        raise ValueError(f"{reason} {setting} is not known here; use --precision bf16")
    if setting != "auto":
        return Precision(setting, reason, device.type)
    supported, hardware = has_bf16(device)
    return Precision("bf16" if supported else "fp32", hardware, device.type)
