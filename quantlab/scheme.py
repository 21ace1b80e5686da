"""What is quantized how: a `Scheme` for one layer, a `Recipe` for a model. Values only; nothing here touches a model.

One TOML file is one experiment:

    scheme = "fp8-block"

    [[layers]]                       # the first match wins
    match = "model.layers.0.*"       # a glob over module names, or "re:" and a regular expression
    scheme = "none"                  # leave alone

    [calibration]
    data = "bundled"
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from quantlab.errors import UsageError
from quantlab_kernels.common.kv import FORMATS as KV_FORMATS
from quantlab_kernels.formats import E4M3, INT4
from quantlab_kernels.qtensor import TensorSpec

__all__ = ["SCHEMES", "Calibration", "Recipe", "Rule", "Scheme", "TensorSpec", "scheme_named"]


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is stored and computed.

    name    as the user writes it
    weight  spec of the weight [N, K]
    input   spec of the activation [M, K], or None for 16-bit activations
    layout  on-disk format: "fp8" is Hugging Face's `quant_method: fp8`; the others are compressed-tensors formats
    about   one line for `--help` and messages
    rows    N must be a multiple of this for every engine's kernel
    """

    name: str
    weight: TensorSpec
    input: TensorSpec | None
    layout: Literal["fp8", "float-quantized", "pack-quantized"]
    about: str
    rows: int = 1

    @property
    def alignment(self) -> tuple[int, int]:
        """(N, K) of a weight must be multiples of these for every reader to load it."""
        rows, columns = self.weight.block
        return max(rows, self.rows), max(columns, 1)


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme(
            "fp8-block",
            weight=TensorSpec(E4M3, (128, 128), scale="power2"),
            input=TensorSpec(E4M3, (1, 128), dynamic=True),
            layout="fp8",
            about="E4M3 weights in 128x128 blocks, E4M3 activations in groups of 128 (DeepSeek-V3)",
        ),
        Scheme(
            "fp8-dynamic",
            weight=TensorSpec(E4M3, (1, -1), scale="bfloat16"),
            input=TensorSpec(E4M3, (1, -1), dynamic=True),
            layout="float-quantized",
            about="E4M3 weights with a scale per row, E4M3 activations with a scale per token",
        ),
        Scheme(
            "int4",
            weight=TensorSpec(INT4, (1, 128), scale="bfloat16"),
            input=None,
            layout="pack-quantized",
            about="INT4 weights in groups of 128, 16-bit activations (W4A16)",
            rows=64,  # of Marlin's and Machete's tiles
        ),
        Scheme(
            "int4-fp8",
            weight=TensorSpec(INT4, (1, 128), scale="bfloat16"),
            input=TensorSpec(E4M3, (1, -1), dynamic=True),
            layout="pack-quantized",
            about="INT4 weights in groups of 128, E4M3 activations with a scale per token (W4AFP8)",
            rows=128,  # of vLLM's W4A8 kernel
        ),
    )
}


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The tail of an error message about an unknown name."""
    known = sorted(known)
    given = given.lower()
    begun = [name for name in known if given and name.startswith(given)]
    close = begun or difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"known: {', '.join(known)}{hint}"


def scheme_named(name: str) -> Scheme | None:
    """The scheme of this name; None for "none", which leaves a layer alone. Raises UsageError for anything else."""
    if name == "none":
        return None
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}; {did_you_mean(name, [*SCHEMES, 'none'])}")
    return SCHEMES[name]


@dataclass(frozen=True)
class Rule:
    """One line of a recipe: modules whose name matches get the scheme ("none" leaves them alone)."""

    match: str
    scheme: str

    def __post_init__(self) -> None:
        scheme_named(self.scheme)
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise UsageError(f"pattern {self.match!r} is not a regular expression: {error}") from None

    def matches(self, module: str) -> bool:
        if self.match.startswith("re:"):
            return re.search(self.match[3:], module) is not None
        return fnmatch.fnmatchcase(module, self.match)


# What calibration does to INT4 weights, in this order, and under which effort; a switch of the recipe wins over it.
STEPS = ("rotate", "smooth", "gptq", "original", "tune")
EFFORTS: dict[str, tuple[str, ...]] = {
    "fast": ("gptq", "original"),
    "default": ("gptq", "original"),
    "best": ("rotate", "gptq", "original"),
}
SAMPLES = {"fast": 32, "default": 64, "best": 64}  # sequences that an effort takes unless told


@dataclass(frozen=True)
class Calibration:
    """The data of a calibration pass, and what it is used for.

    data         "bundled", a local text or JSONL file, or a `datasets` name ("name[:config[:split]]")
    samples      number of sequences; None leaves it to the effort
    length       tokens per sequence
    seed         of the choice of sequences
    activations  "dynamic": 1x128 scales computed at run time; "static": from the pass, kept in a side file of ours
    effort       which steps INT4 weights get; "fast": those of "default" on less data, codes visited once
    rotate, smooth, gptq, original, tune  each step by itself, None leaves it to the effort: turn the residual stream;
                 fold scales into norms and layers before; GPTQ over whole rows; aim at the outputs of the original
                 model; tune codes for a block's output
    tune_steps   of gradient descent for each block
    """

    data: str = "bundled"
    samples: int | None = None
    length: int = 512
    seed: int = 0
    activations: Literal["dynamic", "static"] = "dynamic"
    effort: str = "default"
    rotate: bool | None = None
    smooth: bool | None = None
    gptq: bool | None = None
    original: bool | None = None
    tune: bool | None = None
    tune_steps: int = 200

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise UsageError(f"unknown effort {self.effort!r}; {did_you_mean(self.effort, EFFORTS)}")
        if self.count < 1 or self.length < 2:
            raise UsageError(f"calibration of {self.count} x {self.length} tokens: needs 1 x 2 at least")
        if self.activations not in ("dynamic", "static"):
            raise UsageError(f"activations = {self.activations!r}; known: dynamic, static.")
        if self.tune_steps < 1:
            raise UsageError(f"tune_steps = {self.tune_steps}: needs at least one; leave tuning out with tune = false")

    @property
    def count(self) -> int:
        """How many sequences."""
        return SAMPLES[self.effort] if self.samples is None else self.samples

    @property
    def optional(self) -> bool:
        """Whether a model that it cannot be done for is rounded without data: nothing was asked for but the effort."""
        named = self.data != "bundled" or self.activations == "static" or any(getattr(self, step) for step in STEPS)
        return self.effort == "fast" and not named

    def switched(self, step: str) -> bool:
        """Whether a step is taken."""
        wanted: bool | None = getattr(self, step)
        return step in EFFORTS[self.effort] if wanted is None else wanted

    def only(self, steps: Iterable[str]) -> Calibration:
        """The same with these steps and no others. Raises UsageError for one that is not known."""
        wanted = {step.strip() for step in steps} - {""}
        for step in wanted.difference(STEPS):
            raise UsageError(f"unknown step {step!r}; {did_you_mean(step, STEPS)}")
        return replace(self, **{step: step in wanted for step in STEPS})  # type: ignore[arg-type]

    def describe(self) -> str:
        steps = [step for step in STEPS if self.switched(step)]
        return f"{self.effort}: {', '.join(steps) or 'one pass'}"


@dataclass(frozen=True)
class Recipe:
    """Which scheme each layer gets. `rules` are tried in order, then `scheme` holds for the rest.

    kv is the format of the KV cache that `quantlab.load` gives the checkpoint; other loaders do not see it.
    """

    scheme: str = "fp8-block"
    rules: tuple[Rule, ...] = ()
    calibration: Calibration | None = None
    kv: str = "none"

    def __post_init__(self) -> None:
        if self.kv not in ("none", *KV_FORMATS):
            raise UsageError(f"unknown KV format {self.kv!r}; {did_you_mean(self.kv, ['none', *KV_FORMATS])}")
        layouts = {s.layout for s in self.schemes()}
        if not layouts:
            hint = f"; unquantized weights take a cache at load: quantlab.load(MODEL, kv={self.kv!r})"
            raise UsageError(
                "the recipe quantizes nothing: every scheme in it is 'none'" + (hint if self.kv != "none" else "")
            )
        if len(layouts) > 1 and "fp8" in layouts:
            names = ", ".join(sorted(s.name for s in self.schemes()))
            raise UsageError(
                f"the recipe mixes {names}: the format of fp8-block holds one scheme, the others mix with each other"
            )

    def schemes(self) -> tuple[Scheme, ...]:
        """The distinct schemes that the recipe can give."""
        names = dict.fromkeys([self.scheme, *(rule.scheme for rule in self.rules)])
        return tuple(s for s in map(scheme_named, names) if s is not None)

    @classmethod
    def of(cls, recipe: Recipe | str | Path) -> Recipe:
        """A recipe as it is, what is advised for the scheme of a name, or out of a TOML file."""
        if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith(".toml")):
            return cls.from_toml(Path(recipe))
        if not isinstance(recipe, (Recipe, str)):
            raise UsageError(f"recipe is a {type(recipe).__name__}; give a Recipe, the name of a scheme or a TOML file")
        return cls.advised(recipe) if isinstance(recipe, str) else recipe

    @classmethod
    def advised(cls, scheme: str, kv: str = "none") -> Recipe:
        """One scheme for all layers; INT4 is calibrated on a little bundled text: without, it costs thrice as much."""
        recipe = cls(scheme, kv=kv)
        return replace(recipe, calibration=Calibration(effort="fast")) if recipe.is_int4 else recipe

    @property
    def is_int4(self) -> bool:
        """Whether layers that no rule names become INT4."""
        scheme = scheme_named(self.scheme)
        return scheme is not None and scheme.weight.format is INT4

    @classmethod
    def from_toml(cls, path: Path) -> Recipe:
        """Read a recipe. Raises UsageError that names the file and the key for anything that does not fit."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UsageError(f"recipe {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe {path}: not TOML: {error}") from None
        try:
            return cls.from_dict(data)
        except UsageError as error:
            raise UsageError(f"recipe {path}: {error}") from None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        data = dict(data)
        layers = data.pop("layers", [])
        if not isinstance(layers, list):
            raise UsageError(f"layers: got {layers!r}, needs tables, each begins with [[layers]]")
        for key in data.keys() - {"scheme", "kv", "calibration"}:
            known = ("scheme", "kv", "layers", "calibration")
            raise UsageError(f"[recipe]: unknown key {key!r}; {did_you_mean(key, known)}")
        rules = tuple(_build(Rule, entry, "layers") for entry in layers)
        calibration = data.pop("calibration", None)
        if calibration is not None:
            data["calibration"] = _build(Calibration, calibration, "calibration")
        return _build(cls, data | {"rules": rules}, "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back; also what `to_toml` writes."""
        data: dict[str, Any] = {"scheme": self.scheme}
        if self.kv != "none":
            data["kv"] = self.kv
        data["layers"] = [asdict(rule) for rule in self.rules]
        if self.calibration is not None:
            data["calibration"] = {key: value for key, value in asdict(self.calibration).items() if value is not None}
        return data

    def to_toml(self) -> str:
        data = self.to_dict()
        rules, calibration = data.pop("layers"), data.pop("calibration", {})
        lines = [f"{key} = {_toml(value)}" for key, value in data.items()]
        for rule in rules:
            lines += ["", "[[layers]]", *(f"{key} = {_toml(value)}" for key, value in rule.items())]
        if calibration:
            lines += ["", "[calibration]", *(f"{key} = {_toml(value)}" for key, value in calibration.items())]
        return "\n".join(lines) + "\n"


def _build(kind: type, data: Any, where: str) -> Any:
    """Construct a dataclass from parsed TOML, with a message about the key where one does not belong."""
    if not isinstance(data, dict):
        raise UsageError(f"[{where}]: got {data!r}, needs a table")
    known = {f.name: str(f.type) for f in fields(kind)}
    for key, value in data.items():
        if key not in known:
            raise UsageError(f"[{where}]: unknown key {key!r}; {did_you_mean(key, known)}")
        wanted = {"str": str, "int": int, "bool": bool}.get(known[key].removesuffix(" | None"))
        if wanted is not None and type(value) is not wanted:
            raise UsageError(f"[{where}]: {key} = {value!r}, needs {wanted.__name__}")
    missing = [f.name for f in fields(kind) if f.name not in data and f.default is f.default_factory is MISSING]
    if missing:
        raise UsageError(f"[{where}]: needs {' and '.join(missing)} too")
    return kind(**data)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
