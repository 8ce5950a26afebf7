"""Operations of a training step, and the share of a GPU's peak that they use (model FLOP utilisation, MFU).

    operations of a token = 6 P        MFU = operations of a token x tokens a second / peak

P counts the parameters that multiply a token: all but the embedding, which is looked up; a head tied to it counts once.
2 P forward, 4 P backward. The recurrences themselves, attention over windows and over retrieved chunks, and whatever is
computed a second time are left out, so the hardware does more than this says.
"""

from __future__ import annotations

import torch

from lrm_recall.model import RecurrentLM

# Dense bfloat16 operations a second, NVIDIA's data sheets; the first name that the device's contains counts
_PEAK = {"H200 NVL": 835e12, "H200": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12}


def flops_per_token(model: RecurrentLM) -> int:
    """Operations that training on one token takes, by the formula above."""
    multiplied = sum(p.numel() for p in model.parameters())  # a tied weight is listed once
    if not model.config.tie_word_embeddings:
        multiplied -= model.get_input_embeddings().weight.numel()
    return 6 * multiplied


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 operations a second of a GPU; None where nobody here knows it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK.items() if known in name), None)


def utilisation(model: RecurrentLM, tokens_per_s: float, devices: int = 1) -> float | None:
    """MFU of training at this speed over so many devices like the model's, 0 to 1; None where no peak is known."""
    peak = peak_flops(model.device)
    return None if peak is None else flops_per_token(model) * tokens_per_s / (peak * devices)
