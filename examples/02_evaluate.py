"""Measure what a quantization cost: perplexity, KL divergence and top-1 agreement against the original.

To be seen: every number comes with its standard error, and the perplexities of the two models differ by less than what
the choice of the text alone would change. KL compares the two models token by token, so it sees losses far smaller.

    python examples/02_evaluate.py [OUTPUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import quantlab

MODEL = Path(__file__).parent / "tiny-llama"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        for scheme in ("fp8-block", "fp8-dynamic"):
            output = folder / f"tiny-llama-{scheme}"
            quantlab.quantize(MODEL, scheme, output)
            evaluation = quantlab.evaluate(output, baseline=MODEL, windows=8, length=256)
            for title, header, rows in evaluation.tables():
                print(f"\n{scheme}: {title}")
                for row in (header, *rows):
                    print("  " + "  ".join(f"{cell!s:<28}" for cell in row).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
