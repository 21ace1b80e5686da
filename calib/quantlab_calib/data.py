"""Text into windows of tokens: bundled, from local files, or from a `datasets` name.

A window is what the model would see in use: it starts with the tokens that its tokenizer puts in front of a text (BOS
for Llama and Gemma, nothing for Qwen), documents are kept apart by EOS, and chat messages go through the chat template,
which brings its own BOS. Windows are cut from one stream of tokens and never overlap. The alternative, one padded
sequence per document, wastes half of the work on padding and makes results depend on an attention mask.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Purpose = Literal["calibration", "evaluation"]
Document = str | list[dict[str, Any]]  # a text, or the messages of a chat

# Columns that hold a document, in the order in which they are tried.
COLUMNS = ("messages", "conversations", "text", "content")
LINES = (".jsonl", ".ndjson", ".json")  # endings of files with an object per line
SPLITS = {"calibration": ("train", "validation", "test"), "evaluation": ("test", "validation", "train")}

# Windows are drawn from a stream about this many times longer than needed: a data set of terabytes is not read whole.
POOL = 8


class DataError(ValueError):
    """The data cannot serve: what was given, what is needed, what to do. One line."""


def bundled(purpose: Purpose) -> str:
    """The text that ships with the package: articles, and for calibration source code too, because what is rounded for
    prose alone loses on code. The two purposes share no document."""
    names = ("calibration", "code") if purpose == "calibration" else ("evaluation",)
    folder = resources.files("quantlab_calib").joinpath("text")
    return "\n\n\n".join(folder.joinpath(f"{name}.txt").read_text(encoding="utf-8") for name in names)


def documents(source: str, purpose: Purpose) -> Iterator[Document]:
    """The documents of `source`, one by one, in order.

    source  "bundled"; a text file (one document); a .jsonl, .ndjson or .json file (a document per line, under one of
            `COLUMNS`); a folder that `datasets` reads; or "name[:config[:split]]" of a data set. Without a split,
            calibration takes train and evaluation takes test where the data set has them.
    Raises DataError for a file that is missing, empty or binary, for lines and rows without a document, and for a data
    set that cannot be loaded.
    """
    if not source.strip():
        raise DataError(f"data is {source!r}; give a text or JSONL file, a data set's name, or 'bundled'")
    path = Path(source).expanduser()
    if source == "bundled":
        return iter([bundled(purpose)])
    if path.is_file():
        return _jsonl(path) if path.suffix in LINES else iter([_text(path)])
    file_like = path.suffix in (".txt", ".md", *LINES) or source.startswith((".", "/", "~"))
    if file_like and not Path(source.partition(":")[0]).expanduser().is_dir():
        raise DataError(f"no such file: {source}; give a text or JSONL file, a data set's name, or 'bundled'")
    return _dataset(source, purpose)


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); give a text or JSONL file") from None
    if "\0" in text:
        raise DataError(
            f"{path}: binary data (a zero byte at character {text.index(chr(0))}); give a text or JSONL file"
        )
    if not text.strip():
        raise DataError(f"{path}: empty; give a text of a few thousand words")
    return text


def _jsonl(path: Path) -> Iterator[Document]:
    # split on newlines only: splitlines would cut JSON strings at U+2028
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{path}, line {number}: half of a character (an escape from \\ud800 to \\udfff by itself), which no "
                "tokenizer takes; mend or drop the line"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON: {error.msg}; a .jsonl file has one object per line"
            ) from None
        yield _document(row, f"{path}, line {number}")


def _dataset(source: str, purpose: Purpose) -> Iterator[Document]:
    import datasets

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # `datasets` raises a dozen types, from a dozen libraries, for "not there"
        raise _unreadable(source, error) from None
    wanted = (split,) if split else SPLITS[purpose]
    found = next((s for s in wanted if s in loaded), None)
    if found is None:
        raise DataError(f"data set {source!r} has no split {' or '.join(wanted)}; it has {', '.join(loaded)}")
    try:
        for number, row in enumerate(loaded[found]):
            yield _document(row, f"data set {source!r}, row {number}")
    except DataError:
        raise
    except Exception as error:  # as above: files are opened only now
        raise _unreadable(source, error) from None


def _said(error: Exception) -> str:
    """What an error of another package says, in one line."""
    return " ".join(str(error).split())


def _unreadable(source: str, error: Exception) -> DataError:
    return DataError(
        f"data set {source!r} cannot be loaded ({_said(error)}); give name[:config[:split]] or a local file"
    )


def _document(row: Any, where: str) -> Document:
    """The document of one JSON object or data set row."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__}, needs an object with one of: {', '.join(COLUMNS)}")
    column = next((c for c in COLUMNS if row.get(c) is not None), None)
    value = row.get(column) if column else None
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) for m in value):
        return [_message(m, where) for m in value]
    raise DataError(
        f"{where}: columns {', '.join(map(str, row))}; needs a text or chat messages in one of: {', '.join(COLUMNS)}"
    )


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A chat message under the names of the chat templates; {"from", "value"} is the older spelling."""
    if "role" in message and "content" in message:
        return message
    if "from" in message and "value" in message:
        role = {"human": "user", "gpt": "assistant"}.get(message["from"], message["from"])
        return {"role": role, "content": message["value"]}
    raise DataError(f"{where}: a message with {', '.join(map(str, message))}; needs role and content")


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises DataError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise DataError(
            f"{folder}: no tokenizer that transformers can read ({_said(error)[:200]}); put tokenizer.json beside the "
            "weights"
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where there is no file
        raise DataError(f"{folder}: its tokenizer has no vocabulary; put tokenizer.json beside the weights")
    return tokenizer


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of one document, without the special tokens that go around a whole text."""
    if not isinstance(document, str):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("the data holds chat messages and the tokenizer has no chat template; give plain text")
        messages = document
        try:
            document = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like: no system message, roles that do not alternate
            roles = ", ".join(str(message["role"]) for message in messages[:9]) or "no message"
            raise DataError(
                f"the tokenizer's chat template does not take a conversation of {roles} ({_said(error)[:200]}); "
                "leave such conversations out, or give plain text"
            ) from None
    return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text: [BOS], [CLS], or nothing."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return whole[:start]
    return []


