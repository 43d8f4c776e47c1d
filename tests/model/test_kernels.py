"""Kernels: they compute what is written out here, are refused where they cannot, and are told of; compiled layers."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import megacore
import tiny_run
from megacore.cli import cli
from megacore.errors import ConfigError
from megacore.model import kernels
from megacore.model.kernels import KERNELS, apex_problem, attention_kernel, check_kernels, norm_kernels
from megacore.model.positions import Segments
from megacore.parallel import ParallelContext, ParallelSizes
from megacore.training import RunConfig, Step, preflight, trainer
from megacore.training.config import KernelsSection
from megacore.training.resolved import parallel_sizes
from recorded_steps import train_steps
from training_with_kernels import trained_by, trained_with

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint of two layers and a dataset."""
    return tiny_run.prepare(tmp_path_factory.mktemp("kernels"), num_hidden_layers=2)


def run_of(place: Path, out: Path, *overrides: str) -> RunConfig:
    base = ("model.dtype=fp64", "training.train_iters=4", "training.micro_batch_size=2", "training.global_batch_size=4")
    return tiny_run.run_of(place, out, *base, *overrides)


def worst_difference(steps: list[Step], expected: list[Step]) -> float:
    """Of losses and gradient norms."""
    assert len(steps) == len(expected) == 4
    return max(
        max(abs(one.loss - other.loss), abs(one.grad_norm - other.grad_norm))
        for one, other in zip(steps, expected, strict=True)
    )


# --- attention


Lengths = list[list[int]]
WHOLE_ROWS: Lengths = [[33], [33]]
PACKED: Lengths = [[1, 2, 7, 23], [33]]


