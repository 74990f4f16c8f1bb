import base64
import hashlib
import io
import json
import re
import shlex
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from dcomp import DcompError
from dcomp.recipes import report
from dcomp.recipes.plan_summary import PlanSummary
from dcomp.recipes.verdict import Check, PicturePair, PromptResult, StepError, ValidationResult

HOSTILE = (
    "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} ]]> &amp; "
    "\x00\x1b[2J \ud800 | `rm -rf` [link](javascript:alert(1)) \n# heading\n::error::no"
)


def result_of(count: int = 3, *, passed: bool = True, **changes: Any) -> ValidationResult:
    """A result with a hostile text wherever one can come from outside."""
    prompts = [
        PromptResult(index=i, prompt=HOSTILE, latent_rel_error=0.1 + i, psnr_db=20.0 + i, ssim=None)
        for i in range(count)
    ]
    layer = {
        "name": HOSTILE,
        "role": "conv",
        "scheme": "W4A8",
        "weight_bits": 4.0,
        "input_bits": 8.0,
        "bytes_before": 4000,
        "bytes_after": 600,
        "weight_error": 0.07,
        "reason": None,
    }
    kept = {**layer, "scheme": None, "weight_error": None, "reason": HOSTILE}
    values: dict[str, Any] = {
        "compressed": HOSTILE,
        "original": "model",
        "latent_rel_error": 1.1,
        "psnr_db": 21.0,
        "psnr_db_of_mean_mse": 20.9,
        "ssim": None,
        "fid": None,
        "kid": None,
        "kid_std": None,
        "extractor": None,
        "samples": count,
        "seed": 3,
        "bits_per_param": 5.1,
        "bytes_original": 3_000_000,
        "bytes_compressed": 1_000_000,
        "denoiser_bytes_original": 2_000_000,
        "denoiser_bytes_compressed": 320_000,
        "denoiser_bytes_ratio": 0.16,
        "macs_ratio": 1.0,
        "speedup": None,
        "speedup_min": None,
        "speedup_max": None,
        "peak_bytes": None,
        "peak_bytes_original": None,
        "flat_images": 0,
        "non_finite_images": 0,
        "passed": passed,
        "thresholds": {
            "min_psnr": Check(relation=">=", limit=20.0, value=21.0, passed=True),
            "max_latent_error": Check(relation="<=", limit=2.0 if passed else 1.0, value=1.1, passed=passed),
        },
        "warnings": [HOSTILE],
        "per_prompt": prompts,
        "error_by_step": [StepError(step=i, mean=0.1 * i, low=0.0, high=0.2 * i) for i in range(4)],
        "layers": [layer, kept],
        "left_in_float": [{"name": HOSTILE, "role": "conv", "reason": HOSTILE}],
        "plans": [
            PlanSummary(
                name="2x",
                speedup=2.0,
                expected_error=None,
                error=0.1,
                psnr_db=40.0,
                predicted=[[], ["all"], [], [HOSTILE, "all"]],
                unrounded=[2],
                corrected=[1],
            )
        ],
        "settings": {
            "steps": 4,
            "guidance": 4.0,
            "seed": 3,
            "batch_size": 2,
            "scheduler": "DDIMScheduler",
            "prompts": "a file; rm.csv",
            "column": None,
            "first_index": 1_000_000,
        },
        "speed": None,
    }
    result = ValidationResult(**(values | changes))
    for i, prompt in enumerate(prompts):
        original = np.full((8, 8, 3), 100, dtype=np.uint8)
        compressed = original + np.uint8(i)
        result.pictures.append(PicturePair(prompt, i + 1, original, compressed))
    return result


