"""Commands on checkpoints: quantize, plan, verify, convert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quantlab.cli.options import Device, OutputFormat, RemoteCode, Revision
from quantlab.cli.output import Format, print_json, print_tables, progress
from quantlab.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from quantlab.mixed import Mixture
    from quantlab.pipeline import Summary
    from quantlab.preflight import Plan
    from quantlab.scheme import Calibration, Recipe

Model = Annotated[str, Argument(metavar="MODEL", help="A hub id or a folder.", show_default=False)]
SchemeName = Annotated[
    str | None, Option("--scheme", help="fp8-block (default), fp8-dynamic, int4 or int4-fp8.", show_default=False)
]
RecipeFile = Annotated[Path | None, Option("--recipe", help="A TOML recipe instead of --scheme.", show_default=False)]
Ignore = Annotated[list[str], Option("--ignore", help="Leave modules alone: a glob, or re:REGEX. Repeatable.")]
Calib = Annotated[
    str | None,
    Option(
        "--calib",
        metavar="DATA",
        help="Calibrate on: bundled, a text or JSONL file, or a datasets name.",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    Option("--calib-samples", help="Sequences of calibration data.", show_default="64; 32 with --effort fast"),
]
Length = Annotated[int | None, Option("--calib-length", help="Tokens per sequence.", show_default="512")]
Seed = Annotated[int | None, Option("--seed", help="Of the choice of calibration sequences.", show_default="0")]
Activations = Annotated[
    str | None,
    Option("--activations", help="Activation scales: dynamic, or static (needs --calib).", show_default="dynamic"),
]
Effort = Annotated[
    str | None,
    Option(
        "--effort",
        help="Of INT4. fast: GPTQ on little data; default: on more; best: rotated besides. All calibrate, on the "
        "bundled text unless --calib names another.",
        show_default="fast; default with --calib",
    ),
]
Steps = Annotated[
    str | None,
    Option(
        "--steps",
        help="Of INT4 calibration exactly these: rotate, smooth, gptq, original, tune, with commas between; "
        "or rtn: no data.",
        show_default=False,
    ),
]
TargetBits = Annotated[
    float | None,
    Option("--target-bits", help="Most bits per weight, scales included: solves for schemes.", show_default=False),
]
MaxKl = Annotated[
    float | None,
    Option("--max-kl", help="Or: highest KL to the original, nats per token.", show_default=False),
]
MIXED = "int4-fp8, fp8-dynamic, none"
Mix = Annotated[
    str | None,
    Option(
        "--mix", help="Schemes that --target-bits and --max-kl choose from; none leaves layers.", show_default=MIXED
    ),
]
KVFormat = Annotated[
    str | None,
    Option(
        "--kv",
        help="KV cache that loading gives the model: fp8, int8, int4, k8v4, or 16bit. Measures its keys.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None, Option("-o", "--output", help="Folder to make.", show_default="MODEL's name plus the scheme")
]
Workers = Annotated[int | None, Option("--workers", min=1, help="Tensors in flight at once.", show_default="by cores")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an output that exists.")]

CALIBRATION_OPTIONS = {  # by the keys of a recipe's [calibration]
    "data": "--calib",
    "samples": "--calib-samples",
    "length": "--calib-length",
    "seed": "--seed",
    "activations": "--activations",
    "effort": "--effort",
}


def quantize(
    model: Model,
    scheme: SchemeName = None,
    output: Output = None,
    recipe: RecipeFile = None,
    ignore: Ignore = [],  # noqa: B006  typer reads the default and never mutates it
    calib: Calib = None,
    calib_samples: Samples = None,
    calib_length: Length = None,
    seed: Seed = None,
    activations: Activations = None,
    effort: Effort = None,
    steps: Steps = None,
    target_bits: TargetBits = None,
    max_kl: MaxKl = None,
    mix: Mix = None,
    kv: KVFormat = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    format: OutputFormat = Format.human,
) -> None:
    """Quantize a model into a checkpoint that loads everywhere.

    FP8 needs no data, INT4 is calibrated on text that comes with the package. Runs shard by shard and never holds the
    model.
    The same command continues an interrupted run; the output appears only when it is whole and verified.

    With --target-bits or --max-kl every group of layers gets its own scheme, and the recipe is kept in the output.
    """
    import quantlab
    from quantlab.output import output_folder

    mixed, calibrated = (target_bits, max_kl) != (None, None), (effort, steps) != (None, None)
    if mixed and (scheme is not None or recipe is not None):
        raise UsageError("--target-bits and --max-kl choose the schemes; leave out --scheme and --recipe")
    if mixed and not calibrated and (calib_samples, calib_length, seed, activations) != (None,) * 4:
        raise UsageError(
            "--calib-samples, --calib-length, --seed and --activations are of calibration, which --target-bits and "
            "--max-kl leave out; add --effort or --steps"
        )
    if not mixed and mix is not None:
        raise UsageError(f"--mix {mix}: schemes are chosen for a size or a loss; add --target-bits or --max-kl")
    chosen = _recipe(scheme, recipe, ignore, calib, calib_samples, calib_length, seed, activations, effort, steps, kv)
    if mixed:
        output = output_folder(model, "mixed", output)
        _check(model, output, chosen.kv, overwrite, revision, trust_remote_code)
        schemes = MIXED if mix is None else mix
        mixture = _mixture(
            model, target_bits, max_kl, schemes, ignore, calib, device, revision, trust_remote_code, format
        )
        # without --effort and --steps the data serve only the choice
        chosen = replace(mixture.recipe, kv=chosen.kv, calibration=chosen.calibration if calibrated else None)
    with progress(format is Format.human) as callback:
        summary = quantlab.quantize(
            model,
            chosen,
            output,
            device=device,
            workers=workers,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=callback,
            overwrite=overwrite,
        )
    _show(summary, format, {"mixture": mixture.to_dict()} if mixed else {})


def plan(
    model: Model,
    scheme: SchemeName = None,
    recipe: RecipeFile = None,
    ignore: Ignore = [],  # noqa: B006
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    format: OutputFormat = Format.human,
) -> None:
    """Show what quantize would do, from the config and the file headers alone."""
    import quantlab

    made = quantlab.plan(model, _recipe(scheme, recipe, ignore), revision=revision, trust_remote_code=trust_remote_code)
    _show(made, format)


def verify(
    folder: Annotated[Path, Argument(metavar="DIR", help="A quantized checkpoint.", show_default=False)],
    format: OutputFormat = Format.human,
) -> None:
    """Check a checkpoint: hashes, names, shapes, scales, and the rules of every loader."""
    from quantlab.verify import verify as check

    result = check(folder)
    if format is Format.json:
        print_json(result.to_dict())
    else:
        print_tables(result)
    if result.problems:
        raise VerificationError(f"{folder}: {len(result.problems)} problems, the first: {result.problems[0]}")


def convert(
    folder: Annotated[Path, Argument(metavar="DIR", help="A quantized checkpoint.", show_default=False)],
    to: Annotated[
        str,
        Option(
            "--to",
            help="fp8 (Hugging Face), compressed-tensors, bf16; of INT4 weights int4 or int4-fp8.",
            show_default=False,
        ),
    ],
    output: Output = None,
    overwrite: Overwrite = False,
    format: OutputFormat = Format.human,
) -> None:
    """Rewrite a checkpoint in another on-disk format, or back to bf16."""
    from quantlab.convert import convert as rewrite

    with progress(format is Format.human) as callback:
        summary = rewrite(folder, to, output, progress=callback, overwrite=overwrite)
    _show(summary, format)


COMMANDS = (quantize, plan, verify, convert)


def _recipe(
    scheme: str | None,
    file: Path | None,
    ignore: list[str],
    calib: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    activations: str | None = None,
    effort: str | None = None,
    steps: str | None = None,
    kv: str | None = None,
) -> Recipe:
    """The recipe that the options ask for; to a recipe file they add, or replace what they name."""
    from quantlab.scheme import EFFORTS, Recipe, Rule, did_you_mean

    if scheme is not None and file is not None:
        raise UsageError("--scheme and --recipe were both given; a recipe names its schemes, give one of the two")
    if effort is not None and effort not in EFFORTS:
        raise UsageError(f"unknown effort {effort!r}; {did_you_mean(effort, EFFORTS)}")
    if file is not None:
        recipe = Recipe.from_toml(file)
    else:
        recipe = Recipe.advised("fp8-block" if scheme is None else scheme, "none" if kv is None else kv)
    base = recipe.calibration
    if file is None and (calib is not None or steps is not None):
        base = None  # what is advised is for little data
    values = (calib, samples, length, seed, activations, effort)
    given = {key: value for key, value in zip(CALIBRATION_OPTIONS, values, strict=True) if value is not None}
    return replace(
        recipe,
        kv=recipe.kv if kv is None else kv,
        rules=(*(Rule(pattern, "none") for pattern in ignore), *recipe.rules),
        calibration=_calibration(base, steps, given),
    )


def _calibration(base: Calibration | None, steps: str | None, given: dict[str, Any]) -> Calibration | None:
    """The calibration of a recipe, if any, with --steps and the keys that other options gave; None for no data."""
    from quantlab.scheme import STEPS, Calibration

    if steps is not None and not steps.strip(" ,"):
        raise UsageError(f"--steps {steps!r} names none; known: {', '.join(STEPS)}, or rtn")
    idle = ", ".join(CALIBRATION_OPTIONS[key] for key, value in given.items() if value != "dynamic")
    if steps == "rtn":
        if idle:
            raise UsageError(f"--steps rtn rounds without data; leave out {idle}")
        return None
    if base is None and steps is None and not given.keys() & {"data", "effort"}:
        if idle:
            raise UsageError(f"{idle}: nothing is calibrated without data; add --calib bundled, or --calib FILE")
        return None
    calibration = replace(base or Calibration(), **given)
    return calibration if steps is None else calibration.only(steps.split(","))


def _check(model: str, output: Path, kv: str, overwrite: bool, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse before schemes are searched what `quantlab.quantize` would refuse behind that."""
    from quantlab import cache
    from quantlab.output import check_outside, check_writable
    from quantlab.source import Source

    check_writable(output, overwrite=overwrite)
    with Source.open_headers(model, revision) as headers:
        check_outside(output, headers.folder)
        if kv != "none":
            cache.require_support(headers.folder, kv, trust_remote_code)


def _mixture(
    model: str,
    target_bits: float | None,
    max_kl: float | None,
    schemes: str,
    ignore: list[str],
    calib: str | None,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    format: Format,
) -> Mixture:
    """The best assignment of schemes, shown to people."""
    from quantlab.mixed import mix

    with progress(format is Format.human) as callback:
        found = mix(
            model,
            target_bits=target_bits,
            max_kl=max_kl,
            schemes=[name.strip() for name in schemes.split(",") if name.strip()],
            ignore=ignore,
            calibration="bundled" if calib is None else calib,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=callback,
        )
    if format is Format.human:
        print_tables(found)
    return found


def _show(result: Plan | Summary, format: Format, more: dict[str, Any] | None = None) -> None:
    """Print a result; `more` goes into the JSON document beside it."""
    if format is Format.json:
        print_json({**result.to_dict(), **(more or {})})
        return
    print_tables(result)