def heads(num_heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 33, number, 16) for number in (num_heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, one head after the other."""
    queries_per_kv = query.shape[2] // key.shape[2]
    future = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
    attended = []
    for head in range(query.shape[2]):
        scores = query[:, :, head] @ key[:, :, head // queries_per_kv].mT / math.sqrt(16)
        scores = scores.masked_fill(future, -math.inf) if mask is None else scores + mask[head]
        attended.append(scores.softmax(-1) @ value[:, :, head // queries_per_kv])
    return torch.stack(attended, dim=2)


def biases(num_heads: int, dtype: torch.dtype) -> Tensor:
    future = torch.ones(33, 33, dtype=torch.bool).triu(1)
    return torch.randn(num_heads, 33, 33, dtype=dtype).masked_fill(future, -math.inf)


def written_out_by_segment(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Lengths) -> Tensor:
    """Attention of each of a row's segments."""
    rows = []
    for row, own_lengths in enumerate(lengths):
        own = [heads[row : row + 1].split(own_lengths, dim=1) for heads in (query, key, value)]
        masks = [None if mask is None else mask[:, :length, :length] for length in own_lengths]
        rows.append(torch.cat([written_out(*segment) for segment in zip(*own, masks, strict=True)], dim=1))
    return torch.cat(rows)


def assert_computes_attention(
    name: str,
    num_heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    *,
    has_mask: bool,
    lengths: Lengths = WHOLE_ROWS,
) -> None:
    inputs = heads(num_heads, kv_heads, dtype)
    mask = biases(num_heads, dtype) if has_mask else None
    numbers = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])

    attended = attention_kernel(name)(*inputs, mask, 0.0, Segments.from_numbers(numbers, device=numbers.device))
    gradients = torch.autograd.grad(attended.square().sum(), inputs)

    expected = written_out_by_segment(*inputs, mask, lengths)
    bound = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(attended, expected, **bound)
    for own, other in zip(gradients, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(own, other, **bound)


@pytest.mark.parametrize("lengths", [WHOLE_ROWS, PACKED], ids=["whole rows", "segments"])
@pytest.mark.parametrize("has_mask", [False, True], ids=["causal", "linear biases"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("name", ["auto", "math", "flash"])
def test_attention_and_its_gradients_are_those_written_out(name, kv_heads, dtype, has_mask, lengths):
    assert_computes_attention(name, 6, kv_heads, dtype, has_mask=has_mask, lengths=lengths)


def test_the_kernel_that_is_asked_for_is_the_one_that_computes():
    inputs = heads(6, 3, torch.float32)

    flash = attention_kernel("flash")(*inputs, None, 0.0).grad_fn.next_functions[0][0].name()
    by_math = attention_kernel("math")(*inputs, None, 0.0).grad_fn.next_functions[0][0].name()

    assert "FlashAttention" in flash
    assert "FlashAttention" not in by_math


def test_linear_biases_do_not_cost_the_fused_kernel_on_a_cpu():
    attended = attention_kernel("auto")(*heads(6, 3, torch.float32), biases(6, torch.float32), 0.0)

    assert "FlashAttention" in attended.grad_fn.next_functions[0][0].name()


@pytest.mark.parametrize("lengths", [WHOLE_ROWS, PACKED], ids=["whole rows", "segments"])
@pytest.mark.parametrize("has_mask", [False, True], ids=["causal", "linear biases"])
def test_efficient_attention_gets_the_shared_heads_once_for_each_query(monkeypatch, has_mask, lengths):
    monkeypatch.setattr(kernels, "sdpa_kernel", lambda backend: nullcontext())  # it is not to be had on a CPU

    assert_computes_attention("efficient", 6, 3, torch.float64, has_mask=has_mask, lengths=lengths)


FLASH_ATTN = """
import torch
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert q.shape[2] == 6 and k.shape[2] == v.shape[2] == 3 and causal and softmax_scale is None
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        is_causal=True, enable_gqa=True, dropout_p=dropout_p,
    ).transpose(1, 2)

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert q.ndim == k.ndim == v.ndim == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist() and bounds[0] == 0 and bounds[-1] == len(q) == len(k) == len(v)
    assert max(b - a for a, b in zip(bounds, bounds[1:])) == max_seqlen_q == max_seqlen_k
    return torch.cat([
        flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], dropout_p, softmax_scale, causal)[0]
        for a, b in zip(bounds, bounds[1:])
    ])
"""


@pytest.mark.parametrize("lengths", [WHOLE_ROWS, PACKED], ids=["whole rows", "segments"])
def test_flash_attn_is_called_as_it_documents_itself(tmp_path, monkeypatch, lengths):
    (tmp_path / "flash_attn.py").write_text(FLASH_ATTN)
    monkeypatch.syspath_prepend(tmp_path)

    assert_computes_attention("flash-attn", 6, 3, torch.float64, has_mask=False, lengths=lengths)
    del sys.modules["flash_attn"]


# --- the table


def test_a_run_file_may_name_what_is_in_the_table():
    named = {
        kind: get_args(field.annotation) for kind, field in KernelsSection.model_fields.items() if kind != "compile"
    }

    assert named == {kind: tuple(rows) for kind, rows in KERNELS.items()}


def refusal(device_type: str, dtype: str = "fp32", *, has_mask=False, drops_attention=False, **chosen: str) -> str:
    with pytest.raises(ConfigError) as raised:
        check_kernels(chosen, device_type=device_type, dtype=dtype, has_mask=has_mask, drops_attention=drops_attention)
    return str(raised.value)


def accepted(device_type: str, dtype: str, **chosen: str) -> None:
    check_kernels(chosen, device_type=device_type, dtype=dtype, has_mask=False, drops_attention=False)


def test_flash_attn_in_32_bit_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())

    assert refusal("cuda", attention="flash-attn") == (
        'kernels.attention is "flash-attn", which cannot be used here:\n'
        "  it computes in 16 bit only on a GPU, and model.dtype is fp32: set it to bf16 or fp16\n"
        'Change that, or set kernels.attention to "auto"'
    )
    accepted("cuda", "bf16", attention="flash-attn")


def test_everything_that_is_in_the_way_is_told_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)

    said = refusal("cpu", has_mask=True, drops_attention=True, attention="flash-attn", optimizer="apex")

    assert "it computes on a GPU only, and there is none" in said
    assert "model.dtype is fp32: set it to bf16 or fp16" in said
    assert "flash-attn is not installed: pip install flash-attn" in said
    assert "it supports no mask, which the model's linear biases (ALiBi) need" in said
    assert "it has no dropout on a CPU, and dropout.attention is not 0" in said
    assert 'kernels.optimizer is "apex", which cannot be used here' in said


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
def test_what_torch_cannot_do_on_a_cpu_is_refused_and_the_rest_is_not(dtype):
    accepted("cpu", dtype, attention="auto", norm="auto", optimizer="auto")
    accepted("cpu", dtype, attention="math", norm="torch", optimizer="torch")
    accepted("cpu", dtype, attention="flash")
    assert "it computes on a GPU only" in refusal("cpu", dtype, attention="efficient")
    assert "it has no dropout on a CPU" in refusal("cpu", dtype, drops_attention=True, attention="flash")


def test_what_torch_cannot_do_on_a_gpu_is_refused():
    assert "in 16 bit only on a GPU, and model.dtype is fp32" in refusal("cuda", attention="flash")
    assert "linear biases" in refusal("cuda", "bf16", has_mask=True, attention="flash")
    assert "model.dtype is fp64: set it to fp32, bf16 or fp16" in refusal("cuda", "fp64", attention="efficient")


@pytest.mark.filterwarnings("ignore:(Flash attention kernel|Both fused kernels)")  # torch tells why beside its error
@pytest.mark.parametrize("backend", ["flash", "efficient"])
def test_torch_itself_refuses_on_a_cpu_what_the_table_says_it_does(backend):
    dropout = 0.1 if backend == "flash" else 0.0

    with pytest.raises(RuntimeError, match=r"No (available kernel|viable backend)"):
        attention_kernel(backend)(*heads(6, 6, torch.float32), None, dropout)


def test_the_command_refuses_a_kernel_with_exit_code_2_before_anything_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "Engine", lambda *arguments: 1 / 0)
    run_of(place, tmp_path / "out")

    result = CliRunner().invoke(cli, ["train", str(tmp_path / "out.toml"), "--set", "kernels.attention=flash-attn"])

    assert result.exit_code == 2
    assert 'kernels.attention is "flash-attn", which cannot be used here' in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_kernel_is_refused_with_those_that_there_are(place, tmp_path):
    with pytest.raises(
        ConfigError, match=r"kernels\.attention: .*'auto', 'math', 'flash', 'efficient' or 'flash-attn'"
    ):
        run_of(place, tmp_path / "out", "kernels.attention=xformers")


