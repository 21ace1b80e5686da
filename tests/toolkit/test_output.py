"""The output appears whole or not at all: existing and read-only places, full disks, two runs, Ctrl-C, kill -9."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantlab import output, stream
from quantlab.checkpoint import MANIFEST, SUMMARY
from quantlab.errors import PreflightError, UsageError, VerificationError
from quantlab.output import LeftoverWarning, Output
from quantlab.pipeline import quantize
from quantlab.summary import Summary
from quantlab.verify import verify

Make = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def several_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHARD_BYTES", 300_000)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """Shells start what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(source: Path, out: Path, **options: object) -> Summary:
    return quantize(source, "fp8-block", out, device="cpu", **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files but those that tell the time a run took."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: value for name, value in named.items() if name not in (MANIFEST, SUMMARY)}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_manifest_lists_every_file_with_its_hash(raw_checkpoint: Make, tmp_path: Path) -> None:
    run(raw_checkpoint(), tmp_path / "out")
    listed = {entry["name"]: entry for entry in json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]}
    present = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert present == listed.keys() | {MANIFEST}
    for name, entry in listed.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_an_output_that_exists(raw_checkpoint: Make, tmp_path: Path) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(UsageError, match=re.escape(f"{out}: exists and is a file")):
        run(source, out)
    out.unlink()
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(UsageError, match=re.escape(f"{out}: exists; choose another with -o")):
        run(source, out)
    with pytest.raises(UsageError, match=re.escape(f"{out}: exists and was not made by quantlab")):
        run(source, out, overwrite=True)
    assert (out / "precious").read_text() == "mine"
    (out / "precious").unlink()
    run(source, out)  # an empty folder is as good as none
    with pytest.raises(UsageError, match=re.escape(f"{out}: exists; choose another with -o, or pass --overwrite")):
        run(source, out)
    assert names_in(tmp_path) == {"model", "out"}


def test_overwrite_replaces_in_one_step(raw_checkpoint: Make, tmp_path: Path) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    run(source, out)
    (out / "stale.txt").write_text("old")
    quantize(source, "fp8-dynamic", out, device="cpu", overwrite=True)
    assert not (out / "stale.txt").exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    assert names_in(tmp_path) == {"model", "out"}


def test_a_kill_between_the_two_renames_of_an_overwrite(raw_checkpoint: Make, tmp_path: Path) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    run(source, out)
    before = contents(out)
    out.rename(tmp_path / ".out.replaced")
    run(source, out, overwrite=True)
    assert contents(out) == before
    assert names_in(tmp_path) == {"model", "out"}


