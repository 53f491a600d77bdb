"""JSON objects from files, up to a bound; and files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import atomic_file, read_json, write_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the list is not valid JSON: the file is empty"),
        ("[]", "the list is not a JSON object"),
        ('{"a": {"b": 1, "b": 2}}', "the list is not valid JSON: the key 'b' occurs twice"),
        ('{"\\ud800": 1}', "the list is not valid JSON"),
        ("[" * 100_000, "the list is larger than 64 bytes"),
    ],
)
def test_what_is_no_object_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "x.json", "the list", 64)
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}: {message}")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match=f"{path}: cannot be read: "):
            read_json(path)


def test_an_object_survives(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "ü": {"b": "x"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.write("text, not bytes")  # type: ignore
    assert read_json(path) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]
