import hashlib
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dcomp import DcompError
from dcomp.calibrate.model_files import check_model_folder, read_safetensors_header
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from dcomp.compress.checkpoint import (
    CheckpointError,
    LayerRecord,
    ManifestFields,
    OutputError,
    check_manifest,
    read_manifest,
    update_quality,
    write_checkpoint,
)
from dcomp.compress.verify import call_denoiser
from dcomp.compress.weight_files import write_weights
from tests.support import hostile
from tests.support.quantized import quantized_pipeline
from tests.support.tiny import NAMES, denoiser_inputs, save_tiny_pipeline

NAME = "UNet2DModel"
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
FIELDS = ManifestFields(
    recipe={"kind": "quantize", "seed": 0},
    layers={"conv_in": LayerRecord(role="input", weight_bits=32, input_bits=32, bytes_before=9, bytes_after=9)},
    calibration_sha256="0" * 64,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> OpenPipeline:
    return quantized_pipeline(save_tiny_pipeline(NAME, tmp_path_factory.mktemp("source") / "tiny"))


@pytest.fixture(scope="module")
def written(pipeline: OpenPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("written") / "out"
    write_checkpoint(pipeline, output, FIELDS)
    return output


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    pipeline = quantized_pipeline(save_tiny_pipeline(name, tmp_path / "source"))
    manifest = write_checkpoint(pipeline, tmp_path / "out", FIELDS)
    assert check_manifest(tmp_path / "out") == manifest
    opened = open_pipeline(tmp_path / "out")
    before, after = pipeline.denoiser.state_dict(), opened.denoiser.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key])
    args, kwargs = denoiser_inputs(name)
    expected = call_denoiser(pipeline.denoiser, args, kwargs)
    assert torch.equal(call_denoiser(opened.denoiser, args, kwargs), expected)


def test_everything_but_the_denoiser_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = save_tiny_pipeline("UNet2DConditionModel", tmp_path / "source")
    for name in ("unet/model.bin", "vae/code.py", "text_encoder/pytorch_model.bin"):
        (source / name).write_bytes(b"cos\nsystem\n")
    write_checkpoint(quantized_pipeline(source), tmp_path / "out", FIELDS)
    before, after = hashes(source), hashes(tmp_path / "out")
    wanted = {name for name in before if not name.endswith((".bin", ".py")) and not name.startswith("unet/")}
    assert {name: before[name] for name in wanted} == {name: after.get(name) for name in wanted}
    assert after.keys() - wanted == {"dcomp.json", "unet/config.json", f"unet/{hostile.WEIGHTS}"}


def test_equal_inputs_give_equal_bytes(pipeline: OpenPipeline, written: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    write_checkpoint(pipeline, again, FIELDS)
    assert hashes(again) == hashes(written)


def test_the_manifest_counts_what_is_on_the_disk(pipeline: OpenPipeline, written: Path) -> None:
    manifest = read_manifest(written)
    assert set(manifest.files) == set(hashes(written)) - {"dcomp.json"}
    assert manifest.totals.bytes_compressed == sum((written / name).stat().st_size for name in manifest.files)
    assert manifest.totals.bytes_original == sum(
        path.stat().st_size for path in pipeline.source.rglob("*") if path.is_file()
    )
    parameters = sum(info.numel for info in check_model_folder(pipeline.source).denoiser.tensors.values())
    header = read_safetensors_header(written / "unet" / hostile.WEIGHTS)
    assert manifest.totals.denoiser_bytes_ratio == header.file_bytes / (4 * parameters)
    assert manifest.totals.bits_per_param == 8 * (header.file_bytes - header.data_start) / parameters
    assert manifest.source.name == "tiny"


def test_no_file_names_this_machine(written: Path) -> None:
    for path in (path for path in written.rglob("*") if path.is_file()):
        assert str(written.parent.parent).encode() not in path.read_bytes()


def test_layers_left_in_float_are_stored_as_narrow_as_they_were(tmp_path: Path) -> None:
    source = save_tiny_pipeline(NAME, tmp_path / "source")
    weights = source / "unet" / hostile.WEIGHTS
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    pipeline = quantized_pipeline(source)
    with torch.no_grad():
        pipeline.denoiser.conv_out.bias.add_(1e-6)
    write_checkpoint(pipeline, tmp_path / "out", FIELDS)
    stored = {
        name: info.dtype
        for name, info in read_safetensors_header(tmp_path / "out" / "unet" / hostile.WEIGHTS).tensors.items()
    }
    assert stored["conv_norm_out.weight"] == "F16"
    assert stored["conv_out.bias"] == "F32"
    after = open_pipeline(tmp_path / "out").denoiser.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in pipeline.denoiser.state_dict().items())


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]
SHAPES = st.lists(st.integers(0, 9), max_size=3)


