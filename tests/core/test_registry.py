from __future__ import annotations

import sys

import pytest

from recare_patch.core import Registry
from recare_patch.core.errors import UnknownNameError


@pytest.fixture
def table() -> Registry:
    table = Registry("serializer")
    table.register("json", "json:dumps")
    table.register("ini", "configparser:ConfigParser")
    return table


def test_gets_what_the_name_stands_for(table: Registry) -> None:
    assert table.get("json")({"a": 1}) == '{"a": 1}'
    assert table.names() == ("ini", "json")
    assert "json" in table and "xml" not in table


def test_nothing_is_imported_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    Registry("poem").register("zen", "this:s")
    assert "this" not in sys.modules


def test_a_collision_is_refused_but_a_repetition_is_not(table: Registry) -> None:
    table.register("json", "json:dumps")
    with pytest.raises(ValueError, match=r"'json' is taken by json:dumps"):
        table.register("json", "pickle:dumps")


@pytest.mark.parametrize("target", ["json", "json:", ":dumps", "a:b:c"])
def test_a_malformed_target_is_refused(table: Registry, target: str) -> None:
    with pytest.raises(ValueError, match="must point to"):
        table.register("new", target)


def test_an_unknown_name_offers_the_nearest(table: Registry) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown serializer 'jsn': .* did you mean 'json'\?"):
        table.get("jsn")
