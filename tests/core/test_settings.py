"""Errors and registries: names that are wrong, and the nearest right ones."""

from __future__ import annotations

import inspect
import sys

import pytest

from recare_patch.core import RecarePatchError, Registry, UnknownNameError, errors, nearest, unknown_name


def test_every_error_belongs_to_one_family() -> None:
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception)]
    assert len(classes) >= 12
    assert all(issubclass(one, RecarePatchError) for one in classes)


@pytest.mark.parametrize(
    ("given", "expected"), [("adam8bit", "adamw8bit"), ("ADAMW", "adamw"), ("zzzz", None), ("", None)]
)
def test_nearest_ignores_case_and_gives_up_on_strangers(given: str, expected: str | None) -> None:
    assert nearest(given, ("adamw", "adamw8bit")) == expected


def test_unknown_name_tells_given_allowed_and_nearest() -> None:
    sentence = str(unknown_name("optimizer", "adam8bit", ("adamw", "adamw8bit")))
    assert sentence == "unknown optimizer 'adam8bit': allowed are adamw, adamw8bit; did you mean 'adamw8bit'?"
    assert "did you mean" not in str(unknown_name("method", "zzzz", ("recare",)))
    assert "none at all" in str(unknown_name("recipe", "x", ()))


def test_settings_errors_are_value_errors_and_keep_their_faults() -> None:
    fault = errors.RecipeError("recipe: a; b", ("a", "b"))
    assert isinstance(fault, ValueError) and fault.faults == ("a", "b")
    assert errors.RecipeError("alone").faults == ("alone",)


def test_a_registry_gets_what_a_name_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    table = Registry("serializer", {"json": "json:dumps", "zen": "this:s"})
    assert table.get("json")({"a": 1}) == '{"a": 1}'
    assert table.names() == ("json", "zen")
    assert "json" in table and "xml" not in table and "this" not in sys.modules
    with pytest.raises(UnknownNameError, match=r"unknown serializer 'jsn': .* did you mean 'json'\?"):
        table.get("jsn")


@pytest.mark.parametrize("target", ["json", "json:", ":dumps", "a:b:c"])
def test_a_malformed_target_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="must point to"):
        Registry("serializer", {"new": target})
