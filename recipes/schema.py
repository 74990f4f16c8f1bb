"""What a recipe may say: every key, its type, its bounds and its default.

A recipe is data. It holds no tensor, no path of its own output, nothing that changes between two machines, so its hash
names the work that it describes. Unknown keys are refused by `load.py` with the nearest known one.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from dcomp import UsageError
from dcomp.cachequant.budget import Budget

Preset = Literal["w8a8", "w4a8", "w4a16", "w8a16", "w4a4", "float"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
Planner = Literal[
    "joint", "uniform", "power", "partition", "cosine", "taylor", "hermite", "stage", "blockwise", "evolve"
]
Pattern = Annotated[str, Field(min_length=1, max_length=500)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Calibration(_Frozen):
    """How the calibration set is recorded: the deployed sampler's own trajectories.

    Attributes:
        prompts: file (txt, csv, json, jsonl, parquet) or `datasets` name; none: the model's own or built-in ones.
        column: column or key of a table that holds the prompts.
        samples: number of trajectories.
        steps: scheduler steps of each, the number that will be deployed.
        guidance: guidance scale; none: the pipeline's default.
        scheduler: diffusers scheduler class to deploy with; none: the model's own.
        height, width: picture size in pixels; none: the pipeline's default.
        sampling: which calls are kept: `uniform` over the trajectory, or `normal`, drawn around `mu` with `sigma`, both
            as parts of the trajectory from the picture (0) to the noise (1).
        along: cache plan that the trajectories follow, `FILE.json:NAME`; none: every call is computed.
        max_calls: denoiser calls kept of each trajectory.
        max_megabytes: bound of the set on disk.
    """

    prompts: str | None = None
    column: str | None = None
    samples: Annotated[int, Field(ge=1, le=65_536)] = 64
    steps: Annotated[int, Field(ge=1, le=10_000)] = 20
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    scheduler: str | None = None
    height: Annotated[int, Field(ge=8, le=16_384)] | None = None
    width: Annotated[int, Field(ge=8, le=16_384)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_size: Annotated[int, Field(ge=1, le=1_024)] = 8
    sampling: Literal["uniform", "normal"] = "uniform"
    mu: Annotated[float, Field(ge=0, le=1)] = 0.4
    sigma: Annotated[float, Field(gt=0, le=10)] = 0.4
    along: str | None = None
    max_calls: Annotated[int, Field(ge=1, le=1_000)] = 25
    max_megabytes: Annotated[int, Field(ge=1, le=1_000_000)] = 2_048


class PruneStage(_Frozen):
    """Cut the denoiser: whole blocks and branches, heads, hidden channels, groups of norms.

    Attributes:
        method: `reconstruction` tries each cut, with what stays making up for what goes; `masks` learns gates of
            members over whole trajectories; `magnitude`, `taylor` and `random` sum up scores of weights.
        parameters: part of all parameters that goes; none: 0.2, if there is no other budget.
        macs: part of the multiply-accumulates of a call that goes.
        max_megabytes: what may be left of the denoiser, in its own dtype, in millions of bytes.
        round_to: channels that stay of heads, hidden channels and groups are a multiple of this, where there are so
            many.
        pin: patterns of what stays whole, and with it what lies around it; of a module that cannot be cut itself, all
            within it.
        tie: sets of patterns; all that one of a set names is cut alike, or not at all.
        contiguous: blocks of a list that go lie side by side.
        rows: samples of recorded calls that errors are measured on.
        proposals: best choices that are made and compared by final latents.
        recover: what learns again what the whole model predicts: all parameters (`full`), updates of low rank that are
            merged at the end (`lora`), norms and biases (`norms`), or nothing (`none`).
        recover_iterations: steps of that at most.
        recover_samples: trajectories that are learned from, at most; as many as its steps need.
        recover_features: also compare what stages and blocks return.
        recover_guidance: learn the guided prediction in one context, so that calls run half the rows from then on; then
            no features are compared.
    """

    kind: Literal["prune"] = "prune"
    method: Literal["reconstruction", "masks", "magnitude", "taylor", "random"] = "reconstruction"
    parameters: Annotated[float, Field(gt=0, lt=1)] | None = None
    macs: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_megabytes: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    round_to: Annotated[int, Field(ge=1, le=4_096)] = 32
    pin: Annotated[tuple[Pattern, ...], Field(max_length=1_000)] = ()
    tie: Annotated[tuple[tuple[Pattern, ...], ...], Field(max_length=1_000)] = ()
    contiguous: bool = False
    rows: Annotated[int, Field(ge=1, le=65_536)] = 32
    proposals: Annotated[int, Field(ge=1, le=64)] = 4
    recover: Literal["none", "full", "lora", "norms"] = "none"
    recover_iterations: Annotated[int, Field(ge=1, le=10_000_000)] = 1_000
    recover_samples: Annotated[int, Field(ge=1, le=65_536)] = 256
    recover_features: bool = True
    recover_guidance: bool = False

    @model_validator(mode="after")
    def _recovery_learns_guidance(self) -> Self:
        if self.recover_guidance and self.recover == "none":
            raise ValueError("recover_guidance needs recover: full, lora or norms")
        return self


class QuantizeStage(_Frozen):
    """Quantize the denoiser's linear and convolution layers.

    Attributes:
        preset: bits of weights and activations for each role of a layer; `float` leaves every layer as it is.
        format: `dcomp` runs in integers; `quanto` and `bnb` store weights in those packages' formats.
        rounding: how codes of weights are chosen: `nearest`; `gptq` moves the error of each code on to those that can
            still correct it; `adaround` then learns the codes of each block, and chooses those of time together.
        inputs: 8-bit ranges of convolutions: `dynamic` finds them while running, `static` has tables for the steps.
        step_bins: rows of static tables over the trajectory, at most one a calibrated step.
        bins: how timesteps are put into them: equally many in each, by measured drift of the ranges, or by log-SNR.
        weight_range, input_range: how ranges are chosen: least squared error, or minimum and maximum.
        split: layers that read a concatenation and get quantizers of their own for each part of it: those that read
            it directly, all of them, or none.
        smooth: move magnitude from inputs to weights, where that lowers the error; none: layers with 4-bit inputs.
        fold: make the factors of inputs part of what makes the inputs, where nothing else reads them.
        input_group: channels of a 4-bit input that share a multiplier; 0: all channels of a row or pixel.
        rotate: rotate inputs and weights of layers with 4-bit inputs by a Hadamard matrix, where that lowers the error;
            none: yes.
        directions: of the input of layers with 4-bit weights or inputs, those with most of its energy, that are taken
            out before rounding and multiplied in float; none: 8 with 4-bit inputs, fewer below 64 channels.
        rank: of a float branch beside the weight of layers with 4-bit inputs; 0 for no branch.
        temporal: layers that depend on the timestep alone: stay `layers`, become tables of their outputs at the
            deployed timesteps (`cache`), or tables where that is closer to float (`choose`).
        ahead: layers that depend on the timestep and on conditions of the whole picture, such as a class or pooled
            text, run at each step (`off`), for all steps at once (`on`), or so with their weights in memory only then
            (`offload`), where `dcomp.load` is not told otherwise.
        target_bits: bits a parameter, over all parameters; weights get 4 or 8 bits, where each does least harm.
        max_megabytes: the same with a size of the denoiser as the budget, in millions of bytes.
        max_milliseconds: the same with the time of one denoiser call for one sample on this machine, guidance included;
            layers may also stay float.
        min_speedup: the same time, as how many times as fast as the float denoiser a call must be.
        rows: samples of recorded calls that ranges and codes are chosen with.
        block_iterations: steps in which the codes of a block are learned, with `adaround`.
        tune: iterations of tuning scales, biases and norms against the float model's predictions; kept if final latents
            get better.
        tune_rounding: then tune the codes as well, for as many iterations, judged in the same way.
        correct: after all else, give outputs of layers a scale and a bias in each step bin, where that lowers errors.
        keep: layer name patterns to leave in float, in addition to what the preset leaves.
        overrides: layer name pattern -> scheme such as `W8A8`, strongest rule last.
    """

    kind: Literal["quantize"] = "quantize"
    preset: Preset = "w4a8"
    format: Literal["dcomp", "quanto", "bnb"] = "dcomp"
    rounding: Literal["nearest", "gptq", "adaround"] = "gptq"
    inputs: Literal["dynamic", "static"] = "dynamic"
    step_bins: Annotated[int, Field(ge=1, le=1_000)] = 25
    bins: Literal["uniform", "drift", "log_snr"] = "uniform"
    weight_range: Literal["mse", "minmax"] = "mse"
    input_range: Literal["mse", "minmax"] = "mse"
    split: Literal["direct", "all", "none"] = "direct"
    smooth: bool | None = None
    fold: bool = True
    input_group: Annotated[int, Field(ge=0, le=65_536, multiple_of=2)] = 32
    rotate: bool | None = None
    directions: Annotated[int, Field(ge=0, le=1_024)] | None = None
    rank: Annotated[int, Field(ge=0, le=1_024)] = 0
    temporal: Literal["layers", "cache", "choose"] = "layers"
    ahead: Literal["off", "on", "offload"] = "off"
    target_bits: Annotated[float, Field(gt=0, le=32)] | None = None
    max_megabytes: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    max_milliseconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    min_speedup: Annotated[float, Field(gt=0, le=1_000)] | None = None
    rows: Annotated[int, Field(ge=1, le=65_536)] = 256
    block_iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 300
    tune: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    tune_rounding: bool = False
    correct: bool = False
    keep: Annotated[tuple[Pattern, ...], Field(max_length=1_000)] = ()
    overrides: Annotated[dict[Pattern, str], Field(max_length=1_000)] = {}

    @model_validator(mode="after")
    def _budget_has_layers(self) -> Self:
        if self.has_budget and (self.preset == "float" or self.format != "dcomp"):
            raise ValueError("target_bits and budgets need a preset that quantizes and the format dcomp")
        return self

    @property
    def has_budget(self) -> bool:
        """Whether the precision of each layer is chosen under a budget."""
        budgets = (self.target_bits, self.max_megabytes, self.max_milliseconds, self.min_speedup)
        return any(budget is not None for budget in budgets)

    @field_validator("overrides")
    @classmethod
    def _known_schemes(cls, overrides: dict[str, str]) -> dict[str, str]:
        for pattern, label in overrides.items():
            if label.lower() not in PRESETS:
                raise ValueError(f"'{label}' for '{pattern}' is not one of {', '.join(PRESETS)}")
        return overrides


class ScheduleStage(_Frozen):
    """Search cache plans for the model that the stages before have made, as it runs.

    Attributes:
        budgets: what the denoiser's calls for one picture may take together, such as `2x` or `800ms`.
        planner: `joint`, or a rule of the literature.
        samples: pictures of the search, and as many others to compare plans on.
        unrounded_calls: let calls that compute leave the inputs of quantized layers unrounded where that pays.
        correct: correct predictions for each channel, or by one scale, where that makes pictures better.
        one_context: let calls run one of guidance's two contexts, and predict how far the other one is from it.
        ladder: plan the original too, and show what bits and plans cost alone and together.
    """

    kind: Literal["schedule"] = "schedule"
    budgets: Annotated[tuple[Annotated[str, Field(max_length=50)], ...], Field(min_length=1, max_length=64)] = (
        "1.5x",
        "2x",
        "3x",
        "4x",
    )
    planner: Planner = "joint"
    samples: Annotated[int, Field(ge=1, le=1_000)] = 6
    unrounded_calls: bool = False
    correct: Literal["affine", "scale"] | None = None
    one_context: bool = False
    ladder: bool = False

    @field_validator("budgets")
    @classmethod
    def _are_budgets(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(Budget.parse(text).name for text in budgets)
        except UsageError as error:
            raise ValueError(str(error)) from error


def _kind(data: Any) -> str:
    kind = data.get("kind", "quantize") if isinstance(data, dict) else getattr(data, "kind", "quantize")
    return kind if isinstance(kind, str) else ""


Stage = Annotated[
    Annotated[PruneStage, Tag("prune")]
    | Annotated[QuantizeStage, Tag("quantize")]
    | Annotated[ScheduleStage, Tag("schedule")],
    Discriminator(_kind),
]
KINDS = ("prune", "quantize", "schedule")  # of stages, in the order in which they run


class Recipe(_Frozen):
    """Stages, at most one of each kind, with the calibration that they share.

    Attributes:
        lora: adapters `PATH[:scale]`, fused into the weights before anything else.
    """

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(max_length=100)] = "custom"
    lora: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    calibration: Calibration = Calibration()
    stages: Annotated[tuple[Stage, ...], Field(max_length=len(KINDS))] = ()

    @property
    def prune(self) -> PruneStage | None:
        """The stage that prunes, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, PruneStage)), None)

    @property
    def quantize(self) -> QuantizeStage | None:
        """The stage that quantizes, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, QuantizeStage)), None)

    @property
    def schedule(self) -> ScheduleStage | None:
        """The stage that searches cache plans, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, ScheduleStage)), None)

    def without(self, kind: str) -> "Recipe":
        """Return the recipe without the stage of a kind."""
        return self.model_copy(update={"stages": tuple(stage for stage in self.stages if stage.kind != kind)})

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        order = [KINDS.index(stage.kind) for stage in self.stages]
        if order != sorted(set(order)):
            raise ValueError(f"stages must be at most one of each kind, in the order {', '.join(KINDS)}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as JSON data, every default explicit."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """Return the sha256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