def test_an_overwritten_output_that_cannot_be_removed(
    raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of another user, or files that a server holds open on a network file system."""
    source, out = raw_checkpoint(), tmp_path / "out"
    run(source, out)
    before, left = contents(out), tmp_path / ".out.replaced"
    (out / "held").write_text("")
    real = os.unlink

    def unlink(path: Any, *args: Any, **more: Any) -> None:
        if Path(os.fsdecode(path)).name == "held":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        real(path, *args, **more)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.warns(LeftoverWarning, match=re.escape(f"{left}: was replaced, and cannot be removed")):
        run(source, out, overwrite=True)
    assert contents(out) == before
    assert verify(out).problems == ()
    with pytest.raises(PreflightError, match=re.escape(f"{left}: is left of an output that was replaced")):
        run(source, out, overwrite=True)
    assert contents(out) == before
    monkeypatch.undo()
    run(source, out, overwrite=True)
    assert names_in(tmp_path) == {"model", "out"}


def test_an_output_inside_the_model(raw_checkpoint: Make) -> None:
    source = raw_checkpoint()
    with pytest.raises(UsageError, match="lies in the model's own folder"):
        run(source, source / "out")


def test_the_default_name(raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = raw_checkpoint()
    monkeypatch.chdir(tmp_path)
    assert quantize(source, "fp8-dynamic", device="cpu").output == "model-fp8-dynamic"
    assert (tmp_path / "model-fp8-dynamic" / "config.json").is_file()


def test_a_place_that_is_not_writable(raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = raw_checkpoint()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PreflightError, match=re.escape(f"{tmp_path} is not writable; choose another place with -o")):
        run(source, tmp_path / "out")
    assert names_in(tmp_path) == {"model"}


def test_a_file_where_a_folder_should_be(raw_checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=re.escape(f"{tmp_path / 'file'} is not writable")):
        run(raw_checkpoint(), tmp_path / "file" / "out")


def test_too_little_space_is_refused_before_work(
    raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = raw_checkpoint()
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PreflightError, match=r"out: needs 0\.03 GB, the disk has 0\.00 GB free; free space or"):
        run(source, tmp_path / "out")
    assert names_in(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "mkdir"])
def test_what_the_disk_refuses(
    call: str, number: int, said: str, raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third call fails: some shards are being written by then."""
    source = raw_checkpoint()
    real, calls = getattr(os, call), []

    def fails(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) >= (1 if call == "mkdir" else 3):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(PreflightError, match=re.escape(f"{tmp_path / 'out'}: {said}; nothing was left behind")):
        run(source, tmp_path / "out", workers=2)
    monkeypatch.undo()
    assert names_in(tmp_path) == {"model"}


@pytest.mark.parametrize("full", [True, False])
def test_what_the_disk_refuses_safetensors(full: bool, tmp_path: Path) -> None:
    """Its errors are of one class, whether the disk or a file is to blame."""
    told = "Error while serializing: I/O error: No space left on device (os error 28)" if full else "header too large"
    said = re.escape(f"{tmp_path / 'out'}: the disk is full; nothing was left behind")
    refused = pytest.raises(PreflightError, match=said) if full else pytest.raises(SafetensorError, match=told)
    with refused, Output.open(tmp_path / "out", "a run"):
        raise SafetensorError(told)
    assert (tmp_path / "out.partial").exists() is not full


def test_two_runs_into_one_output(raw_checkpoint: Make, tmp_path: Path) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    with Output.open(out, "another run"):
        with pytest.raises(UsageError, match=re.escape(f"{out}: another quantlab run is writing it; wait, or choose")):
            run(source, out)
        assert (tmp_path / "out.partial").is_dir(), "the first run's work is not touched"
    run(source, out)
    assert names_in(tmp_path) == {"model", "out"}


def test_an_output_that_fails_its_verification(
    raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("quantlab.verify")  # `quantlab.verify` is the function of that name
    monkeypatch.setattr(module, "verify_weights", lambda _: ["l.q: 1 of 4 scales are not positive"])
    with pytest.raises(VerificationError, match=r"what was written is wrong, nothing is kept: l\.q: 1 of 4"):
        run(raw_checkpoint(), tmp_path / "out")
    assert names_in(tmp_path) == {"model"}


def interrupt_after(share: float) -> Callable[[str, int, int], None]:
    def progress(_: str, done: int, total: int) -> None:
        if done > share * total:
            signal.raise_signal(signal.SIGINT)

    return progress


def test_ctrl_c_leaves_a_state_that_the_next_run_continues(raw_checkpoint: Make, tmp_path: Path) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    run(source, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(source, out, progress=interrupt_after(0.6), workers=1)
    assert names_in(tmp_path) == {"model", "straight", "out.partial"}
    summary = run(source, out)
    assert summary.resumed > 0
    assert contents(out) == contents(tmp_path / "straight")
    assert names_in(tmp_path) == {"model", "straight", "out"}


def test_a_run_of_another_kind_or_a_changed_source_starts_over(raw_checkpoint: Make, tmp_path: Path) -> None:
    source = raw_checkpoint()
    for scheme, stamp in (("fp8-dynamic", None), ("fp8-block", (1, 1))):
        out = tmp_path / scheme
        with pytest.raises(KeyboardInterrupt):
            run(source, out, progress=interrupt_after(0.6), workers=1)
        if stamp:
            os.utime(source / "model.safetensors", stamp)
        assert quantize(source, scheme, out, device="cpu").resumed == 0


def test_side_files_that_went_away_do_not_come_back(
    raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    (source / "old.txt").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert (tmp_path / "out.partial" / "old.txt").is_file()
    (source / "old.txt").unlink()
    assert run(source, out).resumed > 3
    assert not (out / "old.txt").exists()
    assert verify(out).problems == ()


def test_what_is_in_the_way_is_not_lost(raw_checkpoint: Make, tmp_path: Path) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    run(source, out)  # an empty folder is nobody's
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious.txt").write_text("mine")
    (tmp_path / "third.partial").write_text("mine too")
    for name in ("other", "third"):
        with pytest.raises(UsageError, match=f"{name}.partial: is in the way and no interrupted run's; move it"):
            run(source, tmp_path / name)
    with pytest.raises(UsageError, match=r"names that end in \.partial are those of unfinished runs"):
        run(source, tmp_path / "new.partial")
    assert (tmp_path / "other.partial" / "precious.txt").read_text() == "mine"
    assert (tmp_path / "third.partial").read_text() == "mine too"


def test_an_output_behind_a_link(raw_checkpoint: Make, tmp_path: Path) -> None:
    source = raw_checkpoint()
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "not there yet")):
        (tmp_path / name).symlink_to(target)
        run(source, tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert verify(tmp_path / target).problems == ()


def test_the_lock_of_a_killed_run_keeps_nobody_out(raw_checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").touch()  # as after a kill between publishing and the end: a file that nobody has locked
    run(raw_checkpoint(), tmp_path / "out")
    assert names_in(tmp_path) == {"model", "out"}


def test_a_finished_shard_that_was_damaged_is_made_again(raw_checkpoint: Make, tmp_path: Path) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    run(source, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(source, out, progress=interrupt_after(0.9), workers=1)
    journal = (tmp_path / "out.partial" / output.JOURNAL).read_text().splitlines()
    shards = [json.loads(line)["name"] for line in journal[1:]]
    damaged = tmp_path / "out.partial" / shards[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "out.partial" / output.JOURNAL).write_text("\n".join(journal) + '\n{"name": "torn')
    assert run(source, out).resumed == len(shards) - 1
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("call", ["hash_file", "_sync"])
def test_a_kill_while_finished_shards_are_checked_loses_none(
    call: str, raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = raw_checkpoint(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, progress=interrupt_after(0.9), workers=1)
    shards = len((tmp_path / "out.partial" / output.JOURNAL).read_text().splitlines()) - 1
    with monkeypatch.context() as patch:
        patch.setattr(output, call, lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert run(source, out).resumed == shards > 1


def test_a_kill_while_another_runs_output_is_removed(
    raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, unlink, scandir = raw_checkpoint(), tmp_path / "out", os.unlink, os.scandir
    with pytest.raises(KeyboardInterrupt):
        run(source, out, progress=interrupt_after(0.9), workers=1)

    @contextmanager
    def journal_first(path: object) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(path) as entries:  # type: ignore[call-overload]
            yield iter(sorted(entries, key=lambda entry: entry.name != Path(output.JOURNAL).parent.name))

    def remove(path: str, *args: object, **kwargs: object) -> None:
        unlink(path, *args, **kwargs)  # type: ignore[arg-type]
        if Path(path).name == Path(output.JOURNAL).name:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", remove)
        patch.setattr(os, "scandir", journal_first)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, "fp8-dynamic", out, device="cpu")
    assert quantize(source, "fp8-dynamic", out, device="cpu").resumed == 0


def test_an_unexpected_error_keeps_what_was_done(
    raw_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = raw_checkpoint()
    monkeypatch.setattr(Output, "write_side_files", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        run(source, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(stream, "SHARD_BYTES", 300_000)
    assert run(source, tmp_path / "out").resumed > 3


KILLER = """
import os, random, resource, signal, sys, time
from pathlib import Path
from quantlab import jobs, stream
from quantlab.errors import PreflightError
from quantlab.pipeline import plan, quantize
from quantlab.verify import verify

stream.SHARD_BYTES = 300_000
source, out, random_ = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(5)
real = jobs.Lane.read
def slow(*args):
    time.sleep(0.01)
    return real(*args)
jobs.Lane.read = slow

plan(source)                                                  # all imports now, not in each child

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except PreflightError as error:
            print(error, flush=True)
            os._exit(3)
    return pid

for attempt in range(12):                                     # later ones live longer, for slow machines
    pid = child(lambda: quantize(source, "fp8-block", out, device="cpu", workers=2))
    time.sleep(random_.uniform(0.02, 0.25) * (1 + attempt / 4))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not out.exists() or not verify(out).problems, "an output that appeared is whole"
    if out.exists():
        break
published = out.exists()                                      # its lock's file may have stayed: the next run removes it
summary = quantize(source, "fp8-block", out, device="cpu", overwrite=True)
print("resumed", "published" if published else summary.resumed)

def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    quantize(source, "fp8-block", out.with_name("limited"), device="cpu", workers=2)
print("limited", os.waitstatus_to_exitcode(os.waitpid(child(limited), 0)[1]))
"""


def test_kill_at_any_moment(raw_checkpoint: Make, tmp_path: Path) -> None:
    """Twelve kills at random moments; and, since a process of its own is at hand, a real limit on the size of files."""
    source = raw_checkpoint()
    run(source, tmp_path / "straight")
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "calib"))
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed (published|[1-9])", done.stdout), "the kills came too early to prove anything"
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert "limited: a file may not grow that large here; nothing was left behind" in done.stdout
    assert done.stdout.endswith("limited 3\n")
    assert names_in(tmp_path) == {"model", "straight", "out"}


def test_the_result_loads_with_the_reference_library(raw_checkpoint: Make, tmp_path: Path) -> None:
    run(raw_checkpoint(), tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert load_file(path)
