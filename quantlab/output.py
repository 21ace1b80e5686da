"""The output folder of a run: it appears whole or not at all, and an interrupted run continues where it stopped.

Work happens in `OUT.partial` beside OUT. A journal there has one line for every finished shard, written after the
shard's bytes are on the disk; what has no line did not happen. At the end the folder is renamed, which the file system
does in one step. A lock beside it keeps a second run out; the kernel drops it when its holder dies, however it dies.
The alternative, writing into OUT and marking it as finished, leaves folders that look like models and are none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from quantlab.checkpoint import CONFIG, MANIFEST, OURS, QUANTIZATION_KEYS, Stored, quantization_config
from quantlab.errors import PreflightError, QuantlabError, UsageError
from quantlab.locate import existing_parent, require_name
from quantlab.shards import ShardLayout
from quantlab.source import Source

JOURNAL = f"{OURS}/journal.jsonl"
DATA = "data"  # among what is kept: digest of the calibration data
PARTIAL = ".partial"  # what an unfinished output is called besides
HASH_CHUNK = 1 << 22
FORMAT_VERSION = 2  # raised whenever the same plan gives other bytes than before
SPARE_BYTES = 32_000_000  # side files, headers, folders


class LeftoverWarning(UserWarning):
    """An output that was replaced could not be removed."""


@dataclass(frozen=True)
class FileRecord:
    """A finished file: what the manifest says of it."""

    name: str
    bytes: int
    sha256: str


def check_writable(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse an output that cannot be: UsageError for one that exists, PreflightError where nothing can be written."""
    if folder.is_dir() and any(folder.iterdir()):
        ours = (folder / MANIFEST).is_file()
        if not overwrite:
            hint = "choose another with -o, or pass --overwrite" if ours else "choose another with -o"
            raise UsageError(f"{folder}: exists; {hint}")
        if not ours:
            raise UsageError(f"{folder}: exists and was not made by quantlab, so it is not overwritten")
    elif folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: exists and is a file")
    if folder.name.endswith(PARTIAL):
        raise UsageError(f"{folder}: names that end in {PARTIAL} are those of unfinished runs; choose another with -o")
    if not _is_ours_or_nothing(_partial(folder)):
        raise UsageError(
            f"{_partial(folder)}: is in the way and no interrupted run's; move it, or choose another with -o"
        )
    parent = existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PreflightError(f"{folder}: {parent} is not writable; choose another place with -o")


def check_outside(folder: Path, model: Path) -> None:
    """Refuse an output inside the model's own folder, which the next run would carry over as a part of the model, and
    one in whose place the model itself lies."""
    here, there = folder.absolute().resolve(), model.resolve()
    if there in here.parents:
        raise UsageError(f"{folder}: lies in the model's own folder; choose another place with -o")
    if here == there or here in there.parents:
        raise UsageError(f"{folder}: the model itself lies there; choose another place with -o")


def output_folder(model: str | Path, what: str, given: str | Path | None) -> Path:
    """The folder to make: as given, or the model's name and `what` in the current folder."""
    require_name(model)
    name = Path(model).expanduser().resolve().name if Path(model).exists() else Path(model).name
    folder = Path(f"{name}-{what}" if given is None else given).expanduser()
    return folder.resolve() if folder.is_symlink() else folder  # a folder cannot be renamed to where a link is


def check_space(folder: Path, needed: int) -> None:
    """Refuse before work what will not fit. An interrupted run's part of it is already there."""
    partial = _partial(folder)
    held = sum(path.stat().st_size for path in partial.rglob("*.safetensors")) if partial.is_dir() else 0
    free = shutil.disk_usage(existing_parent(folder)).free + held
    if needed + SPARE_BYTES > free:
        raise PreflightError(
            f"{folder}: needs {(needed + SPARE_BYTES) / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free space or choose another place with -o"
        )


def to_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def check_file(path: Path) -> None:
    """Refuse before work a file that a result cannot go to. Raises UsageError."""
    parent = existing_parent(path)
    if path.is_dir() or not parent.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise UsageError(f"{path}: cannot be written; give the name of a file elsewhere with -o")


