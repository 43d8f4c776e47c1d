"""Published checkpoints are fetched from the hub, and what goes wrong on the way is told with what to do about it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants

import megacore_llama
from fake_hub import SECRET, Hub, running_hub
from megacore import hookimpl
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, DiskFullError, FetchError
from megacore.plugins import default_registry
from megacore.weights.hub import fetch, is_repository, locate, provenance
from tiny_llama import SIZES, published_model

NAME = "somebody/tiny-model"


@pytest.fixture(scope="module")
def server():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path) -> Hub:
    """A hub of its own for each test, which is the one that ``huggingface_hub`` asks; its default cache is empty."""
    vars(server).update(vars(Hub(url=server.url)))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return server


@pytest.fixture
def published(tmp_path) -> Path:
    """A checkpoint with what else there is in a repository."""
    directory = published_model(tmp_path / "published")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text(f'{{"of": "{name}"}}')  # files of the same content would be fetched once
    for name in ("pytorch_model.bin", "modeling_tiny.py", "README.md", "consolidated.safetensors", "training.pth"):
        (directory / name).write_text(f"{name} is not to be fetched")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.safetensors").write_text("not to be fetched")
    return directory


@pytest.fixture
def in_several_files(published) -> Path:
    """``published``, its weights in several files with an index."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(published).save_pretrained(published, max_shard_size="20KB")
    (published / "model.safetensors").unlink(missing_ok=True)
    return published


@pytest.fixture
def tiny_plugin():
    """A plugin whose family ``tiny`` is on the hub in sizes ``0.1`` and ``gone``."""
    plugin = ModuleType("megacore_tiny")
    [family] = (family for family in megacore_llama.model_families() if family.name == "llama")

    def config_from_source(published, source):
        return replace(family.config_from_source(published, source), family="tiny")

    preset = family.config_from_source(SIZES, "hf").to_dict()
    del preset["family"]

    @hookimpl
    def model_families():
        return [
            replace(
                family,
                name="tiny",
                config_from_source=config_from_source,
                presets={"0.1": preset, "0.2": preset | {"num_layers": 7}, "elsewhere": preset},
                hub={"0.1": NAME, "0.2": NAME},
            )
        ]

    for name in ("weight_map", "qkv_permutation", "load_reference", "build_layer"):
        setattr(plugin, name, getattr(megacore_llama, name))
    plugin.model_families = model_families
    default_registry.cache_clear()
    default_registry().register(plugin, distribution="megacore-tiny")
    yield
    default_registry.cache_clear()


