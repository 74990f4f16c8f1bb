"""Open a diffusers pipeline and run its own trajectories with fixed seeds.

A pipeline is driven through its public `__call__` only, with the arguments that its signature takes, so every pipeline
that turns prompts, class labels or nothing into pictures works alike. Each picture has its own random generator, made
from (seed, global index): how a job is cut into batches or shards changes no noise. N is the number of pictures.

Folders are checked before anything is loaded; weights are safetensors only. This module changes no weights.
"""

import contextlib
import difflib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcomp import DcompError, UsageError
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.components import find_denoiser, local_folder, other_scheduler, quiet
from dcomp.calibrate.model_files import check_finite, check_model_folder
from dcomp.calibrate.stored_weights import is_large, open_stored
from dcomp.calibrate.tree_file import tensor_sha256

OnStep = Callable[[int, int, Tensor], None]
_CONDITIONS = {"prompt": "text", "class_labels": "class"}


class NotFiniteError(DcompError):
    """A prediction or latents with NaN or infinity."""


@dataclass(frozen=True)
class Generation:
    """How pictures are made.

    Attributes:
        steps: scheduler steps.
        guidance: guidance scale; None is the pipeline's own default.
        seed: base of all random generators.
        height: of the picture in pixels; None is the pipeline's own default.
        width: likewise.
        batch_size: pictures made at once; changes speed and memory, not the noise.
    """

    steps: int = 20
    guidance: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    batch_size: int = 8


@dataclass
class Trajectory:
    """What `OpenPipeline.run` made, on the CPU.

    Attributes:
        latents: what the last scheduler step returned, `[N, ...]`.
        step_latents: what each scheduler step returned, if asked for.
        images: float32 `[N, C, H, W]` in [0, 1], or None when nothing was decoded.
        blanked: positions of pictures that the pipeline's own safety checker replaced; compare none of these.
    """

    latents: Tensor
    step_latents: list[Tensor] | None = None
    images: Tensor | None = None
    blanked: tuple[int, ...] = ()


