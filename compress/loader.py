"""Open compressed checkpoints: the classes that diffusers calls, and `load` with friendlier errors.

`DcompQuantizer` makes plain `from_pretrained` give quantized layers: it replaces the listed layers while the model is
still on the meta device and hands over every stored tensor in exactly its stored dtype, in aligned memory. It refuses
configs that name unknown layers, and weights that are missing, unexpected, or of another shape or dtype.

This module is imported in the middle of diffusers' own import, so diffusers' pipelines are only touched in functions.
"""

import inspect
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from dcomp import DcompError, UsageError, __version__
from dcomp.calibrate.clock import StepBins, StepClock, clock_of
from dcomp.calibrate.config_match import build_on_meta
from dcomp.calibrate.model_files import Component, check_model_folder
from dcomp.calibrate.structure import is_layer
from dcomp.compress.attention import attend_by_kernels
from dcomp.compress.layers import QuantLayer
from dcomp.compress.manifest import CheckpointError, check_manifest, read_manifest
from dcomp.compress.precompute import Ahead, Precomputed, keep_plan, plan_of, precompute
from dcomp.compress.pruning.cut import cut, cuts_of
from dcomp.compress.pruning.cut_list import CutError, CutList
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import empty_layer, quantized_layers
from dcomp.compress.time_table import TimeTable, from_config, to_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

QUANT_METHOD = "dcomp"
SCHEMA = 1
MAX_LAYERS = 100_000
MAX_BINS = 1_000
_REMEDY = "Download the checkpoint again or compress the model again"
# What torch's allocator guarantees and vector kernels may ask for; a mapped file promises much less.
_ALIGNMENT = 64


class _Method(StrEnum):
    DCOMP = QUANT_METHOD


class DcompQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a denoiser's config.json.

    Attributes:
        schema: version of this format.
        dcomp_version: version that wrote it.
        step_bins: which row of the tables serves which timestep; None where no layer has tables.
        schemes: scheme id -> scheme.
        layers: layer name -> scheme id.
        features: layer name -> its table of temporal features, see `time_table.to_config`.
        precomputed: layers that run once a picture, for all timesteps; None without any.
        cuts: what was cut out of the model that the config describes.
    """

    def __init__(
        self,
        layers: Mapping[str, str] | None = None,
        schemes: Mapping[str, Mapping[str, Any]] | None = None,
        features: Mapping[str, Any] | None = None,
        step_bins: Mapping[str, Any] | None = None,
        precomputed: Mapping[str, Any] | None = None,
        cuts: Mapping[str, Any] | None = None,
        schema: int = SCHEMA,
        dcomp_version: str = __version__,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if schema != SCHEMA or quant_method != QUANT_METHOD:
            raise CheckpointError(
                f"The checkpoint has the schema {str(schema)[:20]!r}, known is {SCHEMA}",
                where="quantization_config",
                remedy="Open it with the version of dcomp that wrote it",
            )
        self.quant_method: Any = _Method.DCOMP  # diffusers' own enum knows only built-in methods
        self.schema = SCHEMA
        self.dcomp_version = str(dcomp_version)[:100]
        self.step_bins = _read_bins(step_bins)
        self.schemes = {str(key): _read_scheme(key, value) for key, value in _mapping(schemes, "schemes").items()}
        self.layers = {str(name): str(key) for name, key in _mapping(layers, "layers").items()}
        for name, key in self.layers.items():
            if key not in self.schemes:
                raise _broken(f"Layer {name[:80]!r} names the unknown scheme {key[:80]!r}", "layers")
        self.features = dict(_mapping(features, "features"))
        self.precomputed = None if precomputed is None else Precomputed.from_dict(precomputed)
        self.cuts = CutList() if cuts is None else CutList.from_dict(cuts)

    @classmethod
    def from_denoiser(cls, denoiser: nn.Module) -> "DcompQuantizationConfig":
        """Describe the quantized layers that a denoiser has now, and what was cut out of it."""
        layers = quantized_layers(denoiser)
        distinct = sorted(
            {layer.scheme for layer in layers.values()}, key=lambda s: json.dumps(s.to_dict(), sort_keys=True)
        )
        keys: dict[QScheme, str] = {}
        for scheme in distinct:
            same = sum(other.label == scheme.label for other in keys)
            keys[scheme] = f"{scheme.label}-{same + 1}" if same else scheme.label
        bins = next((layer.clock.bins for layer in layers.values() if layer.clock and layer.clock.bins), None)
        precomputed = plan_of(denoiser)
        return cls(
            layers={name: keys[layer.scheme] for name, layer in layers.items()},
            schemes={key: scheme.to_dict() for scheme, key in keys.items()},
            features=to_config(denoiser),
            step_bins=bins.to_dict() if bins else None,
            precomputed=precomputed.to_dict() if precomputed else None,
            cuts=cuts_of(denoiser).to_dict(),
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the section of config.json; unknown keys are refused.

        Raises:
            CheckpointError: a key is unknown or a value impossible.
        """
        known = set(inspect.signature(cls).parameters)
        unknown = sorted(str(key)[:80] for key in config_dict if key not in known)
        if unknown:
            raise _broken(f"The key {unknown[0]!r} is unknown", "quantization_config")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "quant_method": QUANT_METHOD,
            "schema": self.schema,
            "dcomp_version": self.dcomp_version,
            "step_bins": self.step_bins.to_dict() if self.step_bins else None,
            "schemes": {key: scheme.to_dict() for key, scheme in self.schemes.items()},
            "layers": dict(self.layers),
            "features": dict(self.features),
            "precomputed": self.precomputed.to_dict() if self.precomputed else None,
            "cuts": self.cuts.to_dict(),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the JSON form; nothing in it is a default worth leaving out."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


