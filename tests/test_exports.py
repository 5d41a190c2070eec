"""The public surface is what `pa_fast.__all__` says, sorted, documented and importable by name."""

from __future__ import annotations

import importlib.util
import inspect as inspecting

import pa_kernels
import pytest

import pa_fast
import pa_fast.sweep.driver
from pa_fast import errors


def test_all_is_sorted_and_complete() -> None:
    assert pa_fast.__all__ == sorted(pa_fast.__all__)
    assert dir(pa_fast) == sorted(pa_fast.__all__)
    for name in pa_fast.__all__:
        assert getattr(pa_fast, name) is not None


@pytest.mark.parametrize("package", [pa_fast, pa_kernels], ids=lambda p: p.__name__)
def test_everything_public_is_documented_and_typed(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        value = getattr(package, name)
        if inspecting.isclass(value) or inspecting.isfunction(value):
            assert inspecting.getdoc(value), name
        if inspecting.isfunction(value):
            assert value.__annotations__.get("return") is not None, name
            assert all(
                p in value.__annotations__ for p in inspecting.signature(value).parameters
            ), name
        if inspecting.isclass(value):
            for method, member in vars(value).items():
                if inspecting.isfunction(member) and not method.startswith("_"):
                    assert "return" in member.__annotations__, f"{name}.{method}"


def test_modules_for_other_stacks_have_short_names() -> None:
    assert pa_fast.ray.sweep is importlib.import_module("pa_fast.launch.ray").sweep
    assert "build_once" in pa_fast.lm_eval.__all__ and not set(pa_fast.__all__) & {"ray", "lm_eval"}
    if importlib.util.find_spec("lm_eval"):
        assert pa_fast.lm_eval.PaFastLM.__name__ == "PaFastLM"
    with pytest.raises(AttributeError, match="no attribute 'PaFast'"):
        pa_fast.lm_eval.PaFast  # noqa: B018


def test_sweep_stays_a_function_when_its_package_is_imported() -> None:
    assert inspecting.isfunction(pa_fast.sweep)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        pa_fast.sweeep  # noqa: B018


def test_every_error_is_drawn_in_the_tree() -> None:
    classes = [
        c
        for c in vars(errors).values()
        if inspecting.isclass(c) and issubclass(c, errors.PaFastError)
    ]
    assert len(classes) > 5
    for error in classes:
        assert error.__name__ in (errors.__doc__ or "")


def test_an_error_prints_its_hint_after_an_empty_line() -> None:
    assert str(errors.PairError("cannot pair `x`", "do this")) == "cannot pair `x`\n\nhint: do this"
    assert str(errors.PairError("cannot pair `x`")) == "cannot pair `x`"
