"""The random numbers of one run, in the order in which mad-lab draws them.

The tasks draw one number at a time, as what they draw next depends on what came. A call of numpy's Generator
for one number takes 0.8 microseconds and mad-lab's `choice` ten times that; the words themselves, through the C
interface that numpy publishes, take 0.15. So the one rule that turns words into numbers, Lemire's (ACM TOMACS
29, 2019), is written out here; calls for many numbers go to `generator`, which reads the same words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LOW_WORD = (1 << 32) - 1


class Stream:
    """Random numbers of a seed.

    Attributes:
        generator: numpy's Generator, from which all tasks draw.
        legacy: what stands for numpy's global state, from which selective copying places its blanks.
        below, uniform: one number at a time, off the generator's stream.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.generator = np.random.default_rng(seed)
        self.legacy = np.random.RandomState(seed)
        interface = self.generator.bit_generator.ctypes
        self._next_word, self._next_double, self._state = interface.next_uint32, interface.next_double, interface.state

    def below(self, count: int) -> int:
        """An integer in 0 ... count - 1; count is at most 2^32. Equals `generator.integers(count)`."""
        if count == 1:
            return 0  # takes no word
        product = self._next_word(self._state) * count
        if product & _LOW_WORD < count:
            surplus = (1 << 32) % count  # so many words would make some results likelier than others
            while product & _LOW_WORD < surplus:
                product = self._next_word(self._state) * count
        return product >> 32

    def uniform(self) -> float:
        """A number in [0, 1). Equals `generator.random()`."""
        return self._next_double(self._state)

    def pick(self, choices: Sequence):
        """One of `choices`, each as likely. Equals `generator.choice(choices)`."""
        return choices[self.below(len(choices))]
