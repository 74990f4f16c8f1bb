"""Every command: parse, call one library function, print its result.

Results go to stdout (`--json` for the machine form), everything else to stderr. Exit codes: 0 good, 1 failed, 2 wrong
use or input, 3 valid but not good enough, 130 interrupted. Heavy libraries are imported inside the commands, so that
`--help` answers at once.
"""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dcomp import DcompError, UsageError, __version__

NOT_GOOD_ENOUGH = 3
INTERRUPTED = 130

app = typer.Typer(
    name="dcomp",
    help="Compress diffusion models: quantize to int4/int8, run in integers, prove that the pictures are still good.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with:  [bold]dcomp demo[/]   ·   then:  [bold]dcomp quantize --w4a8 MODEL[/]",
)

Model = Annotated[str, typer.Argument(help="A diffusers folder, or a hub id.", metavar="MODEL")]
Checkpoint = Annotated[Path, typer.Argument(help="A folder that dcomp wrote (or any diffusers folder).", metavar="OUT")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write; default: MODEL's name and the recipe's.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any field of the recipe, KEY=VALUE, repeatable.")]
Prompts = Annotated[str | None, typer.Option(help="FILE.txt|csv|json|jsonl|parquet, or a datasets name.")]
Column = Annotated[str | None, typer.Option(help="Column of a table that holds the prompts.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Number of prompts used.")]
Steps = Annotated[int | None, typer.Option(help="Scheduler steps, the number you deploy.")]
StepsAgain = Annotated[int | None, typer.Option(help="Scheduler steps; default: as OUT was calibrated.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale; default: the pipeline's own.")]
GuidanceAgain = Annotated[float | None, typer.Option(min=0, help="Guidance scale; default: as OUT was calibrated.")]
Scheduler = Annotated[str | None, typer.Option(help="diffusers scheduler class, e.g. DPMSolverMultistepScheduler.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Base seed; every sample's seed follows from it and its number.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures that are made together.")]
Along = Annotated[str | None, typer.Option(help="Cache plan FILE.json:2x: calibrate on the trajectory it makes.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Fresh = Annotated[
    bool, typer.Option("--fresh/--resume", help="Throw away the work of an interrupted run, or go on with it.")
]
LowMemory = Annotated[
    bool | None,
    typer.Option(
        "--low-memory/--no-low-memory",
        help="Leave float weights in files, and read them when they are used. Default: if they are large.",
    ),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Show the worst layers with their reasons, and draw errors over steps.")
]
Plot = Annotated[
    Path | None, typer.Option(help="FILE.png|svg|pdf for the picture of --explain; default: beside the output.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that exists.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe, the plan and its cost; write nothing.")
]
Lora = Annotated[
    list[str] | None, typer.Option(help="Adapter PATH[:scale] to fuse into the weights first, repeatable.")
]


def main() -> None:
    """Run the program; a `DcompError` becomes one screen and its exit code."""
    if sys.stdout.encoding and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    _hush_imports()
    try:
        app()
    except DcompError as error:
        if os.environ.get("DCOMP_DEBUG"):
            raise
        from dcomp.recipes.console import print_error

        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _hush_imports() -> None:
    """Keep the advice that other packages log while they are imported off the screen."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dcomp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _resolve(
    preset_flags: dict[str, bool], recipe: str | None, overrides: list[str] | None, values: dict[str, Any]
) -> Any:
    from dcomp.recipes.load import load_recipe

    chosen = [name for name, wanted in preset_flags.items() if wanted]
    if len(chosen) + (recipe is not None) > 1:
        named = [f"--{name}" for name in chosen] + (["--recipe"] if recipe else [])
        raise UsageError(f"{' and '.join(named)} exclude each other", remedy="Give one of them.")
    default = "w4a8" if values.get("stages.quantize.format") in (None, "dcomp") else "w8a16"
    source = recipe or (chosen[0] if chosen else default)
    return load_recipe(source, overrides or (), values)


def _calibration(**options: Any) -> dict[str, Any]:
    """Return the keys of a recipe that options of the calibration stand for."""
    return {f"calibration.{key}": value for key, value in options.items()}


def _named_settings(method: str | None, quality: str | None) -> dict[str, Any]:
    from dcomp.recipes.methods import settings_of

    return {f"stages.quantize.{key}": value for key, value in settings_of(method, quality).items()}


_BUDGETS = {
    "KB": ("max_megabytes", 1e-3),
    "MB": ("max_megabytes", 1.0),
    "GB": ("max_megabytes", 1e3),
    "MS": ("max_milliseconds", 1.0),
    "X": ("min_speedup", 1.0),
}


def _budgets(texts: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB|ms|x)", text.strip(), re.IGNORECASE)
        key, unit = _BUDGETS[match[2].upper()] if match else ("", 0.0)
        if not match or f"stages.quantize.{key}" in found:
            problem = f"{text!r} is no budget" if not match else f"{text!r} is a second budget of its kind"
            remedy = "Write for example --budget 12MB, --budget 40ms or --budget 1.5x, each kind once."
            raise UsageError(problem, where="--budget", remedy=remedy)
        found[f"stages.quantize.{key}"] = float(match[1]) * unit
    return found


@app.command()
def quantize(
    model: Model,
    output: Output = None,
    w8a8: Annotated[
        bool, typer.Option("--w8a8", help="8-bit weights, 8-bit activations.", rich_help_panel="Recipe")
    ] = False,
    w4a8: Annotated[
        bool, typer.Option("--w4a8", help="4-bit weights, 8-bit activations (default).", rich_help_panel="Recipe")
    ] = False,
    w4a16: Annotated[
        bool, typer.Option("--w4a16", help="4-bit weights, float activations.", rich_help_panel="Recipe")
    ] = False,
    w8a16: Annotated[
        bool, typer.Option("--w8a16", help="8-bit weights, float activations.", rich_help_panel="Recipe")
    ] = False,
    w4a4: Annotated[
        bool, typer.Option("--w4a4", help="4-bit weights, 4-bit activations.", rich_help_panel="Recipe")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="One method alone: minmax (the naive baseline), nearest, gptq or adaround.", rich_help_panel="Recipe"
        ),
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="Time to spend: fast, default or best.", rich_help_panel="Recipe")
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Bits a parameter, over all of them: 4 or 8 for each layer.", rich_help_panel="Recipe"),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="The same with a size of the denoiser (12MB), or a time of its call (40ms, or 1.5x as fast as float), "
            "for which layers may stay float. Repeatable.",
            rich_help_panel="Recipe",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A built-in recipe or a YAML file.", rich_help_panel="Recipe")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the recipe, KEY=VALUE, repeatable.", rich_help_panel="Recipe"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="dcomp (integers), or quanto, bnb (those packages' weights; w8a16 or w4a16).", rich_help_panel="Recipe"
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Layer name pattern to leave in float; the recipe's own list is replaced. Repeatable.",
            rich_help_panel="Recipe",
        ),
    ] = None,
    lora: Lora = None,
    prompts: Prompts = None,
    column: Column = None,
    samples: Samples = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    along: Along = None,
    calibration: Annotated[Path | None, typer.Option(help="A calibration set that `dcomp calibrate` recorded.")] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Use a calibration set of other weights or settings all the same.")
    ] = False,
    device: Device = "cpu",
    low_memory: LowMemory = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
    explain: Explain = False,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Quantize MODEL's denoiser on its own trajectories and write a checkpoint that runs in integers.

    Examples:
      dcomp quantize --w4a8 my-model/

      dcomp quantize --w8a8 my-model/ -o small/ --prompts captions.csv --steps 25 --guidance 5

      dcomp quantize --w4a4 --quality best my-model/

      dcomp quantize my-model/ --recipe my.yaml --set stages.0.step_bins=10 --dry-run
    """
    resolved = _resolve(
        {"w8a8": w8a8, "w4a8": w4a8, "w4a16": w4a16, "w8a16": w8a16, "w4a4": w4a4},
        recipe,
        overrides,
        {
            **_named_settings(method, quality),
            "lora": lora,
            "stages.quantize.target_bits": target_bits,
            **_budgets(budget or []),
            "stages.quantize.format": format,
            "stages.quantize.keep": keep,
            **_calibration(
                prompts=prompts,
                column=column,
                samples=samples,
                steps=steps,
                guidance=guidance,
                scheduler=scheduler,
                seed=seed,
                batch_size=batch_size,
                along=along,
            ),
        },
    )
    _compress(
        *(model, resolved, output, calibration, device, low_memory, dry_run, fresh, overwrite, json),
        allow_mismatch=allow_mismatch,
        explain=explain,
        plot=plot,
    )


@app.command()
def prune(
    model: Model,
    output: Output = None,
    parameters: Annotated[
        float | None, typer.Option(help="Part of the parameters that goes; default 0.2.", rich_help_panel="Budget")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Part of a call's multiply-accumulates that goes.", rich_help_panel="Budget")
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(help="What may be left of the denoiser's weights, in megabytes.", rich_help_panel="Budget"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How cuts are chosen: reconstruction (tries each cut), masks, magnitude, taylor or random."),
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(help="Pattern of modules that stay whole, repeatable.")] = None,
    contiguous: Annotated[
        bool | None, typer.Option("--contiguous", help="Blocks of a list that go lie side by side.")
    ] = None,
    round_to: Annotated[int | None, typer.Option(help="Channels that stay are a multiple of this; default 32.")] = None,
    recover: Annotated[
        str | None,
        typer.Option(help="Learn again what the whole model predicts: full, lora, norms, or none (default)."),
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of recovery at most; default 1000.")] = None,
    learn_guidance: Annotated[
        bool | None,
        typer.Option("--learn-guidance", help="Recovery learns guided predictions: calls then run half the rows."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A built-in recipe or a YAML file with a stage that prunes.")] = "prune",
    overrides: Set = None,
    lora: Lora = None,
    prompts: Prompts = None,
    column: Column = None,
    samples: Samples = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    calibration: Annotated[Path | None, typer.Option(help="A calibration set that `dcomp calibrate` recorded.")] = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Cut blocks, branches, heads and channels out of MODEL's denoiser, and write what is left as floats.

    Examples:
      dcomp prune my-model/ --dry-run

      dcomp prune my-model/ -o small/ --parameters 0.3 --steps 25 --guidance 5

      dcomp prune my-model/ --macs 0.2 --pin mid_block --contiguous

      dcomp prune my-model/ -o small/ --parameters 0.4 --recover full --iterations 3000

      dcomp prune my-model/ -o small/ --recover full --learn-guidance --guidance 4
    """
    values = {
        "stages.prune.parameters": parameters,
        "stages.prune.macs": macs,
        "stages.prune.max_megabytes": size,
        "stages.prune.method": method,
        "stages.prune.pin": pin,
        "stages.prune.contiguous": contiguous,
        "stages.prune.round_to": round_to,
        "stages.prune.recover": recover,
        "stages.prune.recover_iterations": iterations,
        "stages.prune.recover_guidance": learn_guidance,
        "lora": lora,
        **_calibration(
            prompts=prompts,
            column=column,
            samples=samples,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            seed=seed,
        ),
    }
    resolved = _resolve({}, recipe, overrides, values)
    _compress(model, resolved, output, calibration, device, None, dry_run, fresh, overwrite, json)


@app.command()
def compress(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.")],
    model: Model,
    output: Output = None,
    overrides: Set = None,
    device: Device = "cpu",
    low_memory: LowMemory = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
    explain: Explain = False,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Run RECIPE on MODEL; an interrupted run goes on where it stopped."""
    resolved = _resolve({}, recipe, overrides, {})
    _compress(
        *(model, resolved, output, None, device, low_memory, dry_run, fresh, overwrite, json),
        explain=explain,
        plot=plot,
    )


def _compress(
    model: str,
    recipe: Any,
    output: Path | None,
    calibration: Path | None,
    device: str,
    low_memory: bool | None,
    dry_run: bool,
    fresh: bool,
    overwrite: bool,
    json: bool,
    *,
    allow_mismatch: bool = False,
    explain: bool = False,
    plot: Path | None = None,
) -> None:
    from dcomp.recipes import console, screens
    from dcomp.recipes.error_curves import default_picture
    from dcomp.recipes.inspect import inspect as read
    from dcomp.recipes.picture_file import check_picture_file
    from dcomp.recipes.run import default_output, plan_recipe, run_recipe

    output = output or default_output(model, recipe)
    picture = plot or (default_picture(output) if explain else None)
    if picture:
        check_picture_file(picture)
    if dry_run:
        plan = plan_recipe(
            model,
            recipe,
            calibration=calibration,
            device=device,
            allow_mismatch=allow_mismatch,
            low_memory=low_memory,
        )
        console.print_json(plan.to_dict()) if json else screens.print_plan(plan, full=True)
        return
    with console.progress() as progress:
        result = run_recipe(
            model,
            recipe,
            output,
            calibration=calibration,
            device=device,
            low_memory=low_memory,
            fresh=fresh,
            overwrite=overwrite,
            allow_mismatch=allow_mismatch,
            on_plan=screens.print_plan,
            progress=progress,
        )
    if picture:
        screens.explain(read(result.output), picture, table=not json)
    console.print_json(result.to_dict()) if json else screens.print_result(result)


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the calibration set.")],
    prompts: Prompts = None,
    column: Column = None,
    samples: Samples = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    along: Along = None,
    lora: Lora = None,
    device: Device = "cpu",
    low_memory: LowMemory = None,
    json: Json = False,
) -> None:
    """Record what MODEL's denoiser sees on its own trajectories, for `dcomp quantize --calibration`."""
    from dcomp.recipes import console
    from dcomp.recipes.load import load_recipe
    from dcomp.recipes.run import record_calibration

    values = _calibration(
        prompts=prompts,
        column=column,
        samples=samples,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        seed=seed,
        batch_size=batch_size,
        along=along,
    )
    recipe = load_recipe("float", (), {"lora": lora, **values})
    with console.progress() as progress:
        summary = record_calibration(model, recipe, output, device=device, low_memory=low_memory, progress=progress)
    console.print_json(summary) if json else console.print_facts("Calibration set", summary)


@app.command()
def validate(
    out: Checkpoint,
    against: Annotated[str, typer.Option(help="The original model.")],
    prompts: Prompts = None,
    column: Column = None,
    samples: Samples = 16,
    steps: StepsAgain = None,
    guidance: GuidanceAgain = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    plan: Annotated[
        str | None, typer.Option(help="Cache plan that OUT follows: 2x, or careful, balanced or fast.")
    ] = None,
    min_psnr: Annotated[float | None, typer.Option(help="Mean PSNR in dB.", rich_help_panel="Thresholds")] = None,
    min_ssim: Annotated[float | None, typer.Option(help="Mean SSIM.", rich_help_panel="Thresholds")] = None,
    max_latent_error: Annotated[
        float | None, typer.Option(help="Mean relative error of the final latents.", rich_help_panel="Thresholds")
    ] = None,
    max_fid_change: Annotated[
        float | None,
        typer.Option(help="FID against the original's pictures; needs --features.", rich_help_panel="Thresholds"),
    ] = None,
    max_bytes_ratio: Annotated[
        float | None, typer.Option(help="Denoiser bytes against fp32.", rich_help_panel="Thresholds")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Denoiser speed against the original.", rich_help_panel="Thresholds")
    ] = None,
    features: Annotated[str | None, typer.Option(help="Feature network for FID: random-conv or pixel.")] = None,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure the speed ratio too.")] = True,
    record: Annotated[bool, typer.Option("--record", help="Write the figures into OUT's manifest.")] = False,
    device: Device = "cpu",
    json: Json = False,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit XML file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained page with pictures into this folder.")
    ] = None,
) -> None:
    """Run the same seeds through OUT and the original and measure the difference; exit code 3 when not good enough."""
    from dcomp.recipes import console
    from dcomp.recipes.report import write_github, write_html, write_json, write_junit
    from dcomp.recipes.validate import validate as run_validation

    thresholds = {
        "min_psnr": min_psnr,
        "min_ssim": min_ssim,
        "max_latent_error": max_latent_error,
        "max_fid_change": max_fid_change,
        "max_bytes_ratio": max_bytes_ratio,
        "min_speedup": min_speedup,
    }
    with console.progress() as progress:
        result = run_validation(
            out,
            against,
            prompts=prompts,
            column=column,
            samples=samples,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            seed=seed,
            batch_size=batch_size,
            plan=plan,
            thresholds={key: value for key, value in thresholds.items() if value is not None},
            features=features,
            bench=bench,
            record=record,
            device=device,
            progress=progress,
        )
    if junit:
        write_junit(result, junit)
    if html:
        write_html(result, html)
        write_json(result, html / "report.json")
    write_github(result, html)
    console.print_json(result.to_dict()) if json else console.print_validation(result, html)
    if not result.passed:
        raise typer.Exit(NOT_GOOD_ENOUGH)


@app.command("search-schedule")
def search_schedule(
    out: Checkpoint,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Fewer multiply-accumulates (2x), time (800ms), multiply-accumulates (150GMACs) or calls that compute "
            "everything (20calls); of one picture, repeatable. Default: 1.5x, 2x, 3x and 4x."
        ),
    ] = None,
    front: Annotated[bool, typer.Option("--front", help="Plans for nine speeds from 1.25x to 6x.")] = False,
    planner: Annotated[str, typer.Option(help="joint, or a rule of the literature to compare with.")] = "joint",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file; default: dcomp_cache.json in OUT.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The original: also show what bits and plans cost alone and together, in twice the time."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw what the plans do in each call, and their PSNR over speed; PNG, SVG or PDF."),
    ] = None,
    steps: StepsAgain = None,
    guidance: GuidanceAgain = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures of the search, and as many others to judge by.")] = 6,
    unrounded_calls: Annotated[
        bool,
        typer.Option(
            "--unrounded-calls",
            help="Let calls leave inputs of quantized layers unrounded where that is worth its time.",
        ),
    ] = False,
    correct: Annotated[
        str | None,
        typer.Option(
            help="affine (each channel) or scale: correct what is predicted, where that helps other pictures."
        ),
    ] = None,
    one_context: Annotated[
        bool,
        typer.Option(
            "--one-context",
            help="Let calls run one of guidance's two contexts, and predict how far the other one is from it.",
        ),
    ] = False,
    fresh: Fresh = False,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Find which denoiser calls OUT may skip, and write plans for `dcomp generate --plan`; exit code 3 if none helps.

    Examples:
      dcomp search-schedule small/ --budget 2x --budget 3x

      dcomp search-schedule my-model/ -o plans.json --steps 50 --scheduler DDIMScheduler
    """
    from dcomp.recipes import console, screens
    from dcomp.recipes.picture_file import check_picture_file
    from dcomp.recipes.plan_charts import draw_plans
    from dcomp.recipes.schedule import BUDGETS, FRONT
    from dcomp.recipes.schedule import search_schedule as run_search

    if plot:
        check_picture_file(plot)
    budgets = (*(budget or ()), *(FRONT if front else ())) or BUDGETS
    with console.progress() as progress:
        result = run_search(
            out,
            budgets=budgets,
            planner=planner,
            output=output,
            against=against,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            seed=seed,
            samples=samples,
            unrounded_calls=unrounded_calls,
            correct=correct,
            one_context=one_context,
            fresh=fresh,
            device=device,
            progress=progress,
        )
    if plot and result.plans:
        draw_plans(result, plot)
    console.print_json(result.to_dict()) if json else screens.print_schedules(result)
    if not result.plans:
        raise typer.Exit(NOT_GOOD_ENOUGH)


@app.command()
def generate(
    out: Checkpoint,
    prompts: Annotated[
        list[str], typer.Argument(help="Prompts (class ids for a class-conditional model).", metavar="PROMPT...")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")] = Path("pictures"),
    plan: Annotated[
        str | None,
        typer.Option(
            help="Follow a cache plan of OUT: 2x, or careful, balanced or fast; or FILE.json:2x for plans elsewhere."
        ),
    ] = None,
    ahead: Annotated[
        str | None,
        typer.Option(
            help="Layers of timestep and conditions: off, at each step; on, for all steps at once; offload, likewise, "
            "their weights in memory only then. Default: as the recipe said."
        ),
    ] = None,
    steps: StepsAgain = None,
    guidance: GuidanceAgain = None,
    scheduler: Scheduler = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Make one picture a prompt, with the compressed pipeline."""
    from dcomp.recipes import console
    from dcomp.recipes.generate import generate as run_generation

    with console.progress() as progress:
        result = run_generation(
            out,
            prompts,
            output,
            plan=plan,
            ahead=ahead,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            seed=seed,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    if json:
        console.print_json(result)
        return
    for note in result.pop("notes"):
        console.say(f"Note: {note}")
    console.print_facts("Pictures", result)


@app.command()
def bench(
    out: Checkpoint,
    against: Annotated[str, typer.Option(help="The original model.")],
    repeats: Annotated[int, typer.Option(min=3, help="Interleaved runs of each.")] = 9,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a denoiser call.")] = 1,
    generations: Annotated[int, typer.Option(min=0, help="Whole generations timed too.")] = 0,
    steps: StepsAgain = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Time OUT against the original in turns: ratio with its spread, peak memory, bytes."""
    from dcomp.recipes import console
    from dcomp.recipes.bench import bench as run_bench

    with console.progress() as progress:
        result = run_bench(
            out,
            against,
            repeats=repeats,
            batch=batch,
            generations=generations,
            steps=steps,
            device=device,
            progress=progress,
        )
    console.print_json(result.to_dict()) if json else console.print_facts("Speed", result.to_dict())


@app.command()
def inspect(
    out: Checkpoint,
    layers: Annotated[
        bool | None,
        typer.Option("--layers/--summary", help="Every layer, or a line for each role; default: the worst layers."),
    ] = None,
    worst: Annotated[int, typer.Option(min=1, help="How many of the worst layers are shown.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Draw errors over steps into this FILE.png|svg|pdf.")] = None,
    json: Json = False,
) -> None:
    """Explain a checkpoint: layers with scheme, error and reason, worst first; what stayed in float and why."""
    from dcomp.recipes import console
    from dcomp.recipes.inspect import inspect as read

    report = read(out)
    if plot:
        from dcomp.recipes.error_curves import draw_error_curves

        draw_error_curves(report, plot)
        console.say(f"Picture: {plot}")
    if json:
        console.print_json(report.to_dict())
        return
    from dcomp.recipes import screens

    screens.print_inspection(report, layers, worst)


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A quantized folder, to be told of its layers.", metavar="OUT")
    ] = None,
    explain: Annotated[str, typer.Option(help="Names of layers of OUT, as '*.attn1.*'.", metavar="PATTERN")] = "*",
    json: Json = False,
) -> None:
    """Say what this machine will use for each operation, or for each layer of a checkpoint, and why."""
    from dcomp.recipes import console
    from dcomp.recipes.doctor import examine

    if checkpoint is None and explain != "*":
        raise UsageError("--explain needs a checkpoint", where="doctor", remedy="Name the folder: dcomp doctor OUT.")
    report = examine(checkpoint, explain)
    console.print_json(report) if json else console.print_doctor(report)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo's results.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and steps: a smoke test.")] = False,
    fresh: Fresh = False,
) -> None:
    """Compress the embedded text-to-image pipeline to W4A8, validate it and write a page with its pictures."""
    from dcomp.recipes import console, screens
    from dcomp.recipes.demo import run_demo

    with console.progress() as progress:
        result, page = run_demo(output, quick=quick, fresh=fresh, on_plan=screens.print_plan, progress=progress)
    console.print_validation(result, page)
    print(f'\nimport dcomp; pipe = dcomp.load("{result.compressed}")')
    if not result.passed:
        raise typer.Exit(NOT_GOOD_ENOUGH)


if __name__ == "__main__":
    main()
