"""Tests of reading text: UTF-8 with or without a mark, and an error in one line for any other encoding."""

import pytest

from fmdistill.registry import UserError
from fmdistill.text import decode_text, read_text


def test_utf8_is_read_with_and_without_a_mark_and_with_any_line_ends():
    for data in (b"caf\xc3\xa9\nb\n", b"\xef\xbb\xbfcaf\xc3\xa9\r\nb\r\n", b"caf\xc3\xa9\rb\r"):
        assert decode_text(data, "here") == "café\nb\n"


@pytest.mark.parametrize(
    "encoding, guess", [("latin-1", "Latin-1"), ("utf-16", "UTF-16"), ("utf-16-be", "Latin-1"), ("utf-32", "UTF-32")]
)
def test_another_encoding_raises_one_line_with_the_file_and_the_encoding(tmp_path, encoding, guess):
    path = tmp_path / "names.txt"
    path.write_bytes("café\nthé €".replace("€", "" if encoding == "latin-1" else "€").encode(encoding))
    with pytest.raises(UserError, match=rf"classnames=.*names\.txt: not UTF-8 .*{guess}.*iconv") as error:
        read_text(path, "classnames")
    assert "\n" not in str(error.value)
