"""The command line: commands parse, call and print. torch is imported inside commands, so that `--help` is instant."""

from __future__ import annotations

import io
import os
import sys
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer

from quantlab.cli import analysis, checkpoints, demo, kernels, quality
from quantlab.errors import QuantlabError

app = typer.Typer(
    name="quantlab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Exit codes: 0 ok, 2 usage, 3 refused before work, 4 verification or quality gate failed.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"quantlab {metadata.version('quantlab-toolkit')}")
        except metadata.PackageNotFoundError:
            print("quantlab, not installed: run from its source")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Quantize the linear and attention layers of Hugging Face models, and run them fast."""


for group in (checkpoints, quality, analysis, kernels, demo):
    for command in group.COMMANDS:
        app.command()(command)


def _warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """Warnings of ours are a line for people; those of others say where they come from."""
    if category.__module__.partition(".")[0].startswith("quantlab"):
        return f"quantlab: warning: {message}\n"
    return _format(message, category, *where, **more)


_format = warnings.formatwarning


def main() -> None:
    """Entry point: errors that a user can mend become one line on stderr and their exit code."""
    warnings.formatwarning = _warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack letters that a name has
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too; ours are lines then
    try:
        app()
    except QuantlabError as error:
        print(f"quantlab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:  # of an interrupt, which typer takes without a word
            print("quantlab: interrupted; the same command continues where it stopped", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        said = " ".join(str(error).split())[:150]
        print(
            f"quantlab: out of memory; take shorter or fewer pieces of data, or another device ({said})",
            file=sys.stderr,
        )
        sys.exit(1)


def _is_lack_of_memory(error: BaseException) -> bool:
    """Told by names and texts: torch may not be imported yet, and on a CPU has no type for it."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(text in str(error) for text in ("can't allocate memory", "not enough memory"))
