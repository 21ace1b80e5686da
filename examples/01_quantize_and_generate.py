"""Quantize a model with one call, then generate text with it in a plain transformers pipeline.

To be seen: the FP8 checkpoint loads like any other model, its linear layers are ours and hold FP8 weights, and the text
of the quantized model reads like the text of the original.

    python examples/01_quantize_and_generate.py [OUTPUT]
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from transformers import pipeline

import quantlab  # from here on, transformers runs FP8 checkpoints on quantlab's layers

MODEL = Path(__file__).parent / "tiny-llama"
PROMPT = "The city of"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(arguments[0] if arguments else temporary) / "tiny-llama-fp8-block"
        summary = quantlab.quantize(MODEL, "fp8-block", output)
        print(f"{summary.bytes_before:,} -> {summary.bytes_after:,} bytes in {summary.seconds:.1f} s")
        for what, (tensors, size) in summary.groups.items():
            print(f"  {what}: {tensors} tensors, {size:,} bytes")

        for folder in (MODEL, output):
            generator = pipeline("text-generation", model=str(folder))
            linears = Counter(
                type(module).__name__ for module in generator.model.modules() if "Linear" in type(module).__name__
            )
            text = generator(PROMPT, max_new_tokens=40, do_sample=False, return_full_text=True)[0]["generated_text"]
            print(f"\n{folder.name}, layers {dict(linears)}:\n  {text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
