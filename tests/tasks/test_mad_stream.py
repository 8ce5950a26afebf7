"""One number at a time off numpy's stream: the same as numpy's own Generator gives, in any order of calls."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.tasks.mad.stream import Stream

COUNTS = st.integers(1, 300) | st.integers(1, 2**32) | st.just(3 << 30)  # the last rejects a word in four


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(COUNTS | st.just("uniform") | st.just("many"), max_size=60))
def test_numbers_are_numpys(seed, calls):
    stream, numpys = Stream(seed), np.random.default_rng(seed)
    for call in calls:
        if call == "uniform":
            assert stream.uniform() == numpys.random()
        elif call == "many":
            assert stream.generator.integers(9, size=3).tolist() == numpys.integers(9, size=3).tolist()
        else:
            assert stream.below(call) == numpys.integers(call)
    assert stream.pick("abc") == numpys.choice(list("abc"))
