"""The conformance kit, with which plugins are tested. It needs pytest: ``pip install megacore[test]``.

Start with ``conformance.py``, the class to subclass; ``checks/`` has its checks, by subject.

>>> from megacore.testing import ModelFamilyTests  # doctest: +SKIP
>>> class TestMpt(ModelFamilyTests):  # doctest: +SKIP
...     family = "mpt"
...
...     def tiny_config(self):
...         return ModelConfig(family="mpt", num_layers=3, hidden_size=24, ...)
"""

import pytest

# Before they are imported, so that pytest explains their failed assertions.
pytest.register_assert_rewrite("megacore.testing.conformance", "megacore.testing.checks")

from megacore.testing.checks.base import randomize as randomize  # noqa: E402
from megacore.testing.conformance import ModelFamilyTests as ModelFamilyTests  # noqa: E402
