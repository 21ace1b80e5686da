"""Commands on quality: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quantlab.cli.options import BaselineRevision, OutputFormat, RemoteCode, Revision
from quantlab.cli.output import Format, print_json, print_tables, progress


def eval(
    model: Annotated[str, Argument(metavar="MODEL", help="A quantized (or any) checkpoint.", show_default=False)],
    baseline: Annotated[
        str | None, Option("--baseline", help="The model it was made from: gives KL and agreement.", show_default=False)
    ] = None,
    text: Annotated[
        list[Path], Option("--text", help="Text or JSONL file. Repeatable.", show_default="the bundled text")
    ] = [],  # noqa: B006
    dataset: Annotated[
        list[str], Option("--dataset", help="A datasets name, NAME[:CONFIG[:SPLIT]]. Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    tasks: Annotated[
        list[str], Option("--tasks", help="lm-eval tasks (extra 'eval'). Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    windows: Annotated[
        int | None, Option("--windows", min=1, help="At most this many windows.", show_default="all")
    ] = None,
    length: Annotated[
        int | None,
        Option("--length", min=2, help="Tokens per window.", show_default="1024, or the context"),
    ] = None,
    context: Annotated[
        int, Option("--context", min=0, help="Tokens at the start of each window that are not scored.")
    ] = 0,
    device_map: Annotated[str, Option("--device-map", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, Option("--dtype", help="Of unquantized weights: auto, float32, bfloat16, float16.")] = "auto",
    kv: Annotated[
        str | None,
        Option("--kv", help="KV cache: fp8, int8, int4, k8v4, 16bit or none.", show_default="the checkpoint's"),
    ] = None,
    attention: Annotated[
        str | None, Option("--attention", help="Attention of the model in 8 bits: int8 or fp8.", show_default=False)
    ] = None,
    generate: Annotated[
        bool, Option("--generate", help="Texts that it writes, beside the baseline's; tokens per second, memory.")
    ] = False,
    min_recovery: Annotated[
        float | None,
        Option("--min-recovery", min=0, max=1, help="Fail with exit code 4 below this.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="JSON file, besides DIR/quantlab/eval.json.", show_default=False),
    ] = None,
    revision: Revision = None,
    baseline_revision: BaselineRevision = None,
    trust_remote_code: RemoteCode = False,
    format: OutputFormat = Format.human,
) -> None:
    """Measure what quantization cost: perplexity, KL to the baseline, top-1 agreement, with standard errors."""
    from quantlab.evaluate import evaluate

    with progress(format is Format.human) as callback:
        result = evaluate(
            model,
            baseline=baseline,
            text=text,
            dataset=dataset,
            tasks=tasks,
            windows=windows,
            length=length,
            context=context,
            device_map=device_map,
            dtype=dtype,
            kv=kv,
            attention=attention,
            generate=generate,
            min_recovery=min_recovery,
            output=output,
            revision=revision,
            baseline_revision=baseline_revision,
            trust_remote_code=trust_remote_code,
            progress=callback,
        )
    if format is Format.json:
        print_json(result.to_dict())
        return
    print_tables(result)


COMMANDS = (eval,)
