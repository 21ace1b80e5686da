"""Commands on kernels and the machine: explain, doctor, bench, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quantlab.cli.options import OutputFormat
from quantlab.cli.output import Format, print_json, print_table, progress
from quantlab.errors import UsageError

SHAPE = "llama-3.1-8b"  # of whole jobs


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
    shape: Annotated[
        str | None, Option("--shape", help="Model shape of conversion and generation.", show_default=SHAPE)
    ] = None,
    scheme: Annotated[
        list[str],
        Option("--scheme", help="Of conversion and generation. Repeatable.", show_default="fp8-block"),
    ] = [],  # noqa: B006
    workdir: Annotated[
        Path | None,
        Option("--workdir", help="Where the random checkpoint goes.", show_default="a temporary folder"),
    ] = None,
    case: Annotated[
        list[str],
        Option(
            "--case",
            help="Of generation: 'prefill BxS' or 'decode BxS', repeatable. Of others: cases that contain this.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    kv: Annotated[list[str], Option("--kv", help="KV cache of generation. Repeatable.", show_default=False)] = [],  # noqa: B006
    attention: Annotated[
        str | None, Option("--attention", help="Attention of generation: int8 or fp8.", show_default=False)
    ] = None,
    together: Annotated[
        bool, Option("--together", help="Models of generation compile at the same time, and share the GPU's memory.")
    ] = False,
    unchecked: Annotated[bool, Option("--unchecked", help="Times kernels without their tests before.")] = False,
    sustained: Annotated[
        float, Option(min=0.0, metavar="SECONDS", help="Each kernel runs by itself for so long before it is timed.")
    ] = 0.0,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Build the inputs and call the reference once; works on a CPU.")
    ] = False,
    format: OutputFormat = Format.human,
) -> None:
    """Time kernels beside the roofline and the peers, or a whole job on a random checkpoint of a real shape."""
    from quantlab import benchmarks

    if room in benchmarks.JOBS and (dry_run or unchecked or sustained):
        options = "--dry-run, --unchecked and --sustained"
        raise UsageError(f"{options} are for rooms of kernels, {room} is a whole job; leave them out")
    idle: dict[str, object] = {}
    if room != "generation":
        idle |= {"--kv": kv, "--attention": attention, "--together": together}
    if room == "conversion":
        idle |= {"--case": case}
    if room not in benchmarks.JOBS:
        idle |= {"--shape": shape, "--scheme": scheme, "--workdir": workdir}
    if any(idle.values()):
        names = ", ".join(name for name, value in idle.items() if value)
        raise UsageError(f"{room} takes no {names}; leave out what is of other benchmarks")
    if room in benchmarks.JOBS:
        with progress(format is Format.human) as callback:
            title, header, rows = benchmarks.JOBS[room](
                SHAPE if shape is None else shape,
                scheme or ["fp8-block"],
                workdir,
                cases=case,
                kv=kv,
                attention=attention,
                together=together,
                progress=callback,
            )
    elif len(case) > 1:
        raise UsageError(f"--case was given {len(case)} times; for {room} give it once")
    else:
        only = case[0] if case else ""
        title, header, rows = benchmarks.kernel_room(room, dry_run, only=only, unchecked=unchecked, sustained=sustained)
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
