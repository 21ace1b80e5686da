"""Windows of tokens: BOS, EOS, chat templates, seeds, and what is said of data that does not serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantlab_calib import data

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def decoded(tokenizer, window) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(window.tolist()))


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_bundled_texts_are_readable_and_share_no_paragraph():
    texts = [data.bundled(purpose) for purpose in ("calibration", "evaluation")]
    assert all(100_000 < len(text) < 400_000 for text in texts)
    paragraphs = [{p.strip() for p in text.split("\n\n") if len(p) > 80} for text in texts]
    assert not paragraphs[0] & paragraphs[1]
    assert ["def " in text for text in texts] == [True, False]  # calibration sees code, evaluation stays prose


def test_a_window_begins_with_what_the_tokenizer_puts_in_front(character_tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    plain, with_bos = character_tokenizer(), character_tokenizer(bos=True)
    assert data.prefix(plain) == []
    assert data.prefix(with_bos) == [with_bos.bos_token_id]
    found = data.windows(str(tmp_path / "t.txt"), plain, "evaluation", count=2, length=10)
    assert [decoded(plain, w) for w in found] == ["abcdefghij", "klmnopqrst"]
    found = data.windows(str(tmp_path / "t.txt"), with_bos, "evaluation", count=2, length=10)
    assert [decoded(with_bos, w) for w in found] == ["<s>abcdefghi", "<s>jklmnopqr"]
    assert found.dtype == torch.int64


def test_windows_may_begin_with_the_end_of_the_one_before(character_tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    tokenizer = character_tokenizer(bos=True)
    found = data.windows(str(tmp_path / "t.txt"), tokenizer, "evaluation", count=9, length=11, fewest=1, overlap=6)
    assert [decoded(tokenizer, w)[3:] for w in found] == [
        "abcdefghij",
        "efghijklmn",
        "ijklmnopqr",
        "mnopqrstuv",
        "qrstuvwxyz",
    ]
    with pytest.raises(data.DataError, match="a context of 10 leave no room"):
        data.windows(str(tmp_path / "t.txt"), tokenizer, "evaluation", count=1, length=11, overlap=10)


def test_windows_without_a_seed_are_spread_over_the_whole_text(character_tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("a" * 40 + "b" * 40 + "c" * 40)
    found = data.windows(str(tmp_path / "t.txt"), character_tokenizer(), "evaluation", count=3, length=10)
    assert [decoded(character_tokenizer(), w)[0] for w in found] == ["a", "b", "c"]


def test_a_seed_chooses_windows_repeatably_and_never_twice(character_tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(2000)))
    draw = {
        seed: data.windows(str(path), character_tokenizer(), "calibration", count=50, length=10, seed=seed)
        for seed in (1, 2)
    }
    again = data.windows(str(path), character_tokenizer(), "calibration", count=50, length=10, seed=1)
    assert torch.equal(draw[1], again)
    assert not torch.equal(draw[1], draw[2])
    starts = data.windows(str(path), character_tokenizer(), "calibration", count=200, length=10, seed=1)
    assert decoded(character_tokenizer(), starts.flatten()) == path.read_text()


def test_documents_are_kept_apart_by_eos(character_tokenizer, tmp_path):
    source = write(tmp_path / "d.jsonl", [{"text": "abc"}, "def", {"content": "ghi"}])
    tokenizer = character_tokenizer()
    found = data.windows(source, tokenizer, "evaluation", count=1, length=11)
    assert decoded(tokenizer, found[0]) == "abc</s>def</s>ghi"


def test_chat_goes_through_the_template_and_has_one_bos(character_tokenizer, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    old = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    tokenizer = character_tokenizer(bos=True, chat_template=TEMPLATE)
    for row in ({"messages": chat}, {"conversations": old}):
        source = write(tmp_path / "c.jsonl", [row])
        found = data.windows(source, tokenizer, "calibration", count=1, length=22)
        assert decoded(tokenizer, found[0]) == "<s>[user]hi[assistant]yo"


def test_lines_may_hold_any_character(character_tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a\u2028b"}\n\n', encoding="utf-8")
    assert list(data.documents(str(tmp_path / "d.jsonl"), "evaluation")) == ["a\u2028b"]


def test_a_folder_of_data_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": "for training"}])
    write(folder / "test.jsonl", [{"text": "for testing"}])
    assert list(data.documents(str(folder), "calibration")) == ["for training"]
    assert list(data.documents(str(folder), "evaluation")) == ["for testing"]
    assert list(data.documents(f"{folder}::train", "evaluation")) == ["for training"]
    with pytest.raises(data.DataError, match=r"has no split dev; it has train, test"):
        list(data.documents(f"{folder}::dev", "evaluation"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"  \n", "empty; give a text"),
        (b"text\0text", "binary data (a zero byte at character 4)"),
        (b"\xff\xfe\x00", "not UTF-8 text (byte 0)"),
        (b"short", "5 tokens found, 40 needed for 4 x 10; give more text, or fewer or shorter windows"),
    ],
)
def test_texts_that_do_not_serve(character_tokenizer, tmp_path, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError) as error:
        data.windows(str(path), character_tokenizer(), "calibration", count=4, length=10)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"text": "cut \\ud83d"}', "line 1: half of a character (an escape from \\ud800 to \\udfff by itself)"),
        ("3", "line 1: int, needs an object with one of: messages, conversations, text, content"),
        ('{"body": "x"}', "line 1: columns body; needs a text or chat messages in one of"),
        ('{"messages": [{"author": "x"}]}', "line 1: a message with author; needs role and content"),
    ],
)
def test_lines_that_do_not_serve(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text(line)
    with pytest.raises(data.DataError) as error:
        list(data.documents(str(path), "calibration"))
    assert message in str(error.value)


def test_chat_without_a_template(character_tokenizer, tmp_path):
    source = write(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(data.DataError, match="the tokenizer has no chat template; give plain text"):
        data.windows(source, character_tokenizer(), "calibration", count=1, length=4)


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nrole') }}{% endif %}x"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (
            REFUSING,
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            "system, user (no system role)",
        ),
        ("{{ messages[0]['content'] + 'x' }}", [{"role": "user", "content": [{"type": "text"}]}], "user (can only"),
        (TEMPLATE, [], "no message (Cannot apply chat template to an empty conversation"),
    ],
    ids=["system", "parts", "empty"],
)
def test_chat_that_the_template_does_not_take(character_tokenizer, tmp_path, template, messages, said):
    source = write(tmp_path / "c.jsonl", [{"messages": messages}])
    with pytest.raises(data.DataError) as error:
        data.windows(source, character_tokenizer(chat_template=template), "calibration", count=1, length=4)
    assert f"chat template does not take a conversation of {said}" in str(error.value)
    assert "\n" not in str(error.value)


def test_fewer_windows_only_where_they_are_allowed(character_tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("x" * 35)
    source = str(tmp_path / "t.txt")
    found = data.windows(source, character_tokenizer(), "evaluation", count=9, length=10, fewest=1)
    assert found.shape == (3, 10)
    with pytest.raises(data.DataError, match="leave no room for text"):
        data.windows(source, character_tokenizer(bos=True), "evaluation", count=1, length=1)


def test_no_tokenizer(tmp_path):
    with pytest.raises(data.DataError, match=r"no tokenizer that transformers can read .* put tokenizer.json beside"):
        data.load_tokenizer(tmp_path)
