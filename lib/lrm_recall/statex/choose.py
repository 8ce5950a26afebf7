"""Which layers get a larger state (StateX, section 4.4)."""

from __future__ import annotations


def choose_layers(num_layers: int, m: int = 4) -> list[int]:
    """m layers spread evenly: one every floor(L / m), starting with the first.

    Args:
        num_layers: L.
        m: layers to expand, 1 to L. The paper uses 4 for both models; its Table 2 prints the state of Mamba2 with 8.

    Raises:
        ValueError: m outside 1 to L.
    """
    if not 1 <= m <= num_layers:
        raise ValueError(f"m must lie between 1 and the number of layers {num_layers}, got {m}")
    stride = num_layers // m
    return [i * stride for i in range(m)]
