"""The base of all checks: what the author of a plugin provides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.hookspecs import ReferenceModel
from megacore.plugins import get_family

CPU = torch.device("cpu")


class FamilyChecks:
    """A test class for one family; see :class:`~megacore.testing.ModelFamilyTests`."""

    family: ClassVar[str]
    sources: ClassVar[tuple[str, ...]] = ("hf",)

    # What the author provides

    def tiny_config(self) -> ModelConfig:
        """Return a configuration of the family's only style."""
        raise NotImplementedError(f"{type(self).__name__} needs a tiny_config(), or tiny_configs()")

    def tiny_configs(self) -> dict[str, ModelConfig]:
        """Return a configuration of each style, by a name for the reports."""
        return {"tiny": self.tiny_config()}

    def publish(self, config: ModelConfig, directory: Path, source: str) -> None:
        """Write a checkpoint of random weights in format ``source`` into the empty ``directory``.

        It must not use megacore's weight map, or a mistake in the map would cancel out. For ``"hf"`` the default uses
        the model that ``load_reference`` returns for ``path=None``, if its ``.model`` is one of transformers. Fill a
        model of your own with :func:`~megacore.testing.randomize`.
        """
        if source != "hf":
            raise NotImplementedError(
                f"override publish() to write a checkpoint of random weights in format {source!r}"
            )
        reference = get_family(self.family).load_reference(config, None, torch.float32, CPU)
        model: Any = getattr(reference, "model", None)
        if not hasattr(model, "save_pretrained"):
            raise NotImplementedError(
                "load_reference returns no object whose .model is a transformers model: override publish() in your "
                "subclass of ModelFamilyTests, so that it writes a checkpoint of random weights"
            )
        randomize(model)
        model.save_pretrained(directory)

    def reference(self, config: ModelConfig, directory: Path, source: str) -> ReferenceModel:
        """Return the independent implementation, in float32, with the weights that :meth:`publish` wrote."""
        return get_family(self.family).load_reference(config, directory, torch.float32, CPU)

    def reference_parameters(self, reference: ReferenceModel) -> Mapping[str, Tensor]:
        """Return the parameters of ``reference`` by their published names, to check gradients and completeness.

        The default supports a reference that is a module, or whose ``.model`` is one, if its parameters have the names
        of the tensors in the files.
        """
        module = getattr(reference, "model", reference)
        if not isinstance(module, nn.Module):
            raise NotImplementedError(
                "load_reference returns neither a torch module nor an object with one in .model: override "
                "reference_parameters() in your subclass of ModelFamilyTests"
            )
        return dict(module.named_parameters())

    # How the checks run

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "style" in metafunc.fixturenames:
            metafunc.parametrize("style", list(self.tiny_configs()))
        if "source" in metafunc.fixturenames:
            metafunc.parametrize("source", self.sources)


def randomize(module: nn.Module, *, seed: int = 0) -> None:
    """Set every parameter of ``module`` to random values that make logits of order 1.

    Biases are not zero and the weights of norms are not one, unlike freshly initialised ones, which would agree with a
    model that leaves them out.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / (parameter.numel() / parameter.shape[0]) ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)
