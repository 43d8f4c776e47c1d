"""The documentation of the hooks is complete, and its examples run."""

from __future__ import annotations

import doctest
import inspect

import pytest

from megacore import hookspecs

HOOKS = [name for name, member in vars(hookspecs).items() if hasattr(member, f"{hookspecs.PROJECT}_spec")]


def test_there_is_one_hook_that_declares_and_those_that_work_for_a_family():
    assert sorted(HOOKS) == sorted(["model_families", *hookspecs.FAMILY_HOOKS])


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example_that_implements_it(hook):
    documentation = inspect.getdoc(getattr(hookspecs, hook))
    [test] = doctest.DocTestFinder(recurse=False).find(getattr(hookspecs, hook), globs={})

    assert documentation is not None
    assert any(f"def {hook}(" in example.source for example in test.examples)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_runs(hook):
    [test] = doctest.DocTestFinder(recurse=False).find(getattr(hookspecs, hook), globs={})
    report: list[str] = []

    result = doctest.DocTestRunner().run(test, out=report.append)

    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize("hook", HOOKS)
def test_no_hook_has_a_default_or_a_keyword_only_argument(hook):
    parameters = inspect.signature(getattr(hookspecs, hook)).parameters.values()

    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    assert all(parameter.default is parameter.empty for parameter in parameters)
