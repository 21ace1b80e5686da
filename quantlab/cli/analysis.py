"""Commands that look closer: report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quantlab.cli.output import Format, print_json, print_table, progress

TRUST = Annotated[bool, Option("--trust-remote-code", help="Run the Python files that come with the model.")]
FORMAT = Annotated[Format, Option("--format", help="human or json.")]


def report(
    folder: Annotated[str, Argument(metavar="DIR", help="A quantized checkpoint.", show_default=False)],
    output: Annotated[
        Path | None, Option("--output", "-o", help="HTML file [DIR/quantlab/report.html].", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, Option("--baseline", help="The model it was made from: errors of weights.", show_default=False)
    ] = None,
    calib: Annotated[
        str | None,
        Option("--calib", help="Data for errors of outputs, outliers: bundled, file, data set.", show_default=False),
    ] = None,
    png: Annotated[bool, Option("--png", help="The plots as PNG files too.")] = False,
    trust_remote_code: TRUST = False,
    format: FORMAT = Format.human,
) -> None:
    """One HTML page on what quantization did and what it cost, and the same as JSON."""
    import json

    from quantlab.report import report as write

    with progress(format is Format.human) as callback:
        written = write(
            folder,
            output,
            baseline=baseline,
            calibration=calib,
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
    format: FORMAT = Format.human,
) -> None:
    """Two evaluations side by side, with the standard errors of their differences."""
    from quantlab.compare import compare as run

    result = run(a, b)
    if format is Format.json:
        print_json(result.to_dict())
        return
    header = ("measure", "A", "B", "change", "standard error", "in standard errors")
    print_table(f"A: {result.a}\nB: {result.b}", header, result.rows())
    for note in result.notes:
        print(f"note: {note}")


COMMANDS = (report, compare)