@FUZZ
@given(shapes=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=12), shard=st.integers(1, 400))
def test_weight_files_are_aligned_and_hold_what_was_given(
    shapes: list[tuple[list[int], torch.dtype]], shard: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    tensors = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (shape, dtype) in enumerate(shapes)}
    files = write_weights(folder, tensors, shard, {"format": "pt"})
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files} == files
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        header = read_safetensors_header(path)
        assert header.data_start % 64 == 0
        for info in header.tensors.values():
            size = info.nbytes // max(1, info.numel)
            wanted = next((step for step in (64, 16) if info.nbytes % step == 0), max(1, size))
            assert info.begin % wanted == 0 or info.nbytes == 0
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_shards_open_in_plain_diffusers(pipeline: OpenPipeline, tmp_path: Path) -> None:
    manifest = write_checkpoint(pipeline, tmp_path / "out", FIELDS, max_shard_bytes=100_000)
    assert sum(name.endswith(".safetensors") for name in manifest.files) > 3
    after = open_pipeline(tmp_path / "out").denoiser.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in pipeline.denoiser.state_dict().items())


def test_finished_folders_take_the_place_of_components(pipeline: OpenPipeline, tmp_path: Path) -> None:
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.save_pretrained(tmp_path / "scheduler")
    replaced = {"scheduler": tmp_path / "scheduler", "unet": pipeline.source / "unet"}
    write_checkpoint(pipeline, tmp_path / "out", FIELDS, replaced=replaced)
    after = hashes(tmp_path / "out")
    for name, folder in replaced.items():
        assert {f"{name}/{key}": value for key, value in hashes(folder).items()}.items() <= after.items()
    opened = open_pipeline(tmp_path / "out")
    assert type(opened.scheduler) is DDIMScheduler
    assert not hasattr(opened.denoiser, "hf_quantizer")
    check_manifest(tmp_path / "out")


def test_an_existing_output_is_kept(pipeline: OpenPipeline, checkpoint: Path, tmp_path: Path) -> None:
    before = hashes(checkpoint)
    with pytest.raises(OutputError, match="exists") as caught:
        write_checkpoint(pipeline, checkpoint, FIELDS)
    assert caught.value.exit_code == 2
    assert hashes(checkpoint) == before
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    for name in ("file", "mine"):
        with pytest.raises(OutputError):
            write_checkpoint(pipeline, tmp_path / name, FIELDS, overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_overwriting_replaces_the_whole_folder(pipeline: OpenPipeline, checkpoint: Path) -> None:
    (checkpoint / "unet" / "old.json").write_text("{}")
    manifest = write_checkpoint(pipeline, checkpoint, ManifestFields(recipe={"seed": 1}), overwrite=True)
    assert check_manifest(checkpoint) == manifest
    assert manifest.recipe == {"seed": 1}
    assert leftovers(checkpoint.parent) == []


def test_an_empty_output_folder_is_used(pipeline: OpenPipeline, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(pipeline, tmp_path / "out", FIELDS)
    check_manifest(tmp_path / "out")


def test_the_source_is_never_overwritten(pipeline: OpenPipeline) -> None:
    for output in (pipeline.source, pipeline.source.parent, pipeline.source / "unet"):
        with pytest.raises(OutputError, match="overlap"):
            write_checkpoint(pipeline, output, FIELDS, overwrite=True)


def test_a_second_writer_is_refused_at_once(
    pipeline: OpenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    replace = os.replace

    def slow_replace(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "out":
            entered.set()
            go_on.wait(20)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow_replace)
    first = threading.Thread(target=write_checkpoint, args=(pipeline, tmp_path / "out", FIELDS))
    first.start()
    assert entered.wait(20)
    with pytest.raises(CheckpointError, match="Another process is writing"):
        write_checkpoint(pipeline, tmp_path / "out", FIELDS, overwrite=True)
    go_on.set()
    first.join()
    check_manifest(tmp_path / "out")
    assert leftovers(tmp_path) == []


EVENTS = ("fsync", "replace", "mkdir")


def write_and_die(pipeline: OpenPipeline, output: Path, fields: ManifestFields, event: int) -> bool:
    """Write in a child process that kills itself before the given system call; return whether it died."""
    child = os.fork()
    if child == 0:
        left = event

        def counted(call: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **kwargs)

            return run

        for name in EVENTS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            write_checkpoint(pipeline, output, fields, overwrite=True)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "overwrite"])
def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(
    existing: bool, pipeline: OpenPipeline, written: Path, tmp_path: Path
) -> None:
    output, new = tmp_path / "out", ManifestFields(recipe={"new": True})
    seen, died, event = set(), True, 0
    while died:
        shutil.rmtree(output, ignore_errors=True)
        if existing:
            shutil.copytree(written, output)
        died = write_and_die(pipeline, output, new, event)
        recipe = check_manifest(output).recipe if output.exists() else None
        assert recipe in ((FIELDS.recipe if existing else None), new.recipe)
        seen.add(str(recipe))
        event += 1
    assert event > 8
    assert len(seen) == 2
    write_checkpoint(pipeline, output, new, overwrite=True)
    assert leftovers(tmp_path) == []


def test_an_old_folder_that_was_moved_away_comes_back(pipeline: OpenPipeline, checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.parent / f".{checkpoint.name}.replaced-12345678")
    with pytest.raises(OutputError, match="exists"):
        write_checkpoint(pipeline, checkpoint, FIELDS)
    check_manifest(checkpoint)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("nbytes", [100, 5_000, 300_000])
def test_a_disk_that_fills_up_leaves_nothing(nbytes: int, pipeline: OpenPipeline, tmp_path: Path) -> None:
    with largest_file(nbytes), pytest.raises(CheckpointError, match=r"disk is full: \d+ bytes are needed and \d+"):
        write_checkpoint(pipeline, tmp_path / "out", FIELDS)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_a_disk_that_is_too_small_is_noticed_before_writing(pipeline: OpenPipeline, tmp_path: Path) -> None:
    pipeline.denoiser.register_buffer("huge", torch.zeros(1).expand(1 << 50))
    try:
        with pytest.raises(CheckpointError, match="disk is full"):
            write_checkpoint(pipeline, tmp_path / "out", FIELDS)
    finally:
        del pipeline.denoiser.huge
    assert not (tmp_path / "out").exists()


def test_every_change_is_found_and_named(checkpoint: Path) -> None:
    for name in sorted(read_manifest(checkpoint).files):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(CheckpointError, match="content has changed") as caught:
            check_manifest(checkpoint)
        assert name in caught.value.problem
        (checkpoint / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name}: missing"):
            check_manifest(checkpoint, deep=False)
        (checkpoint / name).write_bytes(content)
    check_manifest(checkpoint)


@pytest.mark.parametrize("name", ["unet/extra.json", f"unet/{hostile.INDEX}", "evil.py", "vae2/x.safetensors"])
def test_files_that_nobody_listed_are_found(name: str, checkpoint: Path) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name}: not in the manifest"):
        check_manifest(checkpoint, deep=False)