class DcompQuantizer(DiffusersQuantizer):
    """Load a compressed denoiser; diffusers calls these methods in the order in which they stand here."""

    requires_calibration = True
    use_keep_in_fp32_modules = True  # layers that their model wants in float32 stay so under any dtype
    quantization_config: DcompQuantizationConfig

    def __init__(self, quantization_config: DcompQuantizationConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise CheckpointError(
                "A model cannot be quantized by dcomp while diffusers opens it",
                where="quantization_config",
                remedy="Run `dcomp quantize` on the model folder",
            )
        super().__init__(quantization_config, **kwargs)
        self._loaded: set[str] = set()

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse offloading to disk, which stores tensors in the dtype that the user asked for."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise CheckpointError(
                "Quantized layers cannot be offloaded to disk",
                where="device_map",
                remedy="Use a device map of memories only",
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember which tensors the files hold."""
        self._loaded = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        bins = config.step_bins.count if config.step_bins else 1
        try:
            cut(model, config.cuts)
        except CutError as error:
            raise _broken(str(error), error.where or "cuts") from error
        for name, key in config.layers.items():
            parent, leaf = _parent_of(model, name)
            setattr(parent, leaf, _empty_layer(name, getattr(parent, leaf), config.schemes[key], bins))
        from_config(model, config.features)
        model.config.quantization_config = config

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse weights that are incomplete or hold more than the model; diffusers alone would only warn."""
        expected = model.state_dict().keys()
        for names, fault in ((missing_keys, "missing"), (self._loaded - expected, "not part of the model")):
            if names:
                raise _broken(f"{len(names)} tensor(s) {fault}, the first is {min(names)[:80]!r}", "weights")
        return missing_keys

    def check_if_quantized_param(self, *_: Any, **__: Any) -> bool:
        """Take every tensor: all of them need aligned memory, and those of our layers their stored dtype."""
        return True

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        """Refuse a tensor of another shape."""
        raise _broken(
            f"Tensor {param_name!r} has the shape {list(loaded_param.shape)} instead of "
            f"{list(getattr(current_param, 'shape', current_param))}",
            "weights",
        )

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> None:
        """Put one tensor in its place.

        Tensors of quantized layers come from the state dict, because `param_value` is already cast to the dtype that
        the user asked for.
        """
        path, _dot, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        expected = module.get_parameter(leaf) if leaf in module._parameters else module.get_buffer(leaf)
        stored = state_dict[param_name]
        if isinstance(module, QuantLayer | TimeTable) and leaf in module._buffers:
            if stored.dtype != expected.dtype:
                raise _broken(f"Tensor {param_name!r} is {stored.dtype} instead of {expected.dtype}", "weights")
            if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
                raise _broken(f"Tensor {param_name!r} holds NaN or infinity", "weights")
            param_value = stored
        elif stored.is_floating_point() != expected.is_floating_point():
            raise _broken(f"Tensor {param_name!r} is {stored.dtype} instead of {expected.dtype}", "weights")
        value = param_value.to(target_device)
        if value.data_ptr() % _ALIGNMENT:
            value = value.clone()
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=expected.requires_grad)
        else:
            module._buffers[leaf] = value

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, TimeTable):
                module.check()
        attach_clock(model, self.quantization_config.step_bins)
        attend_by_kernels(model)
        if self.quantization_config.precomputed is not None:
            keep_plan(model, self.quantization_config.precomputed)
        if not self.quantization_config.layers:
            vars(model)["is_quantized"] = (
                False  # float weights, whatever was cut: they may be cast, trained and quantized
            )
        return model

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` writes the same tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer weights have no gradient."""
        return not self.quantization_config.layers

    @property
    def is_compileable(self) -> bool:
        """The layers are made of registered operators."""
        return True


def attach_clock(denoiser: nn.Module, bins: StepBins | None) -> StepClock:
    """Give quantized layers and tables of a denoiser one clock that follows its calls, and keep it as `dcomp_clock`."""
    clock = clock_of(denoiser)
    clock.bins = bins
    for layer in quantized_layers(denoiser).values():
        layer.clock = clock
    tables = [module for module in denoiser.modules() if isinstance(module, TimeTable)]
    for table in tables:
        table.clock = clock
    clock.table_timesteps = tuple({t: None for table in tables for t in table.timesteps.tolist()})
    return clock


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    torch_dtype: torch.dtype | None = None,
    check: Literal["fast", "full", "none"] = "fast",
    ahead: Ahead | None = None,
) -> "DiffusionPipeline":
    """Open a compressed checkpoint as a diffusers pipeline.

    Args:
        folder: output of `dcomp quantize`.
        device: where the pipeline shall run.
        torch_dtype: dtype of what stayed in float, in all components; float32 unless given, since components may be
            stored in several. Integer weights and their scales keep theirs.
        check: "fast" compares the manifest with all small files, "full" with every byte, "none" with nothing.
        ahead: what becomes of layers that read the timestep and conditions of the whole picture: "off" runs them at
            each step; "on" runs them for all steps at once, when the second one begins; "offload" likewise, and their
            weights are in memory only then: the folder must stay as it is. None does what the recipe said.

    Raises:
        CheckpointError: not a dcomp checkpoint, changed since it was written, or damaged.
        ModelError: the pipeline around the denoiser is damaged.
        UsageError: there is no such device, or no layer can run ahead.
    """
    from diffusers import DiffusionPipeline

    if check not in ("fast", "full", "none"):
        raise CheckpointError(f"There is no check {check!r}", where="check", remedy="Use fast, full or none")
    root = Path(folder).expanduser()
    if check == "none":
        read_manifest(root)
    else:
        check_manifest(root, deep=check == "full")
    model = check_model_folder(root)
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(
            str(model.path), dtype=torch_dtype or torch.float32, use_safetensors=True, local_files_only=True
        )
    except DcompError:
        raise
    except Exception as error:  # whatever diffusers and transformers raise on files that only look right
        raise CheckpointError(
            f"diffusers cannot open the checkpoint: {type(error).__name__}: {str(error)[:300]}",
            where=str(root),
            remedy=_REMEDY,
        ) from error
    try:
        opened: DiffusionPipeline = pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"The pipeline cannot be moved to the device {device!s}: {str(error).splitlines()[0][:200]}",
            where="device",
            remedy="Run `dcomp doctor` to see what this machine has, or use the device cpu",
        ) from error
    run_layers_ahead(getattr(opened, model.denoiser.name), ahead, model.denoiser)
    return opened


def empty_denoiser(component: Component) -> nn.Module:
    """Return a checkpoint's denoiser as `load` makes it, but without any values.

    Args:
        component: checked, and of our format.

    Raises:
        CheckpointError: its config names layers that the model has not, or schemes that they cannot have.
        ModelError: the model cannot be built.
    """
    where = str(component.path)
    model = build_on_meta(component.class_name, component.config, len(component.tensors), where)
    config = DcompQuantizationConfig.from_dict(dict(component.config["quantization_config"]))
    DcompQuantizer(config)._process_model_before_weight_loading(model)
    return model


def run_layers_ahead(denoiser: nn.Module, ahead: str | None, component: Component) -> None:
    """Do with a denoiser what `load` says of `ahead`.

    Args:
        denoiser: opened from a checkpoint.
        ahead: as there.
        component: of the checkpoint.
    """
    if ahead is None:
        plan = plan_of(denoiser)
        ahead = plan.ahead if plan else "off"
    if ahead not in get_args(Ahead):
        raise UsageError(
            f"Layers cannot run ahead in the way {ahead!r}", where="ahead", remedy=f"Use {', '.join(get_args(Ahead))}."
        )
    if ahead != "off":
        precompute(denoiser, component.weights.values() if ahead == "offload" else None)


def _broken(problem: str, place: str) -> CheckpointError:
    return CheckpointError(problem, where=place, remedy=_REMEDY)


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_LAYERS:
        raise _broken(f"{place!r} must be an object with at most {MAX_LAYERS} entries", "quantization_config")
    return value


def _read_scheme(key: Any, value: Any) -> QScheme:
    try:
        return QScheme.from_dict(_mapping(value, "schemes"))
    except (TypeError, ValueError, DcompError) as error:
        raise _broken(f"The scheme {str(key)[:80]!r} is impossible: {str(error)[:200]}", "schemes") from error


def _read_bins(value: Any) -> StepBins | None:
    if value is None or isinstance(value, StepBins):
        return value
    try:
        bins = StepBins.from_dict(value)
    except (TypeError, ValueError, DcompError) as error:
        raise _broken(f"The step bins are impossible: {str(error)[:200]}", "step_bins") from error
    if bins.count > MAX_BINS or not all(math.isfinite(t) for t in bins.timesteps):
        raise _broken(f"There are more than {MAX_BINS} step bins", "step_bins")
    return bins


def _parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _dot, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
    except AttributeError as error:
        raise _broken(f"The model has no layer {name[:80]!r}", "layers") from error
    if leaf not in parent._modules:
        raise _broken(f"The model has no layer {name[:80]!r}", "layers")
    return parent, leaf


def _empty_layer(name: str, layer: nn.Module, scheme: QScheme, bins: int) -> nn.Module:
    if not is_layer(layer):
        raise _broken(f"Layer {name[:80]!r} is a {type(layer).__name__}, which is never quantized", "layers")
    try:
        with torch.device("meta"):
            return empty_layer(layer, scheme, bins)
    except (DcompError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise _broken(f"Layer {name[:80]!r} cannot have its scheme: {str(error)[:200]}", "layers") from error


def _register() -> None:
    auto = import_module("diffusers.quantizers.auto")
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = DcompQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = DcompQuantizationConfig


_register()