class Page(HTMLParser):
    """Tags, texts and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        (self.scripts if self.tags and self.tags[-1][0] == "script" and not self.scripts else self.texts).append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [value for found, attributes in self.tags if found == tag and (value := attributes.get(name))]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    file = report.write_html(result_of(), tmp_path_factory.mktemp("page") / "new")
    text = file.read_text("utf-8")
    return text, Page(text)


def test_page_is_one_file_that_loads_nothing(page: tuple[str, Page]) -> None:
    text, parsed = page
    addresses = [a for tag in ("img", "source", "link", "script", "a") for n in ("src", "srcset", "href")
                 for a in parsed.attributes(tag, n)]  # fmt: skip
    assert len(addresses) == 3 * 3 + 2 * 2
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"@import|url\(|https?://", text)


def test_curves_of_layers_are_on_the_page(page: tuple[str, Page], tmp_path: Path) -> None:
    layers = [{"name": f"<b>{i}", "role": "conv", "output_error": 0.1, "error_by_step": [0.1, 0.2]} for i in range(8)]
    sizes = {"scheme": "W8A8", "bytes_before": 4, "bytes_after": 1, "reason": None}
    file = report.write_html(result_of(layers=[layer | sizes for layer in layers]), tmp_path)
    text = file.read_text("utf-8")
    for title in ("Errors of layers over steps, by role", "Worst layers over steps"):
        assert title in text
        assert title not in page[0]
    assert text.count("data:image/png") == page[0].count("data:image/png") + 2 * 2


def test_hostile_texts_are_shown_and_never_interpreted(page: tuple[str, Page]) -> None:
    _, parsed = page
    assert not [attributes for _, attributes in parsed.tags if any(name.startswith("on") for name in attributes)]
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert "alert" not in parsed.scripts[0]
    shown = "".join(parsed.texts)
    assert shown.count("<script>alert(1)</script>") >= 3 + 1 + 2 + 2  # prompts, folder, layers, left in float
    assert "{{ 7*7 }}" in shown


def test_policy_allows_the_own_script_and_nothing_else(page: tuple[str, Page]) -> None:
    _, parsed = page
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_pictures_are_exact_and_differences_share_one_gain(page: tuple[str, Page]) -> None:
    _, parsed = page
    images = [base64.b64decode(a.partition(",")[2]) for a in parsed.attributes("img", "src")][: 3 * 3]
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    gain = report.MAX_GAIN
    for i in range(3):
        original, compressed, difference = pixels[3 * i : 3 * i + 3]
        assert set(original.flat) == {100}
        assert set(compressed.flat) == {100 + i}
        assert set(difference.flat) == {i * gain}


def test_equal_results_give_equal_pages(page: tuple[str, Page], tmp_path: Path) -> None:
    assert report.write_html(result_of(), tmp_path).read_text("utf-8") == page[0]
    assert [entry.name for entry in tmp_path.iterdir()] == [report.PAGE]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "Passed"),
        ({"passed": False}, "Not good enough"),
        ({"thresholds": {}}, "Measured, no thresholds given"),
        ({"thresholds": {}, "passed": False, "psnr_db": None, "error_by_step": [], "layers": []}, "Not good enough"),
    ],
)
def test_verdict_is_the_headline(changes: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    text = report.write_html(result_of(1, **changes), tmp_path).read_text("utf-8")
    assert f"<h1>{verdict}</h1>" in text


def test_speed_and_features_are_told_with_all_they_depend_on(tmp_path: Path) -> None:
    speed = {
        "repeats": 7,
        "batch": 2,
        "threads": 5,
        "device": "cpu",
        "calls": 2,
        "macs": 2_000_000,
        "macs_original": 2_000_000,
        "original_ms": 12.5,
        "compressed_ms": 5.0,
        "peak_bytes_imports": 300_000_000,
    }
    figures = {"speedup": 2.5, "speedup_min": 2.25, "speedup_max": 2.75, "peak_bytes": 4, "peak_bytes_original": 8}
    features = {"fid": 0.5, "kid": -0.001, "kid_std": 0.002, "extractor": "random-conv/1?seed=0"}
    result = result_of(speed=speed, **figures, **features)
    shown = "".join(Page(report.write_html(result, tmp_path).read_text("utf-8")).texts)
    for text in (
        "2.50",
        "2.25 to 2.75",
        "7 pairs",
        "batch 2",
        "5 threads",
        "random-conv/1?seed=0",
        "12.5 ms",
        "300 MB",
    ):
        assert text in shown, text


def test_difference_gain_is_a_power_of_two_that_keeps_large_differences_readable() -> None:
    pair = result_of(1).pictures[0]
    strong = PicturePair(pair.result, 1, pair.original, pair.original + np.uint8(100))
    assert report._gain([strong]) == 2
    assert report._gain([]) == 1


def test_json_file_holds_the_result(tmp_path: Path) -> None:
    result = result_of(compressed="out")
    report.write_json(result, tmp_path / "a" / "report.json")
    data = json.loads((tmp_path / "a" / "report.json").read_text("utf-8"))
    assert data["thresholds"]["min_psnr"] == {"relation": ">=", "limit": 20.0, "value": 21.0, "passed": True}
    assert set(data) == set(result.to_dict())


@pytest.mark.parametrize("passed", [True, False])
def test_junit_has_a_case_for_each_threshold_and_the_figures_of_each_prompt(passed: bool, tmp_path: Path) -> None:
    report.write_junit(result_of(passed=passed), tmp_path / "junit.xml")
    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]
    names = [case.get("name") for case in suite.iter("testcase")]
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert names == ["min_psnr", "max_latent_error", "finite"]
    assert failed == ([] if passed else ["max_latent_error"])
    assert (suite.get("tests"), suite.get("failures")) == ("3", str(len(failed)))
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["psnr_db"] == "21.0"
    assert properties["prompt.2.psnr_db"] == "22.0"
    assert properties["prompt.2.ssim"] == ""
    assert "<script>alert(1)</script>" in str(properties["prompt.0.prompt"])


def test_results_that_are_not_finite_fail_a_case_of_their_own(tmp_path: Path) -> None:
    result = result_of(passed=False, thresholds={}, psnr_db=None, non_finite_images=2)
    report.write_junit(result, tmp_path / "junit.xml")
    failure = ET.parse(tmp_path / "junit.xml").getroot().find(".//testcase[@name='finite']/failure")
    assert failure is not None
    assert "2 pictures" in str(failure.get("message"))


def test_github_summary_is_appended_only_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert not report.write_github(result_of())
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert report.write_github(result_of(passed=False), tmp_path / "index.html")
    text = summary.read_text("utf-8")
    assert text.startswith("before\n## dcomp validate: not good enough")
    assert "| max_latent_error | 1.1 | <= 1 | **missed** |" in text
    assert "<script>" not in text
    assert "\n# heading" not in text
    assert not re.search(r"(?<!\\)\[link", text)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("::")]
    assert errors == ["::error title=dcomp validate::max_latent_error: 1.1, wanted <= 1"]


def test_printed_command_is_one_that_the_program_takes() -> None:
    from dcomp.cli import app

    words = shlex.split(report.reproduction(result_of(compressed="a folder", extractor="pixel/1")))
    assert words[:3] == ["dcomp", "validate", "a folder"]
    command = typer.main.get_command(app).commands["validate"]  # type: ignore[attr-defined]
    parsed = command.make_context("validate", words[2:]).params
    assert parsed["prompts"] == "a file; rm.csv"
    assert (parsed["samples"], parsed["steps"], parsed["seed"], parsed["features"]) == (3, 4, 3, "pixel")
    assert (parsed["min_psnr"], parsed["max_latent_error"], parsed["bench"]) == (20.0, 2.0, False)


def test_report_that_cannot_be_written_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DcompError, match="cannot be written"):
        report.write_html(result_of(), tmp_path / "file" / "page")


def test_the_page_shows_what_each_call_of_a_plan_does(tmp_path: Path) -> None:
    page = report.write_html(result_of(), tmp_path).read_text()
    drawing = re.search(r'<svg class="calls".*?</svg>', page, re.S)
    assert drawing is not None
    cells = re.findall(r'<rect class="(\w+)" x="(\d)" y="([\d.]+)" width="0.9" height="([\d.]+)"/>', drawing[0])
    zones = {"z0", "z1"}
    assert [(name if name not in zones else "zone", at, y, h) for name, at, y, h in cells] == [
        ("whole", "0", "0", "2"),
        ("zone", "1", "0.0", "2.0"),
        ("exact", "2", "0", "2"),
        ("zone", "3", "0.0", "1.0"),
        ("zone", "3", "1.0", "1.0"),
    ]
    assert "2 of 4 calls compute everything" in drawing[0]
    assert "inputs unrounded" in page
    assert ", 1 corrected" in page
    assert "Cache plans" not in report.write_html(result_of(plans=[]), tmp_path).read_text()