class OpenPipeline:
    """A pipeline, its denoiser, and how to run it.

    Attributes:
        pipe: the diffusers pipeline.
        denoiser: the component that the scheduler's loop calls.
        denoiser_name: its name in the pipeline, as a rule `unet` or `transformer`.
        source: the folder that it was read from.
        kind: what a picture is conditioned on: `text`, `class` or `unconditional`.

    Raises:
        UsageError: no denoiser or more than one, or the pipeline needs arguments that only its author knows.
    """

    def __init__(self, pipe: Any, source: Path) -> None:
        self.pipe = pipe
        self.source = source
        pipe.set_progress_bar_config(disable=True)
        self.denoiser_name = find_denoiser(pipe)
        self._accepted = inspect.signature(type(pipe).__call__).parameters
        self.kind = next((kind for name, kind in _CONDITIONS.items() if name in self._accepted), "unconditional")
        known = {"self", *_CONDITIONS}
        unknown = [
            name
            for name, parameter in self._accepted.items()
            if name not in known
            and parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if unknown:
            raise UsageError(
                f"{type(pipe).__name__} needs arguments that dcomp cannot make up: {', '.join(unknown)}",
                where=str(source),
                remedy="Use a pipeline that makes pictures from a prompt, a class or nothing.",
            )

    @property
    def denoiser(self) -> nn.Module:
        """The component that the scheduler's loop calls."""
        module: nn.Module = getattr(self.pipe, self.denoiser_name)
        return module

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler as it is now."""
        return self.pipe.scheduler

    def guidance(self, asked: float | None) -> float | None:
        """Return the guidance scale that a run uses, the pipeline's default included; None without guidance."""
        parameter = self._accepted.get("guidance_scale")
        default = parameter.default if parameter and isinstance(parameter.default, int | float) else None
        return asked if asked is not None else default

    def check(self, prompts: Sequence[str], settings: Generation) -> None:
        """Refuse what cannot be run, before any work.

        Raises:
            UsageError: no prompts, an unknown class, or a setting that is out of range or means nothing here.
        """
        limit = int(self.scheduler.config.get("num_train_timesteps", 1000))
        if not 1 <= settings.steps <= limit:
            raise UsageError(
                f"{settings.steps} steps cannot be run: the schedule has {limit}",
                where="steps",
                remedy=f"Ask for 1 to {limit} steps.",
            )
        for name in ("batch_size", "height", "width"):
            value = getattr(settings, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}", where=name, remedy="Use a number of 1 or more.")
        for name, parameter in (("guidance", "guidance_scale"), ("height", "height"), ("width", "width")):
            if getattr(settings, name) is not None and parameter not in self._accepted:
                raise UsageError(
                    f"{type(self.pipe).__name__} has no {name} to set", where=name, remedy=f"Leave {name} out."
                )
        if not prompts:
            raise UsageError("There is nothing to make", where="prompts", remedy="Give at least one prompt.")
        if self.kind == "class":
            self.class_ids(prompts)

    @property
    def classes(self) -> Sequence[int]:
        """The classes that have names, else all that the denoiser has embeddings for; empty if nobody knows."""
        names: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        every = range(_num_classes(self.denoiser) or 0)
        return sorted(set(names.values()).intersection(every)) or every

    def class_ids(self, prompts: Sequence[str]) -> list[int]:
        """Translate class numbers or names, as strings, to numbers.

        Raises:
            UsageError: an unknown name, with the nearest one, or a number out of range.
        """
        names: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        count = _num_classes(self.denoiser)
        ids: list[int] = []
        for prompt in prompts:
            text = prompt.strip()
            number = names.get(text, int(text) if text.isdecimal() and len(text) < 10 else -1)
            if number < 0 or (count is not None and number >= count):
                near = difflib.get_close_matches(text, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"classes are 0 to {count - 1}." if count else ""
                raise UsageError(
                    f"There is no class {text[:80]!r}",
                    where=f"prompt {len(ids) + 1}",
                    remedy=f"Use a class number{' or name' if names else ''}: {hint}",
                )
            ids.append(number)
        return ids

    def run(
        self,
        prompts: Sequence[str],
        indices: Sequence[int],
        settings: Generation,
        *,
        decode: bool = True,
        clock: StepClock | None = None,
        on_step: OnStep | None = None,
        keep_steps: bool = False,
        gradients: bool = False,
    ) -> Trajectory:
        """Make one picture for each prompt.

        Args:
            prompts: text, class numbers or names; ignored, but for their number, by an unconditional pipeline.
            indices: global index of each prompt; with `settings.seed` it fixes the noise.
            settings: how the pictures are made.
            decode: also decode the latents; without it the decoder is not run at all.
            clock: attached to the denoiser and the scheduler while this runs.
            on_step: called after each scheduler step with the steps done, their total, and the new latents.
            keep_steps: return the latents of every step.
            gradients: let latents have gradients, through all calls and steps; the decoder is then not run.

        Raises:
            UsageError: see `check`; also what the pipeline itself refuses before its first denoiser call.
            NotFiniteError: a prediction or latents are not finite; says at which step.
        """
        self.check(prompts, settings)
        if len(prompts) != len(indices):
            raise ValueError(f"{len(prompts)} prompts, but {len(indices)} indices")
        clock = clock or StepClock()
        firsts = range(0, len(prompts), settings.batch_size)
        parts = []
        for done, first in enumerate(firsts):
            batch = slice(first, first + settings.batch_size)

            def report(call: int, calls: int, latents: Tensor, done: int = done) -> None:
                if on_step:
                    on_step(done * calls + call, len(firsts) * calls, latents)

            decodes = decode and not gradients
            parts.append(
                self._run_batch(
                    *(prompts[batch], indices[batch], settings, decodes, clock, report, keep_steps, gradients)
                )
            )
        return _join(parts)

    def fingerprint(self) -> str:
        """Return the sha256 of everything that decides what a run makes: classes, configs and all weights."""
        digest = hashlib.sha256()
        for name, part in sorted(self.pipe.components.items()):
            config: Any = getattr(part, "config", None) or {}
            config = config.to_dict() if hasattr(config, "to_dict") else config
            config = {key: value for key, value in config.items() if key != "_name_or_path"}
            digest.update(json.dumps([name, type(part).__name__, config], sort_keys=True, default=str).encode())
            for key, tensor in sorted(part.state_dict().items()) if isinstance(part, nn.Module) else ():
                digest.update(f"{key} {tensor_sha256(tensor)}".encode())
        return digest.hexdigest()

    def _arguments(self, prompts: Sequence[str], settings: Generation) -> dict[str, Any]:
        conditions: dict[str, Any] = {"batch_size": len(prompts)}
        if self.kind == "text":
            conditions = {"prompt": list(prompts)}
        elif self.kind == "class":
            conditions = {"class_labels": self.class_ids(prompts)}
        given = {"guidance_scale": settings.guidance, "height": settings.height, "width": settings.width}
        fixed = {"num_inference_steps": settings.steps, "output_type": "pt"}
        # PixArt would round the size to one of a list and scale the picture back.
        fixed |= {"use_resolution_binning": False} if "use_resolution_binning" in self._accepted else {}
        return conditions | fixed | {name: value for name, value in given.items() if value is not None}

    def _run_batch(
        self,
        prompts: Sequence[str],
        indices: Sequence[int],
        settings: Generation,
        decode: bool,
        clock: StepClock,
        report: OnStep,
        keep_steps: bool,
        gradients: bool,
    ) -> Trajectory:
        generators = [picture_generator(settings.seed, index) for index in indices]
        steps: list[Tensor] = []
        where = ""  # of the last denoiser call; empty before the first

        def after_call(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal where
            where = f"call {clock.call}, step {clock.step}, timestep {clock.timestep:g}"
            _require_finite(prediction_of(output), "denoiser's prediction", where)

        def after_step(sample: Tensor) -> None:
            latents = sample[: len(prompts)]  # some pipelines carry every context's copy through the scheduler
            _require_finite(latents, "scheduler's latents", where)
            steps[:] = [*(steps if keep_steps else ()), (latents if gradients else latents.detach()).cpu()]
            calls = len(self.scheduler.timesteps)
            report(clock.call, calls, latents)
            if not decode and clock.call >= calls:
                raise _LatentsReady

        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
            torch.manual_seed(_seed(settings.seed, indices[0]))  # for noise that a pipeline draws without a generator
            stack.enter_context(clock.attach(self.denoiser, self.scheduler))
            stack.enter_context(_watch_steps(self.scheduler, generators, after_step))
            hook = self.denoiser.register_forward_hook(after_call)
            stack.callback(hook.remove)
            try:
                make = type(self.pipe).__call__
                make = getattr(make, "__wrapped__", make) if gradients else make  # diffusers' own is without gradients
                output = make(self.pipe, generator=generators, **self._arguments(prompts, settings))
            except _LatentsReady:
                self.pipe.maybe_free_model_hooks()
                output = None
            except ValueError as error:
                if where:
                    raise
                raise UsageError(
                    f"{type(self.pipe).__name__} refuses these settings: {error}",
                    where=str(self.source),
                    remedy="Change the height, the width, the prompts or the scheduler.",
                ) from error
        images = None if output is None or not decode else _to_images(output)
        flags = getattr(output, "nsfw_content_detected", None) or []
        blanked = tuple(position for position, flag in enumerate(flags) if flag)
        return Trajectory(steps[-1], steps if keep_steps else None, images, blanked)


def open_pipeline(
    model: str | Path,
    *,
    scheduler: str | None = None,
    device: str | torch.device = "cpu",
    torch_dtype: torch.dtype | None = None,
    low_memory: bool | None = False,
) -> OpenPipeline:
    """Open a local pipeline folder, or a model of the hub, compressed by dcomp or not.

    Args:
        model: folder with a `model_index.json`, or a hub id `owner/name`.
        scheduler: class name of another diffusers scheduler to sample with; "Scheduler" may be left out.
        device: where the pipeline runs.
        torch_dtype: dtype of float weights; float32 unless given.
        low_memory: leave the matrices of a float32 denoiser in their files, see `stored_weights`; None: if they are
            large. Its results are the same bits.

    Raises:
        UsageError: the folder, scheduler or device cannot be used as given.
    """
    with quiet():
        folder = check_model_folder(local_folder(model))
        check_finite(folder.denoiser)
        from diffusers import DiffusionPipeline

        part, given = folder.denoiser, {}
        if low_memory is None:  # float32 files are mapped into memory as they are
            low_memory = is_large(sum(4 * info.numel for info in part.tensors.values() if info.dtype != "F32"))
        if low_memory and torch_dtype in (None, torch.float32) and part.quant_method is None:
            given[folder.denoiser_name] = open_stored(part)
        pipe = DiffusionPipeline.from_pretrained(
            folder.path,
            local_files_only=True,
            use_safetensors=True,
            variant=folder.variant,
            torch_dtype=torch_dtype or torch.float32,
            **given,
        )
        if scheduler is not None:
            pipe.scheduler = other_scheduler(pipe.scheduler, scheduler)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        try:
            pipe.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"The pipeline cannot be moved to the device {device!s}: {str(error).splitlines()[0]}",
                where="device",
                remedy="Run `dcomp doctor` to see what this machine has, or use the device cpu.",
            ) from error
    return OpenPipeline(pipe, folder.path)


def picture_generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of one picture; it lives on the CPU, so that all devices start from the same noise."""
    return torch.Generator().manual_seed(_seed(seed, index))


def prediction_of(output: Any) -> Tensor:
    """Return the prediction in whatever a denoiser's forward returned: a tensor, a tuple, or a diffusers output."""
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    return prediction


def _num_classes(denoiser: nn.Module) -> int | None:
    """Return how many classes a class-conditional denoiser has embeddings for, or None."""
    config = getattr(denoiser, "config", {})
    counts = [config.get(name) for name in ("num_class_embeds", "num_embeds_ada_norm")]
    return next((count for count in counts if isinstance(count, int)), None)


class _LatentsReady(Exception):  # noqa: N818 - no error: it ends a pipeline before its decoder
    pass


def _seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def _watch_steps(
    scheduler: Any, generators: Sequence[torch.Generator], after: Callable[[Tensor], None]
) -> Iterator[None]:
    """Give `scheduler.step` the pictures' generators where the pipeline does not, and look at what it returns."""
    covered = vars(scheduler).get("step")
    inner = scheduler.step
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise UsageError(
                f"{type(scheduler).__name__} cannot sample in this pipeline, which calls it otherwise: {error}",
                where="scheduler",
                remedy="Use the pipeline's own scheduler, or one of its kind.",
            ) from error
        if "generator" in signature.parameters and given.get("generator") is None:
            rows = len(given["sample"])
            kwargs["generator"] = [generators[row % len(generators)] for row in range(rows)]
        result = inner(*args, **kwargs)
        after(result[0])
        return result

    scheduler.step = step
    try:
        yield
    finally:
        if covered is None:
            del scheduler.step
        else:
            scheduler.step = covered


def _require_finite(tensor: Tensor, what: str, where: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NotFiniteError(
            f"The {what} holds NaN or infinity",
            where=where,
            remedy="Check the weights, use float32, or lower the guidance.",
        )


def _to_images(output: Any) -> Tensor:
    images = getattr(output, "images", None)
    if images is None:
        raise UsageError(
            f"The pipeline returned {type(output).__name__}, which holds no pictures",
            remedy="Use a pipeline that makes pictures.",
        )
    tensor = images if isinstance(images, Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)
    return tensor.detach().float().cpu().clamp(0, 1).contiguous()


def _join(parts: list[Trajectory]) -> Trajectory:
    per_step = [part.step_latents for part in parts if part.step_latents is not None]
    images = [part.images for part in parts if part.images is not None]
    starts = [sum(len(part.latents) for part in parts[:position]) for position in range(len(parts))]
    return Trajectory(
        torch.cat([part.latents for part in parts]),
        [torch.cat(step) for step in zip(*per_step, strict=True)] if per_step else None,
        torch.cat(images) if images else None,
        tuple(start + at for start, part in zip(starts, parts, strict=True) for at in part.blanked),
    )
