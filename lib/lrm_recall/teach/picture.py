"""A picture to remember: 16 rows of 32 pixels, so 16 pairs whose values have 32 channels."""

from __future__ import annotations

import torch
from torch import Tensor

_LETTERS = {  # 5 x 7 pixels
    "S": (".###.", "#...#", "#....", ".###.", "....#", "#...#", ".###."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "E": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "M": ("#...#", "##.##", "#.#.#", "#.#.#", "#...#", "#...#", "#...#"),
    "R": ("####.", "#...#", "#...#", "####.", "#.#..", "#..#.", "#...#"),
    "G": (".###.", "#...#", "#....", "#.###", "#...#", "#...#", ".###."),
}
_LINES = ("MERGE", "STATE")


def picture() -> Tensor:
    """[16, 32] fp32: 1 where there is ink, -1 where there is none."""
    rows = []
    for word in _LINES:
        rows += ["", *(" " + " ".join(_LETTERS[letter][row] for letter in word) for row in range(7))]
    return torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in row.ljust(32)[:32]] for row in rows])
