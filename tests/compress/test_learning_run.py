import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.calibrate.tree_file import TreeError
from dcomp.compress.learning_run import CosineAdam, Snapshot, StratifiedOrder


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 9))
def test_every_item_is_drawn_once_before_any_is_drawn_twice(classes, count, seed):
    classes = torch.tensor(classes)
    order = StratifiedOrder(classes, seed)
    drawn = torch.cat([order.draw(first, count) for first in range(0, 3 * len(classes), count)])
    for lap in drawn[: 3 * len(classes)].view(3, -1):
        assert lap.sort().values.tolist() == list(range(len(classes)))
    # What is drawn depends on the place only, not on what was drawn before.
    assert torch.equal(StratifiedOrder(classes, seed).draw(len(classes), 1), drawn[len(classes)].view(1))


def test_every_stretch_holds_its_part_of_each_class():
    classes = torch.arange(100) % 4
    drawn = classes[StratifiedOrder(classes, 0).draw(0, 100)]
    for stretch in drawn.view(-1, 20):
        assert all(4 <= int((stretch == item_class).sum()) <= 6 for item_class in range(4))


def _optimizer():
    leaves = [torch.tensor([3.0, -2.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)]
    return CosineAdam([([leaves[0]], 0.1), ([], 1.0), ([leaves[1]], 0.5)], 10), leaves


def _loss(leaves):
    return lambda: leaves[0].square().sum() + (leaves[1] - 4).pow(4).sum()


def test_rates_are_those_of_the_groups_and_fall_to_nothing():
    optimizer, leaves = _optimizer()
    optimizer.step(0, _loss(leaves))
    # The first step of Adam is its rate, whatever the gradient.
    assert leaves[0].tolist() == pytest.approx([2.9, -1.9])
    assert leaves[1].tolist() == pytest.approx([1.5])
    before = [leaf.detach().clone() for leaf in leaves]
    optimizer.step(10, _loss(leaves))
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))


def test_a_run_that_goes_on_from_its_file_ends_with_the_same_bits(tmp_path):
    whole, expected = _optimizer()
    for iteration in range(10):
        whole.step(iteration, _loss(expected))
    first, leaves = _optimizer()
    for iteration in range(6):
        first.step(iteration, _loss(leaves))
    Snapshot(tmp_path / "state", "run").write(first.state, at_once=True)
    second, leaves = _optimizer()
    second.load(Snapshot(tmp_path / "state", "run").read())
    for iteration in range(6, 10):
        second.step(iteration, _loss(leaves))
    assert all(torch.equal(leaf, other) for leaf, other in zip(leaves, expected, strict=True))


def test_a_file_is_written_when_it_is_time_and_read_by_its_own_run_only(tmp_path):
    path = tmp_path / "state"
    snapshot = Snapshot(path, "one")
    snapshot.write(lambda: {"x": torch.ones(2)})
    assert not path.exists()
    snapshot.write(lambda: {"x": torch.ones(2)}, at_once=True)
    assert snapshot.read()["x"].tolist() == [1, 1]
    assert Snapshot(path, "two").read() is None
    assert Snapshot(tmp_path / "none", "one").read() is None
    path.write_bytes(path.read_bytes()[:-3])
    assert snapshot.read() is None
    Snapshot(None, "one").write(lambda: {}, at_once=True)
    with pytest.raises(TreeError):
        Snapshot(tmp_path / "no" / "folder", "one").write(lambda: {"x": torch.ones(1)}, at_once=True)
