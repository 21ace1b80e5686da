"""Commands that look closer: report, compare, sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quantlab.cli.options import BaselineRevision, Device, OutputFormat, RemoteCode, Revision
from quantlab.cli.output import Format, print_json, print_tables, progress


def report(
    folder: Annotated[str, Argument(metavar="DIR", help="A quantized checkpoint.", show_default=False)],
    output: Annotated[
        Path | None, Option("--output", "-o", help="HTML file.", show_default="DIR/quantlab/report.html")
    ] = None,
    baseline: Annotated[
        str | None, Option("--baseline", help="The model it was made from: errors of weights.", show_default=False)
    ] = None,
    baseline_revision: BaselineRevision = None,
    calib: Annotated[
        str | None,
        Option("--calib", help="Data for errors of outputs, outliers: bundled, file, data set.", show_default=False),
    ] = None,
    generate: Annotated[
        bool, Option("--generate", help="Texts that it writes, beside the baseline's; speed and memory.")
    ] = False,
    png: Annotated[bool, Option("--png", help="The plots as PNG files too.")] = False,
    trust_remote_code: RemoteCode = False,
    format: OutputFormat = Format.human,
) -> None:
    """One HTML page on what quantization did and what it cost, and the same as JSON."""
    import json

    from quantlab.report import report as write

    with progress(format is Format.human) as callback:
        written = write(
            folder,
            output,
            baseline=baseline,
            baseline_revision=baseline_revision,
            calibration=calib,
            generate=generate,
            png=png,
            trust_remote_code=trust_remote_code,
            progress=callback,
        )
    if format is Format.json:
        print_json(json.loads(written.json.read_text(encoding="utf-8")))
        return
    for path in (written.html, written.json, *written.images):
        print(path)
    for line in written.missing:
        print(f"not in it: {line}")


def compare(
    a: Annotated[str, Argument(metavar="A", help="A checkpoint that was evaluated, or its eval.json.")],
    b: Annotated[str, Argument(metavar="B", help="Another one, measured with the same settings.")],
    format: OutputFormat = Format.human,
) -> None:
    """Two evaluations side by side, with the standard errors of their differences."""
    from quantlab.compare import compare as run

    result = run(a, b)
    if format is Format.json:
        print_json(result.to_dict())
        return
    print_tables(result)
    for note in result.notes:
        print(f"note: {note}")


def sensitivity(
    model: Annotated[str, Argument(metavar="MODEL", help="The original model.", show_default=False)],
    schemes: Annotated[str, Option("--schemes", help="Names, with commas between them.")] = "fp8-block",
    calib: Annotated[str, Option("--calib", help="Text: bundled, a file, a data set.")] = "bundled",
    samples: Annotated[int, Option("--samples", min=1, help="Windows of text.")] = 8,
    length: Annotated[int, Option("--length", min=2, help="Tokens per window.")] = 256,
    output: Annotated[
        Path | None, Option("--output", "-o", help="JSON file.", show_default="./MODEL-sensitivity.json")
    ] = None,
    fast: Annotated[bool, Option("--fast", help="Estimate all layers in one pass forward and back.")] = False,
    png: Annotated[bool, Option("--png", help="A map of the layers as PNG, beside the JSON file.")] = False,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    format: OutputFormat = Format.human,
) -> None:
    """Which layers suffer most: the KL to the original when each fused group alone is quantized."""
    from quantlab import plots
    from quantlab.sensitivity import draw, result_file
    from quantlab.sensitivity import sensitivity as run

    if png:
        plots.require()
    target = result_file(model, output)
    with progress(format is Format.human) as callback:
        result = run(
            model,
            [name.strip() for name in schemes.split(",") if name.strip()],
            target,
            calibration=calib,
            samples=samples,
            length=length,
            fast=fast,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=callback,
        )
    images = {target.with_name(f"{target.stem}-{plot.name}.png"): plot for plot in draw(result)} if png else {}
    for path, plot in images.items():
        path.write_bytes(plot.png())
    if format is Format.json:
        print_json(result.to_dict())
        return
    print_tables(result)
    for path in (target, *images):
        print(path)


COMMANDS = (report, compare, sensitivity)