def test_reports_and_readmes_may_be_added(checkpoint: Path) -> None:
    for name in ("README.md", "report.json", "report.html"):
        (checkpoint / name).write_text("x")
    check_manifest(checkpoint)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"recipe": {"kind": "other"}}, "own hash"),
        ({"sha256": "0" * 64}, "own hash"),
        ({"schema": 2}, "schema"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "no path inside"),
        ({"files": {"/etc/passwd": "0" * 64}}, "no path inside"),
        ({"files": {"unet/config.json": "short"}}, "files"),
        ({"layers": {"a": {"role": 5}}}, "layers"),
        ({"totals": None}, "totals"),
    ],
)
def test_a_tampered_manifest_is_refused(changes: dict[str, Any], word: str, checkpoint: Path) -> None:
    hostile.edit_json(checkpoint / "dcomp.json", **changes)
    with pytest.raises(CheckpointError, match=word) as caught:
        check_manifest(checkpoint)
    assert caught.value.remedy


@FUZZ
@given(data=st.data())
def test_any_manifest_is_read_or_refused(data: st.DataObject, written: Path, tmp_path: Path) -> None:
    content = (written / "dcomp.json").read_bytes()
    (tmp_path / "dcomp.json").write_bytes(data.draw(hostile.damaged(content)))
    with suppress(DcompError):
        manifest = read_manifest(tmp_path)
        assert manifest.intact == (manifest.to_json() == read_manifest(written).to_json())


def test_a_pipeline_that_dcomp_did_not_make_is_explained(pipeline: OpenPipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not made by dcomp") as caught:
        check_manifest(pipeline.source)
    assert "from_pretrained" in caught.value.remedy
    with pytest.raises(CheckpointError, match="no compressed checkpoint"):
        check_manifest(tmp_path)


def test_quality_is_added_in_one_step(checkpoint: Path) -> None:
    update_quality(checkpoint, {"psnr_db": 30.5})
    assert check_manifest(checkpoint).quality == {"psnr_db": 30.5}
    assert leftovers(checkpoint) == []
