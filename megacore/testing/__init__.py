"""What a plugin is tested with: the conformance kit. Needs pytest, which ``pip install megacore[test]`` brings.

>>> from megacore.testing import ModelFamilyTests  # doctest: +SKIP
>>> class TestMpt(ModelFamilyTests):  # doctest: +SKIP
...     family = "mpt"
...
...     def tiny_config(self):
...         return ModelConfig(family="mpt", num_layers=3, hidden_size=24, ...)
"""

import pytest

pytest.register_assert_rewrite("megacore.testing.conformance")  # before it is imported: its assertions are for people

from megacore.testing.conformance import ModelFamilyTests  # noqa: E402
from megacore.testing.publishing import randomize  # noqa: E402

__all__ = ["ModelFamilyTests", "randomize"]
