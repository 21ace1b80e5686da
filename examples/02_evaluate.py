"""Measure what a quantization cost, compare two, and write a report: a page with all there is to say about one.

To be seen: every number comes with its standard error, and the perplexities of the two models differ by less than what
the choice of the text alone would change. KL compares the two models token by token, so it sees losses far smaller.
Two checkpoints are compared window by window, which sees smaller differences yet. The report (it needs the extra
`report`) is one HTML file: open it in a browser.

    python examples/02_evaluate.py [OUTPUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import quantlab
from quantlab.compare import compare
from quantlab.report import report

MODEL = Path(__file__).parent / "tiny-llama"
SCHEMES = ("fp8-block", "fp8-dynamic")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        for scheme in SCHEMES:
            output = folder / f"tiny-llama-{scheme}"
            quantlab.quantize(MODEL, scheme, output)
            evaluation = quantlab.evaluate(output, baseline=MODEL, windows=8, length=256)
            for title, header, rows in evaluation.tables():
                print(f"\n{scheme}: {title}")
                for row in (header, *rows):
                    print("  " + "  ".join(f"{cell!s:<28}" for cell in row).rstrip())
        block, rows = (folder / f"tiny-llama-{scheme}" for scheme in SCHEMES)
        for difference in compare(block, rows).differences:
            print(f"{SCHEMES[1]} beside {SCHEMES[0]}: {difference.measure} {difference.change}")
        print(f"\nthe report: {report(block, baseline=MODEL, calibration='bundled').html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
