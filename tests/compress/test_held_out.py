import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.compress.held_out import HeldOutError, hold_out


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda g: len(set(g)) > 1), st.integers(0, 9))
def test_whole_groups_are_held_out_and_about_a_tenth_of_them(groups, seed):
    groups = torch.tensor(groups)
    learn, held_out = hold_out(groups, seed)
    assert torch.cat((learn, held_out)).sort().values.tolist() == list(range(len(groups)))
    one, other = set(groups[learn].tolist()), set(groups[held_out].tolist())
    assert not one & other
    assert one
    assert len(other) == max(1, round(len(one | other) * 0.1))


def test_one_group_cannot_be_divided():
    with pytest.raises(HeldOutError, match="one trajectory"):
        hold_out(torch.zeros(8, dtype=torch.int64), 0)