def test_the_chosen_kernels_are_told_at_the_start(place, tmp_path):
    notes: list[str] = []
    run = run_of(place, tmp_path / "out", "kernels.attention=math", "training.train_iters=1")

    megacore.train(run, on_note=notes.append)

    assert notes == ["kernels: attention torch math, norm torch, optimizer torch fused AdamW"]


# --- apex


ADAMW = """
import torch
from torch.distributed.tensor import DTensor

class FusedAdam(torch.optim.Optimizer):
    '''AdamW by the formulas of the paper, with the arguments of apex.'''

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                assert not isinstance(p, DTensor) and not isinstance(p.data, DTensor)
                assert not isinstance(p.grad, DTensor)
                if p.grad is None:
                    continue
                state, (beta1, beta2), t = self.state[p], group["betas"], group["step"]
                m = state["m"] = state.get("m", 0) * beta1 + (1 - beta1) * p.grad
                v = state["v"] = state.get("v", 0) * beta2 + (1 - beta2) * p.grad**2
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"]))
"""

NORMS = """
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6):
    assert tuple(normalized_shape) == tuple(weight.shape)
    return input / (input.square().mean(-1, keepdim=True) + eps).sqrt() * weight

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
    assert tuple(normalized_shape) == tuple(weight.shape)
    variance, mean = input.var(-1, correction=0, keepdim=True), input.mean(-1, keepdim=True)
    return (input - mean) / (variance + eps).sqrt() * weight + bias
"""


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A directory whose packages can be imported; apex is forgotten before and after."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    yield site
    norm_kernels.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def lay_out_nvidia_apex(
    site: Path, *, init: str = "", extensions: tuple[str, ...] = ("amp_C", "fused_layer_norm_cuda")
):
    """What looks like NVIDIA's apex, with its functions written out."""
    for file, text in {
        "apex/__init__.py": init,
        "apex/optimizers/__init__.py": ADAMW,
        "apex/normalization/__init__.py": "",
        "apex/normalization/fused_layer_norm.py": NORMS,
    }.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    for extension in extensions:
        (site / f"{extension}.py").write_text("")


