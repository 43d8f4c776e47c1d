"""The core and one plugin, installed as a user installs them: in an environment of their own, from wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "plugins/falcon"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that has the libraries of this one, but nothing of megacore until it is installed."""

    directory: Path

    def run(self, *command: object, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside of the repository."""
        program, *arguments = map(str, command)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MEGACORE"))}
        done = subprocess.run(
            [self.directory / "bin" / program, *arguments],
            cwd=self.directory,
            env=clean | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not succeeds or done.returncode == 0, done.stdout + done.stderr
        return done

    def pip(self, *arguments: object) -> str:
        return self.run("python", "-m", "pip", *arguments).stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """The wheels of the core and of the plugin, built from copies, since building leaves files beside the sources."""
    directory = tmp_path_factory.mktemp("wheels")
    left_out = shutil.ignore_patterns("__pycache__", "tests", "build", "*.egg-info")
    core, plugin = directory / "core", directory / "plugin"
    shutil.copytree(ROOT / "megacore", core / "megacore", ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, core)
    shutil.copytree(PLUGIN, plugin, ignore=left_out)
    for source in (core, plugin):
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", directory, source],
            check=True,
        )
    return directory


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory) -> Environment:
    """An environment with ``megacore`` and ``megacore-falcon``, and no other plugin."""
    environment = Environment(tmp_path_factory.mktemp("environment") / "venv")
    venv.create(environment.directory, symlinks=True)
    borrowed = environment.directory / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "megacore" not in entry.name and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    [site_packages] = environment.directory.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    # With dependencies, but without an index: what the wheels ask for is there, or pip fails.
    environment.pip("install", "--no-index", "--find-links", wheels, "megacore-falcon")
    return environment


@pytest.fixture(scope="module")
def published(environment) -> Path:
    """A tiny published model of random weights."""
    directory = environment.directory / "published"
    environment.run(
        "python", "-c",
        "import sys, transformers as t\n"
        "config = t.FalconConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=3, vocab_size=99)\n"
        "t.FalconForCausalLM(config).save_pretrained(sys.argv[1])",
        directory,
    )  # fmt: skip
    return directory


def test_only_the_core_and_the_plugin_are_installed(environment):
    listed = environment.pip("list", "--format", "freeze").splitlines()

    assert [line for line in listed if "megacore" in line] == ["megacore==0.1.0", "megacore-falcon==0.1.0"]
    where = environment.run(
        "python", "-c", "import megacore, megacore_falcon as f; print(megacore.__file__, f.__file__)"
    )
    assert all(Path(file).is_relative_to(environment.directory) for file in where.stdout.split())
    assert environment.run("megacore", "plugins").stdout == "megacore-falcon  0.1.0  active  falcon\n"


def test_a_model_is_converted_and_verified(environment, published):
    ckpt = environment.directory / "ckpt"

    environment.run("megacore", "convert", "--model", "falcon", "--from", published, "--out", ckpt)
    verified = environment.run(
        "megacore", "verify", ckpt, "--reference", published, "--random-ids", "--iters", 2, "--seq-length", 16
    )

    assert verified.stdout.splitlines()[-1].startswith("Verified in float32")


def test_without_the_plugin_the_answer_is_how_to_install_it(environment, wheels, published):
    environment.pip("uninstall", "-y", "megacore-falcon")
    try:
        done = environment.run(
            "megacore", "convert", "--model", "falcon", "--from", published, "--out", "unmade", succeeds=False
        )
    finally:
        environment.pip("install", "--no-index", "--no-deps", "--find-links", wheels, "megacore-falcon")

    assert done.returncode == 2
    assert "no plugin for falcon is installed; pip install megacore-falcon. Installed: none." in done.stderr
    assert not (environment.directory / "unmade").exists()
    assert environment.run("megacore", "plugins").stdout == "megacore-falcon  0.1.0  active  falcon\n"
