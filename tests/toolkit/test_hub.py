"""Models on the hub, by its own client: a server here answers what the hub would."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from quantlab.pipeline import quantize
from quantlab.scheme import Calibration, Recipe
from quantlab.verify import verify

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "examples" / "tiny-llama"
COMMIT = "c0ffee" * 6 + "c0ff"
RUN = """
import json, shutil, sys
from pathlib import Path
from types import SimpleNamespace
import quantlab
from quantlab.errors import QuantlabError

def tried(work, *arguments, **options):
    try:
        return work(*arguments, **options)
    except QuantlabError as error:
        return f"{type(error).__name__}: {error}"

def planned(model):
    facts = quantlab.plan(model).to_dict()
    return facts.pop("model") == model and facts

def without_space():
    disk_usage, shutil.disk_usage = shutil.disk_usage, lambda place: SimpleNamespace(free=5_000_000)
    try:
        return tried(quantlab.evaluate, "me/model")
    finally:
        shutil.disk_usage = disk_usage

here = planned(sys.argv[1])
print(json.dumps({
    "same plan": planned("me/model") == here,
    "before": Path("requests").read_text(),
    "foreign": tried(quantlab.quantize, "me/foreign", "fp8-block", "foreign"),
    "absent": tried(quantlab.plan, "me/absent"),
    "revision": tried(quantlab.plan, "me/model", revision="v9"),
    "gated": tried(quantlab.quantize, "me/gated", "fp8-block", "gated"),
    "full": without_space(),
    "encoder": tried(quantlab.evaluate, "me/encoder"),
    "refused": Path("requests").read_text(),
    "made": tried(quantlab.quantize, "me/model", "fp8-block", "made", device="cpu").output,
    "after": Path("requests").read_text(),
    "cached": planned("me/model") == here,
    "at the end": Path("requests").read_text(),
}))
"""


class Hub(BaseHTTPRequestHandler):
    """Models of one user: what they are, their files, whole or in part. Every request for weights becomes a line."""

    protocol_version = "HTTP/1.1"
    models: dict[str, Path]
    requests: Path

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = parts[3] if parts[:3] == ["api", "models", "me"] else parts[1] if len(parts) > 1 else ""
        folder = self.models.get(name)
        if folder is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif "v9" in parts:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif parts[0] == "api":
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            sizes = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
            known = {"id": f"me/{name}", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            self.answer(200, json.dumps(sizes if "tree" in parts else known).encode(), Content_Type="application/json")
        elif name == "gated":
            self.answer(403, X_Error_Code="GatedRepo")
        else:
            self.send_file(folder / self.path.strip("/").split("/", 4)[4])

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        data = path.read_bytes()
        facts = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        given = self.headers.get("Range")
        if path.suffix == ".safetensors" and self.command == "GET":
            with self.requests.open("a") as lines:
                lines.write(f"{given or 'whole'}\n")
        if self.command == "HEAD":
            self.answer(200, Content_Length=str(len(data)), **facts)
        elif given is None:
            self.answer(200, data, **facts)
        else:
            first, last = (int(number) for number in given.removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}", **facts)


@pytest.fixture
def hub(tmp_path: Path, tiny: Any) -> Iterator[str]:
    foreign = shutil.copytree(EMBEDDED, tmp_path / "foreign-model")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    Hub.models = {"model": EMBEDDED, "foreign": foreign, "gated": EMBEDDED, "encoder": tiny("bert").folder}
    Hub.requests = tmp_path / "requests"
    Hub.requests.touch()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def run(program: str, *arguments: str, hub: str, folder: Path, offline: bool = False) -> dict[str, Any]:
    """What a program prints as JSON, in a process whose hub is that one."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "calib"))
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "PYTHONPATH": paths}
    settings["HF_HUB_OFFLINE"] = str(int(offline))
    settings |= dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=os.environ | settings, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_on_the_hub_is_planned_and_refused_before_its_weights_are_downloaded(hub: str, tmp_path: Path) -> None:
    found = run(RUN, str(EMBEDDED), hub=hub, folder=tmp_path)
    assert found["same plan"] is found["cached"] is True
    first, last = found["before"].strip().removeprefix("bytes=").split("-")  # one request
    assert first == "0"
    assert int(last) < 2_000_000 < (EMBEDDED / "model.safetensors").stat().st_size
    assert found["foreign"].startswith("PreflightError: me/foreign: ")
    assert "gptq" in found["foreign"]
    assert found["absent"] == "UsageError: me/absent: no such folder, and no such model on the hub"
    assert found["revision"] == "UsageError: me/model: no revision 'v9' on the hub"
    assert found["gated"].startswith("UsageError: me/gated: gated on the hub; accept its licence there")
    assert found["full"].startswith("PreflightError: me/model: has 0.01 GB to download, the disk of ")
    assert found["full"].endswith(" has 0.01 GB free; free space, or set HF_HOME to a folder on another disk")
    assert found["encoder"].startswith("UsageError: me/encoder: ")
    assert "does not predict the next token" in found["encoder"]
    assert "whole" not in found["refused"]
    assert found["made"] == "made"
    assert found["after"].count("whole") == 1
    assert found["at the end"] == found["after"]
    assert verify(tmp_path / "made").problems == ()