def test_nvidias_apex_is_recognised_without_importing_it(site):
    lay_out_nvidia_apex(site, init="raise RuntimeError('imported')")

    assert apex_problem("amp_C") is None
    accepted("cuda", "bf16", norm="apex", optimizer="apex")
    assert "model.dtype is fp64" in refusal("cuda", "fp64", optimizer="apex")


def test_the_extensions_of_a_newer_apex_lie_inside_of_it(site):
    lay_out_nvidia_apex(site, extensions=())
    (site / "apex" / "_extensions").mkdir()
    (site / "apex" / "_extensions" / "_amp_C.cpython-311-x86_64-linux-gnu.so").touch()

    assert apex_problem("amp_C") is None


def test_the_unrelated_apex_is_named_as_such_and_not_imported(site):
    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")

    said = refusal("cuda", "bf16", norm="apex", optimizer="apex")

    assert said.count(f"the apex installed at {site / 'apex'} is not NVIDIA's") == 2
    assert "NVIDIA's is built from https://github.com/NVIDIA/apex, with its CUDA extensions" in said
    accepted("cuda", "bf16", norm="auto", optimizer="auto")


def test_an_apex_that_is_one_file_is_not_nvidias(site):
    (site / "apex.py").write_text("")

    assert f"the apex installed at {site / 'apex.py'} is not NVIDIA's" in str(apex_problem("amp_C"))


def test_an_apex_without_its_cuda_extensions_is_refused(site):
    lay_out_nvidia_apex(site, extensions=())

    assert "was built without its CUDA extension amp_C" in refusal("cuda", "bf16", optimizer="apex")


def test_no_apex_is_told_as_such():
    assert "the package apex is not installed" in refusal("cuda", "bf16", norm="apex")


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_the_norms_of_apex_are_called_as_they_are_defined(site, norm):
    lay_out_nvidia_apex(site)
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 24), (24,), (24,))]
    arguments = arguments[:2] if norm == "rms_norm" else arguments

    fused = getattr(norm_kernels("apex"), norm)(*arguments, 0.1)

    torch.testing.assert_close(fused, getattr(norm_kernels("torch"), norm)(*arguments, 0.1))


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        (ParallelSizes(tp=2), ()),
        (ParallelSizes(dp_replicate=2), ()),
        (ParallelSizes(dp_shard=2), ("parallel.data_parallel=sharded",)),
    ],
    ids=["tp 2", "replicated", "sharded"],
)
def test_a_run_with_apex_on_plain_parts_of_the_parameters_is_that_with_torch(
    ranks, place, tmp_path, site, sizes, overrides
):
    lay_out_nvidia_apex(site)
    settings = (*overrides, "optimizer.weight_decay=0.1")
    expected = train_steps(run_of(place, tmp_path / "by torch", "optimizer.weight_decay=0.1"))

    run = run_of(place, tmp_path / "by apex", *settings, "kernels.norm=apex", "kernels.optimizer=apex")
    steps, _ = ranks.run(trained_with, run, str(site), sizes=sizes)

    assert worst_difference(steps, expected) < 1e-10


# --- compiled layers


@pytest.fixture(scope="module")
def uncompiled(place) -> list[Step]:
    return train_steps(run_of(place, place / "uncompiled"))


