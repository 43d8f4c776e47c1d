"""NVIDIA's apex, told apart from the unrelated package of that name on PyPI by what its directory contains."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

REMEDY = "NVIDIA's is built from https://github.com/NVIDIA/apex, with its CUDA extensions"


def apex_problem(extension: str) -> str | None:
    """Why apex cannot be used, or ``None``. Nothing is imported: who knows what another package does.

    Args:
        extension: the compiled module that the wanted part of apex calls.
    """
    spec = find_spec("apex")
    if spec is None:
        return f"the package apex is not installed; {REMEDY}"
    locations = [Path(location) for location in spec.submodule_search_locations or ()]
    if not any((place / "optimizers").is_dir() and (place / "normalization").is_dir() for place in locations):
        found = locations[0] if locations else spec.origin
        return f"the apex installed at {found} is another package than NVIDIA's; {REMEDY}"
    # Formerly modules of their own, now libraries inside of the package.
    if find_spec(extension) is None and not any(any(p.glob(f"_extensions/_{extension}*.so")) for p in locations):
        return f"the apex installed at {locations[0]} was built without its CUDA extension {extension}; {REMEDY}"
    return None
