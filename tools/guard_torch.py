"""Refuse an install of torch that would bring gigabytes of CUDA packages to a machine without a GPU.

    python tools/guard_torch.py VENV_PYTHON ALLOW_CUDA REQUIREMENT [PIP OPTIONS ...]

Asks pip what it would install (`--dry-run --report`, nothing is installed) and looks for NVIDIA's packages. Passes
where torch is installed already, where `nvidia-smi` is found and where ALLOW_CUDA is not empty.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

PIP_REPORT = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run", "--report", "-"]


def cuda_packages(python: str, requirement: list[str]) -> list[str]:
    """Names of NVIDIA packages that pip would install; none when pip cannot tell (the install itself will say why)."""
    report = subprocess.run([python, *PIP_REPORT, *requirement], capture_output=True, text=True, check=False)
    if report.returncode != 0:
        return []
    names = [entry["metadata"]["name"] for entry in json.loads(report.stdout)["install"]]
    return [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def main(python: str, allow: str, *requirement: str) -> int:
    if allow or shutil.which("nvidia-smi"):
        return 0
    found = cuda_packages(python, list(requirement))
    if not found:
        return 0
    print(
        f"{' '.join(requirement)} brings {len(found)} CUDA packages, and this machine has no GPU. Choose a CPU build, "
        "for example TORCH='torch --index-url URL' with the CPU index that pytorch.org names, or say CUDA=1.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