TRACED, GENERATED = "aot_eager", "inductor"
"""What torch does with a compiled layer: run what it has traced and differentiated, or generate C++ from that.

To generate and compile C++ takes ten times as long, and is torch's own work; so most settings are only traced, and all
are generated by `make soak`.
"""


def by(backend: str, *settings: object) -> object:
    marks = [pytest.mark.soak] if backend == "soak" else []
    return pytest.param(GENERATED if marks else backend, *settings, marks=marks)


COMPILED = {
    "plain": (),
    "selective": ("recompute.granularity=selective",),
    "full": ("recompute.granularity=full",),
    "math": ("kernels.attention=math",),
    "flash": ("kernels.attention=flash",),
}


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        *(by(GENERATED, name) for name in ("plain", "full")),
        *(by(TRACED, name) for name in ("selective", "math", "flash")),
        *(by("soak", name) for name in COMPILED),
    ],
)
def test_a_compiled_run_has_the_losses_of_one_that_is_not(place, tmp_path, uncompiled, backend, settings):
    run = run_of(place, tmp_path / "out", "kernels.compile=true", *COMPILED[settings])

    assert worst_difference(trained_by(ParallelContext.single(), run, backend), uncompiled) < 1e-10


def test_a_compiled_run_drops_what_one_that_is_not_drops(place, tmp_path, uncompiled):
    dropout = ("dropout.hidden=0.1", "dropout.attention=0.1", "dropout.lima=true")
    expected = train_steps(run_of(place, tmp_path / "uncompiled", *dropout))

    steps = train_steps(run_of(place, tmp_path / "compiled", *dropout, "kernels.compile=true"))

    assert worst_difference(expected, uncompiled) > 1e-3
    assert worst_difference(steps, expected) < 1e-10


def test_layers_that_are_alike_are_compiled_once(place, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    trained_by(ParallelContext.single(), run_of(place, tmp_path / "out", "kernels.compile=true"), TRACED)

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


SEQUENCE_PARALLEL = ("parallel.tensor_parallel=2", "parallel.sequence_parallel=true")

COMPILED_ON_TWO = {
    "tp 2": ("parallel.tensor_parallel=2",),
    "tp 2, selective": ("parallel.tensor_parallel=2", "recompute.granularity=selective"),
    "tp 2, full": ("parallel.tensor_parallel=2", "recompute.granularity=full"),
    "sequence parallel": SEQUENCE_PARALLEL,
    "sequence parallel, selective": (*SEQUENCE_PARALLEL, "recompute.granularity=selective"),
    "sharded": ("parallel.nproc_per_node=2", "parallel.data_parallel=sharded"),
    "pp 2": ("parallel.pipeline_parallel=2",),
}


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        by(GENERATED, "tp 2"),
        *(by(TRACED, name) for name in list(COMPILED_ON_TWO)[1:]),
        *(by("soak", name) for name in COMPILED_ON_TWO),
    ],
)
def test_compiled_layers_on_two_processes_compute_the_same(ranks, place, tmp_path, uncompiled, backend, settings):
    run = run_of(place, tmp_path / "out", "kernels.compile=true", *COMPILED_ON_TWO[settings])

    steps, other = ranks.run(trained_by, run, backend, sizes=parallel_sizes(run.parallel), timeout=240)

    assert worst_difference(steps, uncompiled) < 1e-10
    assert [step.loss for step in steps] == [step.loss for step in other]


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_a_schedule_that_takes_the_backward_pass_apart_is_refused_with_compilation(place, tmp_path, schedule):
    run = run_of(
        place, tmp_path / "out", "kernels.compile=true", "parallel.pipeline_parallel=2",
        f"parallel.pipeline_schedule={schedule}",
    )  # fmt: skip

    with pytest.raises(ConfigError, match=rf"{schedule}, which .* apart: set .* one of 1F1B, Interleaved1F1B, or"):
        megacore.train(run)


def test_compilation_without_a_compiler_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)

    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler on a CPU, and g\+\+ is not there: install it"):
        megacore.train(run_of(place, tmp_path / "out", "kernels.compile=true"))
