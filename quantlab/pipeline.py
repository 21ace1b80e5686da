"""The whole story: a model and a recipe in, a checkpoint that loads everywhere out. Start reading here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab import checkpoint, preflight
from quantlab.errors import PreflightError, UsageError, VerificationError
from quantlab.output import Output, check_outside, check_space, check_writable, fingerprint, output_folder, to_json
from quantlab.preflight import Plan
from quantlab.scheme import Recipe
from quantlab.source import Source
from quantlab.summary import Progress, Summary

if TYPE_CHECKING:
    import torch

    from quantlab.calibrated import Statistics
    from quantlab.sequential import Rounded

__all__ = ["Plan", "Recipe", "Summary", "plan", "quantize"]


def plan(
    model: str | Path,
    recipe: Recipe | str | Path = "fp8-block",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `quantize` would do with every tensor, from the config and the headers alone.

    No more is downloaded of a model on the hub, so that the plan's source cannot be read.
    """
    recipe = Recipe.of(recipe)
    with Source.open_headers(model, revision) as source:
        return _plan(source, recipe, trust_remote_code)


def _plan(source: Source, recipe: Recipe, trust_remote_code: bool) -> Plan:
    if recipe.kv != "none":
        from quantlab import cache

        cache.require_support(source.folder, recipe.kv, trust_remote_code)
    return preflight.plan(source, recipe, trust_remote_code=trust_remote_code)


def quantize(
    model: str | Path,
    recipe: Recipe | str | Path = "fp8-block",
    output: str | Path | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Summary:
    """Quantize a model folder or hub id into a new folder, and say what was done.

    recipe    a `Recipe`, the name of a scheme, or a TOML file
    output    folder to make; by default the model's name plus the scheme, in the current folder
    device    "auto" (a GPU where there is one), "cpu", "cuda", "cuda:N"; without data the bytes written are the same
    progress  called with (label, bytes done, bytes in all)

    The same call continues an interrupted run. Raises UsageError, PreflightError or VerificationError, each one line;
    the output then does not exist.
    """
    from quantlab import keys, stream
    from quantlab.verify import verify_weights

    start = time.perf_counter()
    recipe = Recipe.of(recipe)
    folder = output_folder(model, recipe.scheme, output)
    where = stream.pick_device(device)
    check_writable(folder, overwrite=overwrite)

    def refuse(headers: Source) -> None:
        check_space(folder, _bytes_at_most(_plan(headers, recipe, trust_remote_code)))

    made = _plan(Source.open(model, revision, before_download=refuse), recipe, trust_remote_code)
    check_outside(folder, made.source.folder)
    check_space(folder, _bytes_at_most(made))

    with Output.open(folder, fingerprint(made.source, made.to_dict()), overwrite=overwrite) as out:
        found, unseen = _calibrated(made, where, out, progress, trust_remote_code)
        out.made_from(found.digest if found else "")
        resumed = out.finished_shards
        measured = keys.for_run(made, where, out.kept, progress, trust_remote_code=trust_remote_code)
        stages = stream.convert(
            made,
            out,
            device=where,
            workers=workers,
            progress=progress,
            rounded=found.rounded if found else None,
            replacements=found.replacements if found else None,
            added=measured.scales,
        )
        out.write_side_files(made.source, replace(made.stored, kv=bool(measured.scales)))
        out.write_text(checkpoint.RECIPE, recipe.to_toml())
        if found:
            found.save(out)
        if measured.keys:
            keys.keep(out, measured.keys)
        problems = verify_weights(out.partial)
        if problems:
            raise VerificationError(f"{folder}: what was written is wrong, nothing is kept: {problems[0]}")
        summary = Summary(
            output=str(folder),
            scheme=recipe.scheme,
            bytes_before=made.bytes_before,
            bytes_after=made.bytes_after + sum(job.info.nbytes for job in measured.scales),
            groups=made.by_reason(),
            tensor_parallel=made.tensor_parallel,
            seconds=time.perf_counter() - start,
            stages=stages,
            device=str(where),
            resumed=resumed,
            warnings=(*made.warnings, *unseen, *measured.warnings),
            calibration=(found.summary() if found else {}) | measured.summary(),
        )
        out.write_text(checkpoint.SUMMARY, to_json(summary.to_dict()))
        out.publish()
    return summary


def _bytes_at_most(made: Plan) -> int:
    """On the disk at a time: the output, and what calibration keeps until that is complete."""
    if made.recipe.calibration is None:
        return made.bytes_after
    from quantlab import calibrated

    return made.bytes_after + calibrated.kept_bytes(made, made.recipe.calibration)


def _calibrated(
    made: Plan, device: torch.device, out: Output, progress: Progress | None, trust_remote_code: bool
) -> tuple[Statistics | Rounded | None, tuple[str, ...]]:
    """What calibration found, where the recipe has any; or why a model that it was not insisted on has none."""
    calibration = made.recipe.calibration
    if calibration is None:
        return None, ()
    from quantlab import calibrated

    try:
        found = calibrated.run(
            made.source,
            made,
            calibration,
            device,
            progress,
            folder=out.kept,
            trust_remote_code=trust_remote_code,
        )
    except (PreflightError, UsageError) as error:
        if not calibration.optional:
            raise
        return None, (f"rounded without data: {error}",)
    return found, ()
