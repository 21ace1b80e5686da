"""`quantlab report`: what it says, that a browser shows it, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quantlab import layer_errors, plots
from quantlab.cli import app
from quantlab.errors import PreflightError, UsageError
from quantlab.generation import agreement
from quantlab.kinds import position
from quantlab.layer_errors import Pair, observe, weight_errors
from quantlab.pipeline import quantize
from quantlab.report import report
from quantlab.scheme import SCHEMES, Calibration, Recipe
from quantlab.source import Source
from quantlab_kernels.qtensor import quantize as quantize_tensor

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}
EVALUATION = {
    "model": "m", "baseline": str(MODEL), "perplexity": {"value": 22.9, "error": 2.6},
    "baseline_perplexity": {"value": 22.8, "error": 2.6}, "perplexity_ratio": {"value": 1.003, "error": 0.0013},
    "kl": {"value": 0.0035, "error": 0.0001}, "top1": {"value": 0.962, "error": 0.002}, "recovery": 0.997,
    "tasks": {}, "windows": {"kl": [0.003, 0.004, 0.0035]},
    "settings": {"windows": 3, "length": 256, "dtype": "bfloat16", "device": "cpu"},
}  # fmt: skip


class Page(HTMLParser):
    """Collects ids, text and what would be loaded, and holds every tag against its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action", "data", "srcset") and not value.startswith(
                ("#", "data:")
            ):
                self.loaded.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> ends nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "tiny-fp8-block"
    quantize(MODEL, "fp8-block", folder, device="cpu", workers=1)
    (folder / "quantlab" / "eval.json").write_text(json.dumps(EVALUATION))
    return folder


@pytest.fixture(scope="module")
def full(made):
    return report(made, baseline=MODEL, calibration="bundled", png=True)


def test_the_page_is_well_formed_small_and_loads_nothing(full):
    text = full.html.read_text()
    page = Page(text)
    assert len(text) < 3_000_000
    assert page.loaded == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|<script|<link|<iframe", text)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used <= set(page.ids)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == text.count("<figcaption>") == 6
    assert full.missing == ()


def test_the_page_says_what_the_files_say(full, made):
    text = Page(full.html.read_text()).text
    summary = json.loads((made / "quantlab/summary.json").read_text())
    assert f"{summary['compression']:.2f}× smaller" in text
    for line in ("99.70 %", "0.0035 ± 0.0001", "quantized: fp8-block", 'scheme = "fp8-block"', "quantlab eval"):
        assert line in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_json_beside_it(full):
    found = json.loads(full.json.read_text())
    assert found["schema"] == 1
    assert len(found["layers"]) == 35
    assert all(25 < layer["weight_sqnr_db"] < 40 and layer["output_sqnr_db"] > 20 for layer in found["layers"])
    assert found["outliers"][0]["ratio"] == max(layer["ratio"] for layer in found["outliers"])
    assert "channels" not in found["outliers"][0]
    assert len(found["outliers"]) == 4 * 5  # q, k and v read one tensor; gate and up another
    assert len(found["cache"]) == 9 * 5  # keys in two ways and values, each in three formats
    cache = {(row["depth"], row["form"]): row["sqnr_db"] for row in found["cache"]}
    for depth in range(5):
        assert cache[depth, "keys, centred, int4"] > cache[depth, "keys, plain, int4"]
        assert 14 < cache[depth, "values, int4"] < cache[depth, "values, fp8"] < cache[depth, "values, int8"]
    assert len(full.images) == 8
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in full.images)


