"""Quantize a vision model and compare what it says about the same images before and after.

To be seen: the command for language models does image classifiers and detectors too; the plan says what stays and why
(patch embedding, norms, the classifier's head); the outputs stay within a few percent. The models here are small and
untrained, so only the distance between the two outputs means anything; put your own folder in place of `make`.

    python examples/06_quantize_a_vision_model.py [OUTPUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

import quantlab


def classifier() -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=64
    )
    return ViTForImageClassification(config)


def detector() -> PreTrainedModel:
    backbone = RTDetrResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, d_model=256, encoder_hidden_dim=256, encoder_in_channels=[64, 128, 256],
        decoder_in_channels=[256, 256, 256], encoder_layers=1, decoder_layers=2, num_queries=20, num_labels=4,
        anchor_image_size=None, num_denoising=0,
    )  # fmt: skip
    return RTDetrForObjectDetection(config)


def compare(kind: type[PreTrainedModel], folder: Path, images: torch.Tensor) -> float:
    """Relative distance of the logits of the quantized model from those of the original."""
    summary = quantlab.quantize(folder, "fp8-dynamic", folder.with_name(f"{folder.name}-fp8-dynamic"))
    for reason, (count, nbytes) in summary.groups.items():
        print(f"  {count:4} tensors, {nbytes / 1e6:6.2f} MB: {reason}")
    with torch.no_grad():
        before, after = (kind.from_pretrained(path).eval()(images).logits for path in (folder, summary.output))
    return ((after - before).norm() / before.norm()).item()


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    with tempfile.TemporaryDirectory() as temporary:
        for make in (classifier, detector):
            model = make().eval()
            print(type(model).__name__)
            folder = Path(arguments[0] if arguments else temporary) / make.__name__
            model.save_pretrained(folder)
            print(f"  logits change by {compare(type(model), folder, images):.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