def write_file(path: Path, content: str | bytes) -> None:
    """A result that appears when it is whole: what was there before stays otherwise. Raises UsageError."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written: {error.strerror}; give another place with -o") from None


def fingerprint(source: Source, what: Any) -> str:
    """Equal for runs that write the same bytes from the same data (`Output.made_from`), so that one may continue the
    other. `what` is plain data."""
    files = {info.shard for info in source.tensors.values()}
    stamps = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    facts = [FORMAT_VERSION, str(source.folder.resolve()), stamps, source.config, what]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _partial(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.with_name(folder.name + PARTIAL)


def _is_ours_or_nothing(partial: Path) -> bool:
    """Whether a run may take this folder: it holds an interrupted run, or no file."""
    if not partial.is_dir():
        return not partial.exists()
    ours = any((partial / name).is_file() for name in (JOURNAL, MANIFEST))  # the latter: almost published
    return ours or not any(path.is_file() for path in partial.rglob("*"))


def _discard(partial: Path) -> None:
    """Remove an unfinished output as far as the disk lets us, what says that it is one last: what a kill in between
    leaves, the next run may take."""
    last = {partial / JOURNAL, partial / MANIFEST}
    with suppress(OSError):
        for path in partial.rglob("*"):
            if path.is_file() and path not in last:
                path.unlink()
    shutil.rmtree(partial, ignore_errors=True)


class Output:
    """A run's output folder. Use as `with Output.open(...) as output: ...; output.publish()`.

    Leaving the block by a `QuantlabError` or an error of the disk removes what was written: a rerun would end the same
    way. Any other way out (Ctrl-C, kill) leaves the partial folder for the next run.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder.absolute()
        self.partial = _partial(folder)
        self.finished: dict[str, FileRecord] = {}
        self._journal_lock = threading.Lock()
        self._resume_or_begin(fingerprint)

    @classmethod
    @contextmanager
    def open(cls, folder: Path, fingerprint: str, *, overwrite: bool = False) -> Iterator[Output]:
        """Lock the output and find what an earlier run of the same `fingerprint` has finished."""
        with disk_errors(folder):
            check_writable(folder, overwrite=overwrite)
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                _restore(folder)
                check_writable(folder, overwrite=overwrite)  # another run may have published just before
                if overwrite:
                    _make_way(folder)
                try:
                    with disk_errors(folder):
                        yield cls(folder, fingerprint)
                except QuantlabError:
                    _discard(_partial(folder))
                    raise

    def _resume_or_begin(self, fingerprint: str) -> None:
        lines = _journal_lines(self.partial / JOURNAL)
        if not lines or lines[0] != {"run": fingerprint}:
            if self.partial.exists():
                _discard(self.partial)
            (self.partial / OURS).mkdir(parents=True)
            self._journal({"run": fingerprint})
            _sync_folder(self.partial)
            return
        for record in (FileRecord(**line) for line in lines[1:]):
            path = self.partial / record.name
            whole = path.is_file() and path.stat().st_size == record.bytes and hash_file(path) == record.sha256
            if whole and _is_shard(record.name):  # all else is quickly written anew
                self.finished[record.name] = record
        self._rewrite_journal([lines[0], *map(asdict, self.finished.values())])
        for path in self.partial.rglob("*"):
            name = path.relative_to(self.partial).as_posix()
            if path.is_file() and name not in self.finished and name != JOURNAL and self.kept not in path.parents:
                path.unlink()

    def made_from(self, data: str) -> None:
        """Name, by a digest, the data that a run has found to quantize with ("" for none): shards that an earlier one
        made from other data are made again. To be called before any is written."""
        path = self.kept / DATA
        if data == (path.read_text() if path.is_file() else ""):
            return
        for name in [name for name in self.finished if _is_shard(name)]:
            (self.partial / name).unlink()
            del self.finished[name]
        _sync_folder(self.partial)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data)

    @property
    def kept(self) -> Path:
        """A folder for what an interrupted run has found out; it goes when the output is published."""
        return self.partial / OURS / "kept"

    @property
    def finished_shards(self) -> int:
        return sum(map(_is_shard, self.finished))

    def _journal(self, line: dict[str, Any]) -> None:
        with self._journal_lock, (self.partial / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            _sync(file.fileno())

    def _rewrite_journal(self, lines: list[dict[str, Any]]) -> None:
        """In one step: its last line may be torn, and a kill meanwhile must not lose the others."""
        path = self.partial / JOURNAL
        temporary = path.with_suffix(".part")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            _sync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)

    def shard(self, name: str, layout: ShardLayout) -> ShardWriter:
        """Start a file of known size; its parts may be written in any order and by any thread."""
        return ShardWriter(self.partial / name, layout)

    def finish(self, writer: ShardWriter) -> FileRecord:
        """Bring the file to the disk, then say so in the journal. Any thread may call it."""
        writer.close()
        return self._record(writer.path)

    def write_text(self, name: str, text: str) -> FileRecord:
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # names may be any bytes
            file.write(text)
            _sync(file.fileno())
        return self._record(path)

    def copy_file(self, source: Path, name: str) -> FileRecord:
        """Copy a side file byte for byte."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        with path.open("rb+") as file:
            _sync(file.fileno())
        return self._record(path)

    def write_side_files(self, source: Source, stored: Stored | None) -> None:
        """config.json with the new quantization (None: without one), and all other files byte for byte."""
        for path in source.side_files:
            self.copy_file(source.folder / path, path.as_posix())
        config = {key: value for key, value in source.config.items() if key not in QUANTIZATION_KEYS}
        if stored is not None:
            config["quantization_config"] = quantization_config(stored)
        self.write_text(CONFIG, to_json(config))

    def _record(self, path: Path) -> FileRecord:
        name = path.relative_to(self.partial).as_posix()
        record = FileRecord(name, path.stat().st_size, hash_file(path))
        self.finished[name] = record
        self._journal(asdict(record))
        return record

    def publish(self) -> Path:
        """Write the manifest and make the folder appear under its name, in one step."""
        shutil.rmtree(self.kept, ignore_errors=True)
        files = [asdict(record) for _, record in sorted(self.finished.items())]
        self.write_text(MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
        for folder, _, _ in os.walk(self.partial):
            _sync_folder(Path(folder))
        (self.partial / JOURNAL).unlink()
        if self.folder.is_dir() and any(self.folder.iterdir()):  # only with overwrite: see check_writable
            old = _replaced(self.folder)
            self.folder.rename(old)
            self.partial.rename(self.folder)
            if not _removed(old):  # another user's, or in use on a network file system
                warnings.warn(f"{old}: was replaced, and cannot be removed; remove it", LeftoverWarning, stacklevel=2)
        else:
            self.partial.rename(self.folder)
        _sync_folder(self.folder.parent)
        return self.folder


def _replaced(folder: Path) -> Path:
    return folder.absolute().with_name(f".{folder.absolute().name}.replaced")


def _restore(folder: Path) -> None:
    """Undo what a kill between the two renames of an overwriting run has left."""
    if _replaced(folder).is_dir() and not folder.exists():
        _replaced(folder).rename(folder)


def _make_way(folder: Path) -> None:
    """Remove what an overwriting run could not, where this one will put what it replaces."""
    old = _replaced(folder)
    if folder.exists() and old.exists() and not _removed(old):
        raise PreflightError(
            f"{old}: is left of an output that was replaced, and cannot be removed; remove it, or choose another place "
            "with -o"
        )


def _removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


class ShardWriter:
    """A safetensors file of fixed size that is filled piece by piece."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        self.layout = layout
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.truncate(self._file, layout.nbytes)
            self._write_at(0, memoryview(layout.header))
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, offset: int, data: Tensor) -> None:
        """Put the bytes of `data` (uint8, contiguous, CPU) at `offset` within tensor `name`."""
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        self._write_at(self.layout.offsets[name] + offset, view)

    def _write_at(self, position: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._file, data, position)
            data, position = data[count:], position + count

    def close(self) -> None:
        try:
            _sync(self._file)
        finally:
            self.discard()

    def discard(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(HASH_CHUNK)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        refused = error if isinstance(error, OSError) else _refused(error)
        if refused is None:
            raise
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "a file may not grow that large here",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "no permission to write",
            errno.EPERM: "no permission to write",
        }
        reason = reasons.get(refused.errno or 0, refused.strerror or str(refused))
        raise PreflightError(f"{folder}: {reason}; nothing was left behind. Free space or choose another -o") from error


def _refused(error: SafetensorError) -> OSError | None:
    """What the disk refused safetensors, which says so in words alone; None for any other error."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `.OUT.lock` beside OUT. The file is removed at the end, so a holder must still find its own file there."""
    path = folder.absolute().with_name(f".{folder.absolute().name}.lock")
    lock = _acquire(path)
    if lock is None:
        raise UsageError(f"{folder}: another quantlab run is writing it; wait, or choose another with -o")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _acquire(path: Path) -> int | None:
    """An exclusive lock on the file that `path` names now; None where another process has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(lock)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def _journal_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a torn last line did not happen."""
    lines: list[dict[str, Any]] = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                lines.append(json.loads(text))
    except (OSError, ValueError):
        pass
    return lines


def _sync(file: int) -> None:
    os.fsync(file)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync files only
            raise
    finally:
        os.close(descriptor)
