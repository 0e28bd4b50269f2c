"""What a message tells a user to type is read back as the value that it means."""

from __future__ import annotations

import shlex

from hypothesis import example, given
from hypothesis import strategies as st

from ats.config.key import parse, typed

WORDS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=8)
SCALARS = st.one_of(
    st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()
)
LISTS = st.recursive(st.one_of(SCALARS, WORDS), lambda items: st.lists(items, max_size=4), max_leaves=8).filter(
    lambda value: isinstance(value, list)
)


@given(st.one_of(SCALARS, LISTS))
@example([["img_size", 32], ["global_pool", "avg"], ["act", None], ["name", "true"], ["scale", 1e-07]])
@example([["sizes", {"a": [1, 2], "b c": None}]])
def test_typed_is_the_inverse_of_parse(value):
    """Through a shell, whatever the list holds."""
    key, text = shlex.split(typed({"TIMM.KWARGS": value}))
    assert (key, parse(text)) == ("TIMM.KWARGS", value)


def test_typed_is_short():
    """One pair of quotes around a list, none around its words."""
    kwargs = [["img_size", 32], ["weight_init", "moco"]]
    assert (
        typed({"TIMM.KWARGS": kwargs, "VIT.DEPTH": 3}) == "TIMM.KWARGS '[[img_size,32],[weight_init,moco]]' VIT.DEPTH 3"
    )
