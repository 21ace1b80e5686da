"""Commands on kernels and the machine: explain, doctor, bench, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quantlab.cli.output import Format, print_json, print_table
from quantlab.errors import UsageError

OutputFormat = Annotated[Format, Option("--format", help="human or json.")]


def explain(
    m: Annotated[int, Argument(metavar="M", min=1, help="Tokens.", show_default=False)],
    n: Annotated[int, Argument(metavar="N", min=1, help="Output features.", show_default=False)],
    k: Annotated[int, Argument(metavar="K", min=1, help="Input features.", show_default=False)],
    scheme: Annotated[str, Option("--scheme", help="fp8-block, fp8-dynamic, int4 or int4-fp8.")] = "fp8-block",
    sm: Annotated[
        int | None, Option("--sm", help="Compute capability, 90 for 9.0.", show_default="of this GPU")
    ] = None,
    format: OutputFormat = Format.human,
) -> None:
    """Show which kernel would run a layer, and why the others would not."""
    from quantlab import diagnosis

    verdicts = diagnosis.explain(m, n, k, scheme, sm)
    if format is Format.json:
        print_json(verdicts)
        return
    rows = [
        (v["room"], v["backend"], "runs it" if v["chosen"] else v["reason"] or "could, comes later") for v in verdicts
    ]
    print_table(f"{scheme}, M = {m}, N = {n}, K = {k}", ("room", "backend", "verdict"), rows)


def doctor(format: OutputFormat = Format.human) -> None:
    """Show versions, the GPU, and what works here or why not."""
    from quantlab import diagnosis

    findings = diagnosis.doctor()
    if format is Format.json:
        print_json(dict(findings))
    else:
        print_table("quantlab doctor", ("what", "found"), findings)


def bench(
    room: Annotated[
        str,
        Argument(
            metavar="ROOM",
            help="A room of kernels, 'attention', 'mla', 'moe', 'conversion', 'generation'.",
            show_default=False,
        ),
    ],
    shape: Annotated[str, Option("--shape", help="Model shape of conversion and generation.")] = "llama-3.1-8b",
    scheme: Annotated[str, Option("--scheme", help="Scheme of conversion and generation.")] = "fp8-block",
    workdir: Annotated[
        Path | None,
        Option("--workdir", help="Where the random checkpoint goes.", show_default="a temporary folder"),
    ] = None,
    case: Annotated[
        list[str],
        Option("--case", help="Of generation: 'prefill BxS' or 'decode BxS'. Repeatable.", show_default=False),
    ] = [],  # noqa: B006
    kv: Annotated[str | None, Option("--kv", help="KV cache of generation.", show_default=False)] = None,
    attention: Annotated[
        str | None, Option("--attention", help="Attention of generation: int8 or fp8.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Build the inputs and call the reference once; works on a CPU.")
    ] = False,
    format: OutputFormat = Format.human,
) -> None:
    """Time kernels beside the roofline and the peers, or a whole job on a random checkpoint of a real shape."""
    from quantlab import benchmarks

    if room in benchmarks.JOBS:
        title, header, rows = benchmarks.JOBS[room](shape, scheme, workdir, cases=case, kv=kv, attention=attention)
    else:
        title, header, rows = benchmarks.kernel_room(room, dry_run)
    if format is Format.json:
        print_json([dict(zip(header, row, strict=True)) for row in rows])
    else:
        print_table(title, header, rows)


def tune(
    room: Annotated[str, Argument(metavar="ROOM", help="A kernel room with a tuning table.", show_default=False)],
    shape: Annotated[
        list[str], Option("--shape", help="NxK of one layer. Repeatable.", show_default="the room's list")
    ] = [],  # noqa: B006
) -> None:
    """Search the fastest configuration of each shape on this GPU and write it into the room's table."""
    from quantlab import benchmarks

    shapes = []
    for text in shape:
        n, _, k = text.partition("x")
        if not (n.isdigit() and k.isdigit()):
            raise UsageError(f"--shape {text!r}: needs NxK, for example 4096x7168")
        shapes.append((int(n), int(k)))
    print(f"wrote {benchmarks.tune(room, shapes)}")


COMMANDS = (explain, doctor, bench, tune)
