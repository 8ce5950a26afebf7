"""Every stored tensor must have its place: a change of any one of them is refused by name."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from checkpoint_files import FLA, LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall import RecurrentLM
from lrm_recall.checkpoints.find import find_layout
from lrm_recall.checkpoints.layout import Layout
from lrm_recall.checkpoints.match import Shape, expected_shapes, match
from lrm_recall.checkpoints.source import decode


@cache
def layout_and_shapes(name: str) -> tuple[Layout, dict[str, Shape], dict[str, Shape]]:
    """A layout, the shapes that its model expects, and those that FLA stored."""
    saved = decode((LAYOUTS / f"{name}.json").read_text())
    layout, source = find_layout(saved["config"])
    with torch.device("meta"):
        model = RecurrentLM(layout.config(source))
    stored = {name: tuple(map(int, header.split()[1:])) for name, header in saved["tensors"].items()}
    return layout, expected_shapes(model), stored


@settings(deadline=None)  # the first example of a layout builds its model
@given(layout=st.sampled_from(FLA), data=st.data())
def test_any_change_is_refused_by_name(layout, data):
    layout, expected, stored = layout_and_shapes(layout)
    name = data.draw(st.sampled_from(sorted(stored)))
    change = data.draw(st.sampled_from(["missing", "unexpected", "of another shape"]))
    changed = dict(stored)
    if change == "missing":
        del changed[name]
    elif change == "unexpected":
        name = name.replace("weight", "scale") if "weight" in name else f"{name}_scale"
        changed[name] = (1,)
    else:
        changed[name] = data.draw(st.sampled_from([(*stored[name], 1), (stored[name][0] + 1, *stored[name][1:]), ()]))
    with pytest.raises(ValueError, match=f"1 {change}") as raised:
        match(expected, changed, layout)
    assert name in str(raised.value)


@pytest.mark.parametrize("layout", FLA)
def test_each_parameter_comes_from_one_tensor(layout):
    layout, expected, stored = layout_and_shapes(layout)
    places = match(expected, stored, layout)
    assert places.keys() == stored.keys()
    assert sorted(part.name for parts in places.values() for part in parts) == sorted(expected)
    for name, parts in places.items():
        assert [expected[part.name] for part in parts] == [stored[name]]
