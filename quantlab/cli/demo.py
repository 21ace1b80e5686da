"""The demo: the main job on the embedded model, from checkpoint to generated text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quantlab.cli.output import print_tables, progress
from quantlab.errors import UsageError

WINDOWS = 48  # of 256 tokens: enough for a standard error that means something, on two cores in half a minute
EMBEDDED = Path(__file__).parents[2] / "examples" / "tiny-llama"


def demo(
    model: Annotated[
        str | None, Argument(metavar="[MODEL]", help="Another model than the embedded one.", show_default=False)
    ] = None,
    scheme: Annotated[str, Option("--scheme", help="fp8-block, fp8-dynamic, int4 or int4-fp8.")] = "fp8-block",
    prompt: Annotated[str, Option("--prompt", help="What the model continues.")] = "The river is",
) -> None:
    """Quantize, verify, evaluate and generate: the main job on the embedded model, in a temporary folder."""
    if model is None and not EMBEDDED.is_dir():
        raise UsageError("the embedded model comes with a source checkout (examples/tiny-llama); give a MODEL")
    source = model or str(EMBEDDED)
    with tempfile.TemporaryDirectory(prefix="quantlab-demo-") as folder:
        _run(source, scheme, prompt, Path(folder) / f"{Path(source).name}-{scheme}")


def _run(source: str, scheme: str, prompt: str, output: Path) -> None:
    from quantlab import hf
    from quantlab.evaluate import evaluate
    from quantlab.pipeline import quantize
    from quantlab.scheme import Recipe

    with progress() as callback:
        summary = quantize(source, Recipe(scheme), output, progress=callback)
    print_tables(summary)
    with progress() as callback:
        evaluation = evaluate(str(output), baseline=source, windows=WINDOWS, length=256, progress=callback)
    print_tables(evaluation)
    generate = hf.pipeline("text-generation", str(output))
    for answer in generate(prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.3):
        print(f"{source} as {scheme} continues:\n  {answer['generated_text']}")


COMMANDS = (demo,)