@pytest.mark.parametrize("width", [1000, 500])
def test_a_browser_shows_it(full, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium installed")
    probe = (  # writes what the layout came to into the page, which --dump-dom prints
        "<script>window.onload=()=>{document.body.dataset.wide=document.documentElement.scrollWidth;"
        "document.body.dataset.plots=[...document.querySelectorAll('svg')].filter(s=>s.clientHeight>50).length}</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(full.html.read_text().replace("</head>", probe + "</head>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    run = subprocess.run(
        [browser, *flags.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
         f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 'data-plots="6"' in run.stdout
    assert int(re.search(r'data-wide="(\d+)"', run.stdout)[1]) <= width  # nothing sticks out to the side


def test_without_a_baseline_it_names_what_is_missing(made, tmp_path):
    written = report(made, tmp_path / "a" / "page.html")
    text = Page(written.html.read_text()).text
    assert written.json == tmp_path / "a" / "page.json"
    for line in written.missing:
        assert line in text
    assert [line.partition(":")[0] for line in written.missing] == [
        "error of each layer's weight",
        "error of each layer's output, outliers",
    ]


def test_a_checkpoint_of_another_tool_shows_what_it_can(made, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(made, foreign, ignore=shutil.ignore_patterns("quantlab"))
    written = report(foreign, tmp_path / "page.html", baseline=MODEL)
    assert written.missing[0].startswith("sizes, coverage and time: quantlab/summary.json is not there")
    assert written.missing[1].startswith("quality: not measured yet; quantlab eval")
    assert len(json.loads(written.json.read_text())["layers"]) == 35
    assert Page(written.html.read_text()).loaded == []


def test_texts_side_by_side(made, tmp_path):
    written = report(made, tmp_path / "page.html", baseline=MODEL, generate=True)
    texts = json.loads(written.json.read_text())["texts"]
    assert texts["quantized"]["prompts"] == texts["original"]["prompts"]
    assert all(len(found["texts"]) == 3 and found["tokens_per_second"] > 0 for found in texts.values())
    assert texts["quantized"]["weight_bytes"] < 0.7 * texts["original"]["weight_bytes"]
    shown = Page(written.html.read_text()).text
    assert all(
        text in shown.replace("\n", "") for found in texts.values() for text in found["texts"] if "\n" not in text
    )
    assert agreement("abcd", "abxd") == 2
    assert agreement("ab", "abc") == 2


def test_what_an_evaluation_measured_and_how_to_do_it_again(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    written = {"device": "cpu", "prompts": ["It"], "texts": ["is"], "tokens_per_second": 9.0, "weight_bytes": 5,
               "peak_bytes": None}  # fmt: skip
    settings = EVALUATION["settings"] | {"context": 64, "kv": "int8", "attention": "none"}
    found = EVALUATION | {"settings": settings, "generation": {"model": written, "baseline": written}}
    (copy / "quantlab/eval.json").write_text(json.dumps(found))
    content = json.loads(report(copy).json.read_text())
    assert list(content["texts"]) == ["quantized", "original"]
    assert content["commands"][1].endswith("--windows 3 --length 256 --context 64 --kv int8 --generate")


def test_a_baseline_on_the_hub_is_that_of_its_revision(made, tmp_path, hub_models):
    asked = hub_models({"me/model": MODEL})
    page, copy = tmp_path / "page.html", shutil.copytree(made, tmp_path / "copy")
    given = ["report", str(copy), "--baseline", "me/model", "--baseline-revision", "v2", "--generate", "-o", str(page)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert asked == [("me/model", "v2")] * 2
    again, _, last = json.loads(page.with_suffix(".json").read_text())["commands"]
    assert again.startswith("quantlab quantize me/model --revision v2 --recipe ")
    assert last.endswith("/copy --baseline me/model --baseline-revision v2")
    settings = EVALUATION["settings"] | {"baseline_revision": "v1"}
    found = EVALUATION | {"baseline": "me/model", "settings": settings}
    (copy / "quantlab/eval.json").write_text(json.dumps(found))
    content = json.loads(report(copy).json.read_text())
    assert all(" me/model --baseline-revision v1" in line for line in [*content["commands"][1:], *content["missing"]])


def test_names_cannot_break_the_page(made, tmp_path):
    copy = tmp_path / "a<b>&c"
    shutil.copytree(made, copy)
    (copy / "quantlab/eval.json").write_text(json.dumps(EVALUATION | {"baseline": "<script>x</script>"}))
    text = report(copy).html.read_text()
    assert "<script>" not in text
    assert "<script>x</script>" in Page(text).text


def test_unfinished_runs_are_refused(tmp_path):
    (tmp_path / "out.partial").mkdir()
    for given in ("out", "out.partial"):
        with pytest.raises(UsageError, match=r"the run that makes out has not finished.*it continues"):
            report(tmp_path / given)
    with pytest.raises(UsageError, match="no such folder"):
        report(tmp_path / "nothing")


def test_refusals(made, tmp_path, tiny, monkeypatch):
    with pytest.raises(UsageError, match="is not quantized"):
        report(MODEL, tmp_path / "page.html")
    with pytest.raises(UsageError, match=r"--calib runs data through the original.*--baseline"):
        report(made, calibration="bundled")
    with pytest.raises(UsageError, match=r"--baseline-revision is of a baseline.*--baseline MODEL"):
        report(made, baseline_revision="v2")
    with pytest.raises(UsageError, match="revision v2 needs a model on the hub, this is a folder"):
        report(made, baseline=MODEL, baseline_revision="v2")
    with pytest.raises(UsageError, match=r"give the model that .* was made from"):
        report(made, baseline=tiny("llama").folder)
    with pytest.raises(UsageError, match="the baseline is itself quantized"):
        report(made, baseline=made)
    for target in (tmp_path, tmp_path / "page.json"):
        with pytest.raises(UsageError, match="give the name of an HTML file"):
            report(made, target)
    damaged = tmp_path / "damaged"
    shutil.copytree(made, damaged)
    for name, content, message in (
        ("recipe.toml", "scheme = ", "not TOML"),
        ("eval.json", "{", r"eval\.json: is not JSON"),
        ("eval.json", "[]", r"eval\.json: has no 'perplexity'"),
        ("summary.json", '{"bytes_before": 1}', r"summary\.json: has no 'bytes_after'"),
        ("summary.json", '{"bytes_before": [1]}', r"summary\.json: has no 'bytes_before' that could be shown"),
    ):
        before = (damaged / "quantlab" / name).read_text()
        (damaged / "quantlab" / name).write_text(content)
        with pytest.raises((PreflightError, UsageError), match=message):
            report(damaged)
        (damaged / "quantlab" / name).write_text(before)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'quantlab-toolkit\[report\]'"):
        report(made)


def test_weight_errors_are_those_of_the_definition(made, monkeypatch):
    monkeypatch.setattr(layer_errors, "BAND_ELEMENTS", 128 * 256)  # several bands
    pair = Pair(Source.open(made), Source.open(MODEL))
    found = weight_errors(pair)
    module = "model.layers.2.mlp.gate_proj"
    weight = Source.open(MODEL).read(module + ".weight").double()
    noise = (quantize_tensor(weight, SCHEMES["fp8-block"].weight).dequantize().double() - weight).square().sum()
    assert found[module] == pytest.approx(10 * math.log10(weight.square().sum() / noise), abs=1e-3)


def test_output_errors_are_those_of_the_layer_alone(made):
    """Against a layer computed by hand, on the hidden states that transformers itself hands to it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantlab_calib import data

    pair = Pair(Source.open(made), Source.open(MODEL))
    found = observe(pair, "bundled", samples=2, length=64)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = data.windows("bundled", AutoTokenizer.from_pretrained(MODEL), "calibration", count=2, length=64, seed=0)
    module, seen = "model.layers.3.mlp.down_proj", []
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    x = seen[0].reshape(-1, seen[0].shape[-1])
    weight = model.get_submodule(module).weight.detach()
    scheme = SCHEMES["fp8-block"]
    ours = quantize_tensor(x, scheme.input).dequantize() @ quantize_tensor(weight, scheme.weight).dequantize().T
    exact = x @ weight.T
    noise = (ours - exact).square().sum()
    assert found.output[module] == pytest.approx(10 * math.log10(exact.square().sum() / noise), abs=0.02)
    amax = x.abs().amax(0)
    (outlier,) = [entry for entry in found.outliers if entry["module"] == module]
    assert outlier["absmax"] == pytest.approx(float(amax.max()), rel=1e-4)
    assert outlier["ratio"] == pytest.approx(float(amax.max() / amax.median()), rel=1e-3)
    assert found.tokens == outlier["tokens"] == 128


def test_experts_have_weight_errors_and_share_a_cell(tiny, tmp_path, character_tokenizer):
    folder = tmp_path / "moe"
    shutil.copytree(tiny("qwen3_moe").folder, folder)
    character_tokenizer(bos=True).save_pretrained(folder)
    quantize(folder, "fp8-block", tmp_path / "out", device="cpu", workers=1)
    written = report(tmp_path / "out", baseline=folder, calibration="bundled")
    found = json.loads(written.json.read_text())
    experts = [layer for layer in found["layers"] if "experts" in layer["module"]]
    assert {layer["type"] for layer in experts} == {f"mlp.experts.*.{n}_proj" for n in ("gate", "up", "down")}
    assert all(layer["weight_sqnr_db"] > 20 for layer in experts)
    assert "tokens per expert" in written.html.read_text()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.layers.12.mlp.experts.7.up_proj", (12, "mlp.experts.*.up_proj")),
        ("encoder.layer.0.output.dense", (0, "output.dense")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_position(module, expected):
    assert position(module) == expected


def test_plots_of_one_value_and_of_equal_values():
    for cells in ({(0, "a"): 30.0}, {(0, "a"): 30.0, (1, "a"): 30.0}):
        assert "<svg" in plots.heat_map("h", "t", "c", cells, "dB").svg()
        assert "<svg" in plots.heat_map("h", "t", "c", cells, "x", log=True).svg()


def test_layers_that_were_turned_before_rounding_are_not_compared(with_tokenizer, text, tmp_path):
    model = with_tokenizer("llama").folder
    turned = Calibration(text, samples=8, length=32).only(["rotate"])
    quantize(model, Recipe("int4", calibration=turned), tmp_path / "turned", device="cpu", workers=1)
    written = report(tmp_path / "turned", baseline=model, calibration=text)
    found = json.loads(written.json.read_text())
    assert found["layers"] == []
    assert found["outliers"]
    assert any("turned or scaled before rounding" in line for line in written.missing)