def megacore(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert SECRET not in result.output
    return result


def message(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# What is fetched


def test_the_weights_the_configuration_and_the_tokenizer_are_fetched_and_nothing_else(hub, published):
    hub.publish(NAME, published)

    directory = fetch(NAME)

    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names_in(directory) == wanted
    assert set(hub.fetched) == wanted
    for name in wanted:
        assert (directory / name).read_bytes() == (published / name).read_bytes()


def test_the_files_that_an_index_names_are_fetched(hub, in_several_files):
    hub.publish(NAME, in_several_files)
    named = set(json.loads((in_several_files / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(named) > 2

    directory = fetch(NAME)

    assert {name for name in names_in(directory) if name.endswith(".safetensors")} == named


@pytest.mark.parametrize(
    "name",
    ["*", "*.safetensors", "pytorch_model.bin", "modeling_tiny.py", "onnx/model.safetensors", "a[b].safetensors"],
)
def test_an_index_that_names_anything_but_safetensors_is_refused_and_nothing_of_it_fetched(hub, in_several_files, name):
    index = in_several_files / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(document))
    hub.publish(NAME, in_several_files)

    told = message(CorruptCheckpointError, fetch, NAME)

    assert f"names {name!r}, which is not a safetensors file of its own directory" in told
    assert all(fetched.endswith(".json") for fetched in hub.fetched)


def test_the_default_cache_is_that_of_huggingface_hub(hub, published, tmp_path):
    hub.publish(NAME, published)

    assert fetch(NAME).is_relative_to(tmp_path / "default-cache")


def test_another_cache_may_be_chosen(hub, published, tmp_path):
    hub.publish(NAME, published)

    assert fetch(NAME, cache_dir=tmp_path / "cache").is_relative_to(tmp_path / "cache")
    assert not (tmp_path / "default-cache").exists()


def test_what_is_in_the_cache_is_not_fetched_again(hub, published):
    hub.publish(NAME, published)
    first = fetch(NAME)
    hub.fetched.clear()

    assert fetch(NAME) == first
    assert hub.fetched == []


def test_a_cached_checkpoint_is_had_without_a_network(hub, published, monkeypatch):
    hub.publish(NAME, published)
    first = fetch(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert fetch(NAME) == first
    assert hub.requests == []


def test_a_cached_checkpoint_is_had_while_the_hub_is_down(hub, published):
    hub.publish(NAME, published)
    first = fetch(NAME)
    hub.broken = 503

    assert fetch(NAME) == first


@pytest.mark.parametrize("pin", ["branch", "commit"])
def test_a_revision_is_fetched_as_it_was(hub, published, tmp_path, pin):
    later = shutil.copytree(published, tmp_path / "later")
    (later / "tokenizer.json").write_text('{"later": 1}')
    commit = hub.publish(NAME, published, revision="v1")
    latest = hub.publish(NAME, later)

    directory = fetch(NAME, revision="v1" if pin == "branch" else commit)

    assert (directory / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    assert provenance(directory) == {"repository": NAME, "revision": commit}
    assert provenance(fetch(NAME)) == {"repository": NAME, "revision": latest}


def test_weights_are_of_the_commit_that_their_index_is_of(hub, in_several_files, tmp_path):
    # somebody pushes to the repository between the two steps of fetching
    other = published_model(tmp_path / "other", num_hidden_layers=1)
    commit = hub.publish(NAME, in_several_files)

    class PushedMeanwhile(list):
        def append(self, name):
            super().append(name)
            if name == "config.json":
                hub.publish(NAME, other)

    hub.fetched = PushedMeanwhile()
    directory = fetch(NAME)

    assert provenance(directory)["revision"] == commit
    assert hub.repositories[NAME].revisions["main"] != commit
    assert len([name for name in names_in(directory) if name.endswith(".safetensors")]) > 2


# Where a name is looked for


@pytest.mark.parametrize("name", ["tiiuae/falcon-7b", "meta-llama/Llama-2-7b-hf", "a/b", "0x/y_z.1"])
def test_owner_and_name_can_be_a_repository(name):
    assert is_repository(name)


@pytest.mark.parametrize(
    "name", ["gpt2", "a/b/c", "/a/b", "./a", "../a", "a/..", "~/a", "a/", "/a", "a b/c", "a/b\n", ""]
)
def test_a_path_is_no_repository(name):
    assert not is_repository(name)


def test_a_directory_that_exists_is_taken_before_the_hub(hub, published, tmp_path, monkeypatch):
    hub.publish(NAME, published)
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert locate(NAME) == Path(NAME)
    assert hub.requests == []


def test_what_cannot_be_a_repository_is_a_directory(hub, tmp_path):
    assert locate(str(tmp_path / "nowhere")) == tmp_path / "nowhere"
    assert hub.requests == []


@pytest.mark.parametrize(
    "options, told",
    [
        ({"revision": "v1"}, "leave out --revision"),
        ({"cache_dir": Path("cache")}, "leave out --cache-dir"),
        ({"revision": "v1", "cache_dir": Path("cache")}, "leave out --cache-dir and --revision"),
    ],
)
def test_a_revision_or_cache_of_a_directory_is_a_mistake(published, options, told):
    assert message(ConfigError, locate, str(published), **options) == f"{published} is not on the hub: {told}"


@pytest.mark.parametrize("directory", ["models--a--b/snapshots/main", "snapshots/" + 40 * "a", "published"])
def test_a_directory_that_is_not_of_the_cache_has_no_provenance(tmp_path, directory):
    assert provenance(tmp_path / directory) == {}


# What goes wrong


def test_without_a_network_and_with_nothing_cached_the_answer_says_so(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens

    told = message(FetchError, fetch, NAME)

    assert told == (
        f"{NAME} could not be fetched (ConnectError). Check the network and run the command again: the files fetched "
        f"so far are kept in {tmp_path / 'default-cache'}. Or pass a directory that holds the checkpoint (--from, "
        "--reference)"
    )


def test_when_offline_is_asked_for_and_nothing_is_cached_the_answer_says_so(hub, published, monkeypatch, tmp_path):
    hub.publish(NAME, published)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    told = message(FetchError, fetch, NAME)

    assert told == (
        f"{NAME} is not completely in the cache, {tmp_path / 'default-cache'}, and HF_HUB_OFFLINE forbids downloads: "
        "unset that, or pass a directory that holds the checkpoint (--from, --reference)"
    )
    assert hub.requests == []


def test_a_gated_repository_is_answered_with_where_to_accept_its_licence_and_how_to_log_in(hub, published):
    hub.publish(NAME, published)
    hub.repositories[NAME].gated = True

    told = message(FetchError, fetch, NAME)

    assert told == (
        f"{NAME} is gated: accept its licence at {hub.url}/{NAME} and log in with `hf auth login`, "
        "or pass a directory that holds the checkpoint (--from, --reference)"
    )


def test_a_repository_that_does_not_exist_may_have_been_meant_for_a_directory(hub):
    told = message(CheckpointError, fetch, "ckpts/tiny")

    assert told == (
        "there is no ckpts/tiny on the hub, and no such directory here. If you meant a directory, check where it is; "
        "if the repository is private, log in with `hf auth login`"
    )


def test_a_revision_that_does_not_exist_is_named(hub, published):
    hub.publish(NAME, published)

    told = message(CheckpointError, fetch, NAME, revision="v2")

    assert told == f"{NAME} has no revision 'v2': {hub.url}/{NAME}/commits lists them"


def test_a_repository_without_safetensors_is_refused_and_its_pickles_stay_where_they_are(hub, published):
    (published / "model.safetensors").unlink()
    hub.publish(NAME, published)

    told = message(CheckpointError, fetch, NAME)

    assert f"{NAME} on the hub (revision main) has no weights in safetensors" in told
    assert "--revision" in told
    assert "refs/pr/N" in told
    assert "pytorch_model.bin" not in hub.fetched


def test_a_pull_request_of_the_hub_is_a_revision(hub, published, tmp_path):
    without = shutil.copytree(published, tmp_path / "without")
    (without / "model.safetensors").unlink()
    hub.publish(NAME, without)
    commit = hub.publish(NAME, published, revision="refs/pr/3")

    assert provenance(fetch(NAME, revision="refs/pr/3"))["revision"] == commit


def test_a_repository_without_a_configuration_is_refused(hub, published):
    (published / "config.json").unlink()
    hub.publish(NAME, published)

    assert "has no config.json" in message(CheckpointError, fetch, NAME)


def test_a_file_that_the_index_names_and_the_repository_lacks_is_named(hub, in_several_files):
    gone = sorted(in_several_files.glob("model-*.safetensors"))[1]
    gone.unlink()
    hub.publish(NAME, in_several_files)

    told = message(CheckpointError, fetch, NAME)

    assert f"lacks {gone.name}, which its model.safetensors.index.json names" in told


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, published, monkeypatch):
    hub.publish(NAME, published)
    hub.cut_after = 1000
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    told = message(FetchError, fetch, NAME)
    hub.cut_after = None
    directory = fetch(NAME)

    assert f"{NAME} could not be fetched (" in told
    assert "run the command again: the files fetched so far are kept in" in told
    assert (directory / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()


def test_a_download_that_broke_off_is_not_taken_for_whole_without_a_network(hub, in_several_files, monkeypatch):
    hub.publish(NAME, in_several_files)
    directory = fetch(NAME)
    lost = sorted(directory.glob("model-*.safetensors"))[1]
    lost.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert "is not completely in the cache" in message(FetchError, fetch, NAME)


def test_a_damaged_file_in_the_cache_is_named_with_how_to_have_it_again(hub, published):
    hub.publish(NAME, published)
    blob = (fetch(NAME) / "model.safetensors").resolve()
    os.truncate(blob, 5000)

    told = message(CorruptCheckpointError, fetch, NAME)

    assert told.endswith(f". Delete {blob} to have it fetched again")
    blob.unlink()
    assert (fetch(NAME) / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()


def test_a_hub_that_is_down_is_told_by_its_status_and_without_what_else_it_said(hub, published):
    hub.publish(NAME, published)
    hub.broken = 503

    assert "(the hub answered with status 503)" in message(FetchError, fetch, NAME)


@pytest.mark.parametrize("status", [401, 403])
def test_a_login_that_the_hub_refuses_is_told(hub, published, status):
    hub.publish(NAME, published)
    hub.broken = status

    assert "log in with `hf auth login`" in message((FetchError, CheckpointError), fetch, NAME)


@pytest.mark.parametrize(
    "raised, error, told",
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError, "choose another place with --cache-dir"),
        (PermissionError(errno.EACCES, "Permission denied"), FetchError, "choose another place with --cache-dir"),
        (OSError(f"Consistency check failed: {SECRET}"), FetchError, "run the command again"),
        (RuntimeError(f"of a transfer library, with {SECRET} in it"), FetchError, "run the command again"),
    ],
    ids=["no room", "no permission", "inconsistent", "of another library"],
)
def test_what_the_library_raises_is_told_with_what_to_do(hub, monkeypatch, raised, error, told):
    def fail(*arguments, **options):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    assert told in message(error, fetch, NAME)


def test_an_interruption_by_the_user_is_none_of_the_library(hub, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME)


# Through the command line


def test_convert_fetches_from_the_hub_and_records_the_commit(hub, published, tmp_path):
    commit = hub.publish(NAME, published)

    result = megacore("convert", "--model", "llama", "--from", NAME, "--out", tmp_path / "ckpt")

    assert result.exit_code == 0, result.output
    assert f"Note: {NAME} is at revision {commit}.\n" in result.stderr
    [entry] = Checkpoint(tmp_path / "ckpt").manifest.history
    assert (entry["repository"], entry["revision"]) == (NAME, commit)
    assert SECRET not in (tmp_path / "ckpt" / "megacore.json").read_text()
    assert f"Bearer {SECRET}" in hub.authorizations  # it was there to be told


def test_convert_takes_revision_and_cache(hub, published, tmp_path):
    commit = hub.publish(NAME, published, revision="v1")
    hub.publish(NAME, tmp_path)

    result = megacore(
        "convert", "--model", "llama", "--from", NAME, "--revision", "v1",
        "--cache-dir", tmp_path / "cache", "--out", tmp_path / "ckpt",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    [entry] = Checkpoint(tmp_path / "ckpt").manifest.history
    assert entry["revision"] == commit
    assert Path(entry["source"]).is_relative_to(tmp_path / "cache")


def test_translate_takes_what_convert_takes(hub, published, tmp_path):
    commit = hub.publish(NAME, published, revision="v1")
    hub.publish(NAME, tmp_path)

    result = megacore(
        "translate", "--model", "llama", "--from", NAME, "--revision", "v1",
        "--cache-dir", tmp_path / "cache", "--out", tmp_path / "out",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert f"Note: {NAME} is at revision {commit}.\n" in result.stderr
    assert result.stdout == f"Translated {NAME} to {tmp_path / 'out'} (hf).\n"
    assert (tmp_path / "cache").is_dir()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_conversion_of_a_directory_records_no_repository(published, tmp_path):
    result = megacore("convert", "--model", "llama", "--from", published, "--out", tmp_path / "ckpt")

    assert result.exit_code == 0, result.output
    [entry] = Checkpoint(tmp_path / "ckpt").manifest.history
    assert "repository" not in entry
    assert "revision" not in entry


def test_a_size_alone_is_fetched_from_where_the_family_says(hub, published, tmp_path, tiny_plugin):
    commit = hub.publish(NAME, published)

    result = megacore("convert", "--model", "tiny", "--size", "0.1", "--out", tmp_path / "ckpt")

    assert result.exit_code == 0, result.output
    [entry] = Checkpoint(tmp_path / "ckpt").manifest.history
    assert (entry["repository"], entry["revision"]) == (NAME, commit)


@pytest.mark.parametrize("origin", [(), ("--from", NAME), ("--from", "published")], ids=["alone", "hub", "directory"])
def test_a_size_that_the_checkpoint_contradicts_is_refused(hub, published, tmp_path, tiny_plugin, origin, monkeypatch):
    hub.publish(NAME, published)
    monkeypatch.chdir(tmp_path)

    result = megacore("convert", "--model", "tiny", "--size", "0.2", *origin, "--out", tmp_path / "ckpt")

    assert result.exit_code == 2
    assert "does not describe a tiny of size 0.2: num_layers 5 instead of 7" in result.stderr
    assert not (tmp_path / "ckpt").exists()


def test_a_size_that_the_family_does_not_have_is_answered_with_those_that_it_has(hub, tmp_path, tiny_plugin):
    result = megacore("convert", "--model", "tiny", "--size", "3", "--out", tmp_path / "ckpt")

    assert result.exit_code == 2
    assert "model family 'tiny' has no size '3'. Known sizes: 0.1, 0.2, elsewhere." in result.stderr
    assert hub.requests == []


def test_a_size_of_which_nobody_says_where_it_is_has_to_be_given_as_a_directory(hub, tmp_path, tiny_plugin):
    result = megacore("convert", "--model", "tiny", "--size", "elsewhere", "--out", tmp_path / "ckpt")

    assert result.exit_code == 2
    assert "megacore-tiny 0 does not say where on the hub size elsewhere is: pass --from" in result.stderr


def test_neither_a_checkpoint_nor_a_size_is_a_mistake(tmp_path):
    result = megacore("convert", "--model", "llama", "--out", tmp_path / "ckpt")

    assert result.exit_code == 2
    assert "Give --from, or --size to fetch a published model." in result.stderr


@pytest.mark.parametrize("command", ["convert", "translate"])
def test_an_output_that_exists_is_refused_before_anything_is_fetched(hub, published, tmp_path, command):
    hub.publish(NAME, published)

    result = megacore(command, "--model", "llama", "--from", NAME, "--out", tmp_path)

    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    "trouble, exit_code, told",
    [
        ({"gated": True}, 1, "is gated: accept its licence"),
        ({"broken": 500}, 1, "status 500"),
        ({}, 2, "there is no somebody/tiny-model on the hub"),
    ],
    ids=["gated", "down", "not there"],
)
def test_what_goes_wrong_is_told_in_one_line_and_leaves_nothing(hub, published, tmp_path, trouble, exit_code, told):
    if trouble.get("gated"):
        hub.publish(NAME, published)
        hub.repositories[NAME].gated = True
    hub.broken = trouble.get("broken")

    result = megacore("convert", "--model", "llama", "--from", NAME, "--out", tmp_path / "ckpt")

    assert result.exit_code == exit_code
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert told in line
    assert "Traceback" not in result.output
    assert not (tmp_path / "ckpt").exists()


def test_verify_fetches_its_reference(hub, published, tmp_path):
    hub.publish(NAME, published, revision="v1")
    other = published_model(tmp_path / "other", rms_norm_eps=0.5)
    hub.publish(NAME, other)
    ckpt = tmp_path / "ckpt"
    assert megacore("convert", "--model", "llama", "--from", published, "--out", ckpt).exit_code == 0
    options = ("--random-ids", "--iters", 1, "--seq-length", 8, "--cache-dir", tmp_path / "cache")

    same = megacore("verify", ckpt, "--reference", NAME, "--revision", "v1", *options)
    another = megacore("verify", ckpt, "--reference", NAME, *options)

    assert (same.exit_code, another.exit_code) == (0, 1), same.output + another.output
    assert not (tmp_path / "default-cache").exists()


def test_a_program_of_its_own_fetches_by_the_environment_and_draws_nothing_into_a_pipe(hub, published, tmp_path):
    hub.publish(NAME, published)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN": SECRET,
    }

    done = subprocess.run(
        [sys.executable, "-m", "megacore", "convert", "--model", "llama", "--from", NAME, "--out", tmp_path / "ckpt"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"Note: {NAME} is at revision {hub.repositories[NAME].revisions['main']}.",
    ]
    assert SECRET not in done.stdout
    assert Checkpoint(tmp_path / "ckpt").manifest.family == "llama"


@pytest.mark.parametrize("what", ["import megacore.cli", "import megacore.weights.conversion, megacore.weights.hub"])
def test_the_library_of_the_hub_is_imported_only_to_fetch(what):
    check = f"{what}\nimport sys; sys.exit('huggingface_hub' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_the_weights_that_arrive_are_those_that_were_published(hub, in_several_files, tmp_path):
    from safetensors.torch import load_file

    hub.publish(NAME, in_several_files)

    assert megacore("convert", "--model", "llama", "--from", NAME, "--out", tmp_path / "ckpt").exit_code == 0
    assert megacore("export", tmp_path / "ckpt", "--out", tmp_path / "exported").exit_code == 0

    expected = {
        name: tensor
        for file in in_several_files.glob("model-*.safetensors")
        for name, tensor in load_file(file).items()
    }
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
