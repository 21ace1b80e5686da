"""The structure of the project: who may import whom, what documents name, what an import may touch."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "quantlab": ROOT / "quantlab",
    "quantlab_calib": ROOT / "calib" / "quantlab_calib",
    "quantlab_kernels": ROOT / "kernels" / "quantlab_kernels",
}
FORBIDDEN = {"quantlab": set(), "quantlab_calib": {"quantlab"}, "quantlab_kernels": {"quantlab", "quantlab_calib"}}
READMES = sorted(p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        crossed = imported(path) & FORBIDDEN[package]
        assert not crossed, f"{path.relative_to(ROOT)} imports {crossed}"


def test_the_name_kernels_stays_free_for_hugging_face():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "calib" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["quantlab", "quantlab.cli", "quantlab_kernels", "quantlab_calib"])
def test_import_does_not_touch_cuda(module: str):
    code = f"import {module}, sys; t = sys.modules.get('torch'); sys.exit(t is not None and t.cuda.is_initialized())"
    paths = ":".join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "calib"))
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"})


def test_every_launch_of_a_triton_kernel_says_whether_products_are_added_unrounded():
    """Triton 3.9 warns where it is not said, and 3.10 changes the default, and with it results and speed."""
    trees = [ast.parse(p.read_text(encoding="utf-8")) for folder in PACKAGES.values() for p in folder.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    kernels = {f.name for f in functions if "triton.jit" in map(ast.unparse, f.decorator_list)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    launches = [call for call in calls if ast.unparse(call.func.value) in kernels]
    assert launches
    silent = [ast.unparse(call.func) for call in launches if "enable_fp_fusion" not in {k.arg for k in call.keywords}]
    assert not silent


def paths_and_symbols(text: str) -> set[str]:
    """What stands in backticks and looks like a path or a Python symbol of ours."""
    quoted = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    paths = {
        q
        for q in quoted
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", q) and ("/" in q or q.endswith((".py", ".cu", ".cuh", ".md", ".toml")))
    }
    symbols = {q for q in quoted if re.fullmatch(r"quantlab(_kernels|_calib)?(\.\w+)+(\(\))?", q)}
    return paths | symbols


def exists(name: str, document: Path) -> bool:
    if re.fullmatch(r"quantlab(_kernels|_calib)?(\.\w+)+(\(\))?", name) and not name.endswith((".py", ".md")):
        return resolves(name.removesuffix("()"))
    return any(
        (base / name).exists() for base in (document.parent, ROOT, *PACKAGES.values(), ROOT / "kernels", ROOT / "calib")
    )


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for attribute in parts[cut:]:
            if not hasattr(target, attribute):
                return False
            target = getattr(target, attribute)
        return True
    return False


# Files that a run makes in the user's folders, and tensors and files of other people's formats.
NOT_OURS = re.compile(
    r"^(OUT|DIR|results|tuned)(/|$)|safetensors|config\.json|^MODEL|quantlab/(manifest|summary|eval|recipe|activation)|\.partial"
)


@pytest.mark.parametrize("document", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_only_what_exists(document: Path):
    names = paths_and_symbols(document.read_text(encoding="utf-8"))
    missing = sorted(n for n in names if not NOT_OURS.search(n) and not exists(n, document))
    assert not missing, f"{document.relative_to(ROOT)} names what does not exist: {missing}"


def test_no_machine_path_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    offenders = []
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".cu", ".cuh", ".json", ""} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if re.search(r"/(home|root|work|Users)/\w|pypi-more|/opt/pypi", text) and path != Path(__file__):
                offenders.append(name)
    assert not offenders