def windows(
    source: str,
    tokenizer: Any,
    purpose: Purpose,
    *,
    count: int,
    length: int,
    seed: int | None = None,
    fewest: int | None = None,
    overlap: int = 0,
) -> Tensor:
    """`count` windows of `length` tokens, int64 [count, length]; fewer, but at least `fewest`, where the text is short.

    seed     None: windows spread evenly over the text, the same for everyone; a number: a random choice of windows
    overlap  tokens at the start of a window that may also be the end of the one before it
    Raises DataError, which says how many tokens were found and needed.
    """
    head = prefix(tokenizer)
    body = length - len(head)
    step = body - overlap
    if step < 1:
        taken = f"the tokenizer's own {len(head)}" + (f" and a context of {overlap}" if overlap else "")
        raise DataError(f"windows of {length} tokens: {taken} leave no room for text")
    stream = _stream(documents(source, purpose), tokenizer, head, enough=POOL * count * step + overlap)
    slots = max(0, len(stream) - overlap) // step
    least = count if fewest is None else fewest
    if slots < least:
        raise DataError(
            f"{source}: {len(stream)} tokens found, {least * step + overlap} needed for {least} x {length}; "
            f"give more text, or fewer or shorter windows"
        )
    count = min(count, slots)
    if seed is None:
        chosen = [i * slots // count for i in range(count)]
    else:
        chosen = sorted(random.Random(seed).sample(range(slots), count))
    return torch.tensor([head + stream[i * step : i * step + body] for i in chosen], dtype=torch.int64)


def _stream(every: Iterable[Document], tokenizer: Any, head: list[int], *, enough: int) -> list[int]:
    """Tokens of the documents, EOS between them, until there are `enough`.

    A BOS that a chat template wrote is taken off: the window brings it, and two would be a text no model has seen.
    """
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for document in every:
        if stream and end is not None and stream[-1] != end:
            stream.append(end)
        tokens = encode(document, tokenizer)
        stream += tokens[len(head) :] if head and tokens[: len(head)] == head else tokens
        if len(stream) >= enough:
            break
    return stream
