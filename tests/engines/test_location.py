"""Locations: what is understood, and that any folder's name survives the way to text and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdk_kv.engines import Location, parse_location

NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not {0, 0x2F} & {*name})


@given(NAMES.filter(lambda name: name not in (b".", b"..")))
def test_any_folder_is_found_again_from_its_uri(name: bytes) -> None:
    path = os.fsdecode(b"/srv/" + name)
    shown = str(Location("file", path))
    assert parse_location(shown) == Location("file", path)
    shown.encode()  # so that it can be printed, and kept as JSON


@given(NAMES)
def test_a_path_object_is_a_folder_whatever_its_name(name: bytes) -> None:
    place = parse_location(Path(os.fsdecode(b"./" + name)))
    assert place == Location("file", os.path.abspath(os.path.expanduser(os.fsdecode(name))))
    assert parse_location(os.fsencode("/srv/") + name).path.startswith("/srv")


def test_a_name_that_a_shell_gave_as_text_is_understood() -> None:
    # What sys.argv has for the bytes b"/srv/\xff", and a URI with them.
    assert parse_location("/srv/\udcff").path == "/srv/\udcff"
    assert parse_location("file:///srv/\udcff").path == "/srv/\udcff"
    assert parse_location("file:///srv/%FF").path == "/srv/\udcff"
    assert str(parse_location("/srv/Ordner für KV")) == "file:///srv/Ordner für KV"


@pytest.mark.parametrize("text", ["kv", "cache/kv", "kv/"])
def test_text_that_may_be_a_relative_folder_gets_the_hint(text: str) -> None:
    with pytest.raises(ValueError, match=rf"for a folder write \./{text}"):
        parse_location(text)


def test_a_uri_in_a_path_object_is_refused_rather_than_made_a_folder() -> None:
    for uri in ("file:///srv/kv", "spdk://0000:01:00.0/1", "ram://"):
        with pytest.raises(ValueError, match="pass it as text"):
            parse_location(Path(uri))


def test_control_characters_in_a_uri_are_refused_rather_than_left_out() -> None:
    with pytest.raises(ValueError, match="%XX"):
        parse_location("file:///srv/a\nb")
    assert parse_location("file:///srv/a%0Ab").path == "/srv/a\nb"
    for path in ("/srv/\0", b"/srv/\0"):
        with pytest.raises(ValueError, match="zero bytes"):
            parse_location(path)