RELATIVE = """
import json, os
import huggingface_hub
import quantlab

whole = huggingface_hub.snapshot_download
huggingface_hub.snapshot_download = lambda *given, **options: os.path.relpath(whole(*given, **options))
print(json.dumps({"tensors": len(quantlab.plan("me/model").decisions)}))
"""


def test_a_cache_in_a_relative_folder(hub: str, tmp_path: Path) -> None:
    """Older versions of the hub's client give its folder as HF_HOME says it."""
    assert run(RELATIVE, hub=hub, folder=tmp_path)["tensors"] > 0


LOAD = """
import json
import torch
from transformers import AutoModelForCausalLM
import quantlab
from quantlab.errors import QuantlabError

def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([[1, 50, 70, 90, 200]])).logits

try:
    quantlab.load("me/absent")
except QuantlabError as error:
    absent = str(error)
stock = AutoModelForCausalLM.from_pretrained("me/static")
cached = quantlab.load("me/static", kv="none")
here = quantlab.load("static", kv="none")
written = quantlab.pipeline("text-generation", "me/static")("The river", max_new_tokens=4, do_sample=False)
print(json.dumps({
    "absent": absent,
    "static": sum(getattr(module, "activation_scale", None) is not None for module in stock.modules()),
    "alike": [torch.equal(logits(model), logits(here)) for model in (stock, cached)],
    "verified": quantlab.verify("me/static").problems,
    "written": written[0]["generated_text"],
}))
"""


def test_a_checkpoint_on_the_hub_is_loaded_with_what_lies_beside_its_weights(hub: str, tmp_path: Path) -> None:
    recipe = Recipe(calibration=Calibration(samples=2, length=64, activations="static"))
    quantize(EMBEDDED, recipe, tmp_path / "static", device="cpu")
    Hub.models["static"] = tmp_path / "static"
    found = run(LOAD, hub=hub, folder=tmp_path)
    assert found["absent"] == "me/absent: no such folder, and no such model on the hub"
    assert found["static"] > 0
    assert found["alike"] == [True, True]
    assert found["verified"] == []
    assert found["written"].startswith("The river")


LOAD_SOME = """
import json, sys, warnings
from transformers import AutoModelForCausalLM
import quantlab

found = {}
for name in sys.argv[1:]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(name)
    scales = sum(getattr(module, "activation_scale", None) is not None for module in model.modules())
    lines = [f"{warning.category.__module__}: {warning.message}" for warning in told]
    found[name] = scales, [line for line in lines if "activation_scales" in line]
print(json.dumps(found))
"""


def test_scales_of_activations_that_the_hub_cannot_be_asked_for_are_named(hub: str, tmp_path: Path) -> None:
    """Not where it has said before that there are none."""
    recipe = Recipe(calibration=Calibration(samples=2, length=64, activations="static"))
    for name, made in (("static", recipe), ("plain", "fp8-block")):
        quantize(EMBEDDED, made, tmp_path / name, device="cpu")
        Hub.models[name] = tmp_path / name
    (tmp_path / "elsewhere").mkdir()
    given = {"hub": hub, "folder": tmp_path / "elsewhere"}
    fetched = "import transformers as t; t.AutoModelForCausalLM.from_pretrained('me/static'); print('0')"
    run(fetched, **given)  # without `import quantlab`: weights and configs alone
    assert run(LOAD_SOME, "me/plain", **given) == {"me/plain": [0, []]}
    without = run(LOAD_SOME, "me/plain", "me/static", **given, offline=True)
    assert without["me/plain"] == [0, []]
    scales, (text,) = without["me/static"]
    assert scales == 0
    where, _, text = text.partition(": ")
    assert where == "quantlab.locate"
    assert text.startswith("me/static: whether the hub has quantlab/activation_scales.safetensors is unknown (")
    assert text.endswith("); it is loaded without")
    scales, told = run(LOAD_SOME, "me/static", **given)["me/static"]
    assert scales > 0
    assert told == []
