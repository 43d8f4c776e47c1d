"""Plugins that lie in a directory as if pip had installed them there."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path

from warm_commands import run


def lay_out(files: Mapping[str, str], site: Path) -> None:
    """Write the ``files`` of a plugin, by their paths, into ``site``, with what pip would say of its pyproject.toml."""
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    requirements = "".join(f"Requires-Dist: {requirement}\n" for requirement in project["dependencies"])
    for extra, needs in project.get("optional-dependencies", {}).items():
        requirements += "".join(f'Requires-Dist: {requirement}; extra == "{extra}"\n' for requirement in needs)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requirements}"
    )
    points = project["entry-points"]["megacore"]
    (metadata / "entry_points.txt").write_text(
        "[megacore]\n" + "".join(f"{name} = {module}\n" for name, module in points.items())
    )


def run_pytest(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in ``site``, with what lies there importable, in a process of its own."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return run(
        *("-q", "-p", "no:cacheprovider", *arguments),
        module="pytest",
        cwd=site,
        environment={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        timeout=600,
        imports=("transformers.models.qwen2.modeling_qwen2",),
    )
