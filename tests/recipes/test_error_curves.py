import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from dcomp import DcompError, UsageError
from dcomp.recipes.error_curves import (
    NAMED,
    default_picture,
    draw_error_curves,
    draw_roles,
    draw_worst,
    has_curves,
)
from dcomp.recipes.inspect import Inspection, inspect
from dcomp.recipes.picture_file import check_picture_file

Models = Callable[[str], Path]


@pytest.fixture
def report(tiny_checkpoint: Models) -> Inspection:
    return inspect(tiny_checkpoint("UNet2DModel"))


def layer(name: str, role: str, *errors: float) -> dict[str, Any]:
    return {"name": name, "role": role, "output_error": max(errors), "error_by_step": list(errors)}


LAYERS = [
    layer("a", "conv", 0.01, 0.02, 0.04),
    layer("b", "conv", 0.03, 0.06, 0.02),
    layer("c", "conv", 0.02, 0.01, 0.0),
    layer("_d$", "time", 0.001, 0.002, 0.003),
    *(layer(f"e{i}", "linear", 0.004, 0.004, 0.004) for i in range(NAMED)),
]


def curves(axes: Any) -> dict[str, list[float]]:
    return {
        text.get_text().lstrip("\u200b"): list(line.get_ydata())
        for line, text in zip(axes.get_legend().legend_handles, axes.get_legend().get_texts(), strict=True)
        for line in axes.lines
        if line.get_label() == text.get_text()
    }


def test_a_role_is_drawn_by_its_median_layer_and_counted() -> None:
    axes = Figure().subplots()
    draw_roles(axes, LAYERS, [900.0, 500.0, 100.0])
    drawn = curves(axes)
    assert list(drawn) == [f"linear, {NAMED} layers", "conv, 3 layers", "time, 1 layer"]
    expected = [100 * median(x["error_by_step"][i] for x in LAYERS[:3]) for i in range(3)]
    assert drawn["conv, 3 layers"] == pytest.approx(expected)
    assert axes.get_yscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\n900", "2\n500", "3\n100"]


def test_the_worst_layers_have_names_and_the_others_are_there() -> None:
    axes = Figure().subplots()
    draw_worst(axes, LAYERS)
    drawn = curves(axes)
    assert list(drawn)[:4] == ["b, 6.0%", "a, 4.0%", "c, 2.0%", "e0, 0.4%"]
    assert len(drawn) == NAMED
    assert len(axes.lines) == len(LAYERS)
    assert drawn["a, 4.0%"] == pytest.approx([1, 2, 4])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]


def test_names_are_text_and_not_formulas(report: Inspection, tmp_path: Path) -> None:
    layers = [replace(x, name=f"_${x.name}^{{$", role="$x") for x in report.layers]
    draw_error_curves(replace(report, layers=layers), tmp_path / "a.png")


def test_errors_of_zero_and_of_one_step_can_be_drawn(report: Inspection, tmp_path: Path) -> None:
    one = replace(report.layers[0], error_by_step=[0.0], output_error=0.0)
    draw_error_curves(replace(report, layers=[one], timesteps=[5.0]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_the_picture_is_one_of_its_kind_and_always_the_same(suffix: str, report: Inspection, tmp_path: Path) -> None:
    files = [tmp_path / folder / f"errors.{suffix}" for folder in ("a", "b/c")]
    for file in files:
        draw_error_curves(report, file)
    first, second = (file.read_bytes() for file in files)
    assert first == second
    if suffix.lower() == "png":
        with Image.open(files[0]) as image:
            assert image.size == (1440, 720)
    elif suffix == "svg":
        assert ET.fromstring(first.decode()).tag.endswith("svg")
    else:
        assert first.startswith(b"%PDF")


def test_what_cannot_be_drawn_or_written_is_refused(report: Inspection, tmp_path: Path) -> None:
    for name in ("errors", "errors.gif", "errors.png.txt"):
        with pytest.raises(UsageError, match=r"ending.*\.png or \.svg or \.pdf"):
            check_picture_file(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(DcompError, match="cannot be written"):
        draw_error_curves(report, tmp_path / "file" / "errors.png")
    nothing = replace(report, layers=[replace(x, error_by_step=[]) for x in report.layers])
    assert has_curves(report)
    assert not has_curves(nothing)
    with pytest.raises(UsageError, match="no errors by step"):
        draw_error_curves(nothing, tmp_path / "errors.png")
    assert not (tmp_path / "errors.png").exists()
    assert default_picture(Path("a/b.c/out-w4a8")) == Path("a/b.c/out-w4a8-errors.png")
