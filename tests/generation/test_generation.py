"""Generation: the tokens that transformers generates, in any batch and at any tensor-parallel size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import megacore
from megacore.checkpoint import Checkpoint
from megacore.errors import GenerationError, LayoutError, PluginError
from megacore.generation import Generated, Limits, Sampling, TextGenerator, decoding
from megacore.generation.launch import generate_on_rank
from megacore.model import cache
from megacore.parallel import ParallelContext, ParallelSizes
from tiny_llama import VOCAB, published_model
from tiny_models import falcon_with_linear_biases, grouped_falcon, tied_multi_query_falcon

SINGLE = ParallelContext.single()
NUM_NEW = 20
GREEDY = Sampling()
SOME = Limits(max_new_tokens=NUM_NEW, end_ids=())

LLAMA = "llama: 3 key-value heads"
MODELS = {
    LLAMA: ("llama", published_model),
    "llama2: 3 key-value heads": ("llama2", published_model),
    "falcon: multi-query, parallel": ("falcon", tied_multi_query_falcon),
    "falcon: 3 key-value heads, parallel": ("falcon", grouped_falcon),
    "falcon: ALiBi, 7 heads, sequential": ("falcon", falcon_with_linear_biases),
}

PROMPTS = [
    torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 11, 1, 7)
]
"""Of different lengths, one of them a single token."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these only lose by a second one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def enliven(published: Path) -> None:
    """Let a saved model of random weights say something else after each token; it would soon repeat itself.

    Where there are linear biases, queries and keys stay small: an attention that is sure of one token sees no biases.
    """
    model = AutoModelForCausalLM.from_pretrained(published)
    unchanged = ["embed", "lm_head", *(["query_key_value"] if getattr(model.config, "alibi", False) else [])]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not any(part in name for part in unchanged):
            parameter.data *= 4
        elif name.endswith(".bias") and ("ln_" in name or "layernorm" in name):
            parameter.data *= 0
    model.save_pretrained(published)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Each model as transformers saves it, and converted."""
    place = tmp_path_factory.mktemp("generation")
    for model, (family, publish) in MODELS.items():
        enliven(publish(place / f"published {model}"))
        megacore.convert(family, place / f"published {model}", place / model)
    return place


@pytest.fixture(scope="module")
def expected(place) -> dict[str, list[list[int]]]:
    """What transformers generates after each prompt alone, in float64."""
    generated = {}
    for model in MODELS:
        reference = AutoModelForCausalLM.from_pretrained(place / f"published {model}", dtype=torch.float64)
        generated[model] = [
            reference.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]
        assert len(set(chain.from_iterable(generated[model]))) > 9, "a model that repeats itself shows nothing"
    return generated


def load(checkpoint: Path, dtype: torch.dtype = torch.float64) -> TextGenerator:
    return TextGenerator(Checkpoint(checkpoint), SINGLE, dtype=dtype)


def ids_of(results: list[Generated]) -> list[list[int]]:
    return [result.ids for result in results]


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_prompts_has_the_tokens_that_transformers_generates_after_each_alone(model, place, expected):
    assert ids_of(load(place / model).generate(PROMPTS, SOME, GREEDY)) == expected[model]


@pytest.mark.parametrize("model", [LLAMA, "falcon: ALiBi, 7 heads, sequential"])
def test_so_have_prompts_that_are_read_one_by_one_into_buffers_that_grow(model, place, expected, monkeypatch):
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(cache, "GROWTH", 2)
    assert ids_of(load(place / model).generate(PROMPTS, SOME, GREEDY)) == expected[model]


def test_so_have_batches_of_any_size(place, expected):
    generator = load(place / LLAMA)
    for batch_size in (1, 3):
        assert ids_of(generator.generate(PROMPTS, SOME, GREEDY, batch_size)) == expected[LLAMA]


@pytest.mark.parametrize("model", [model for model in MODELS if not model.startswith("llama2")])
def test_so_have_two_ranks_of_which_each_holds_another_number_of_heads_and_tokens(model, place, expected, ranks):
    arguments = place / model, {"dtype": torch.float64}, TextGenerator.generate, (PROMPTS, SOME, GREEDY)
    generated, of_the_other = ranks.run(generate_on_rank, *arguments)
    assert ids_of(generated) == expected[model]
    assert of_the_other is None


def test_so_have_four_ranks_that_share_one_key_value_head(place, expected, ranks):
    model = "falcon: multi-query, parallel"
    arguments = place / model, {"dtype": torch.float64}, TextGenerator.generate, (PROMPTS, SOME, GREEDY)
    assert ids_of(ranks.run(generate_on_rank, *arguments, sizes=ParallelSizes(tp=4))[0]) == expected[model]


def test_so_has_a_checkpoint_that_is_cut_in_both_ways_at_a_size_of_its_own(place, expected):
    megacore.split(place / LLAMA, place / "cut", tp=3, pp=2)
    generated = megacore.generate(place / "cut", PROMPTS, tp=1, max_new_tokens=NUM_NEW, end_ids=[], dtype=torch.float64)
    assert ids_of(generated) == expected[LLAMA]


def test_a_text_ends_with_the_token_that_the_published_model_names_and_its_neighbours_go_on(place, expected):
    """Both read the tokens in ``generation_config.json``; they end one text in its middle, one at its first token."""
    first, second, *_ = expected[LLAMA]
    ends = [first[5], second[0]]
    published = shutil.copytree(place / f"published {LLAMA}", place / "published with ends")
    settings = json.loads((published / "generation_config.json").read_text()) | {"eos_token_id": ends}
    (published / "generation_config.json").write_text(json.dumps(settings))
    reference = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float64)
    whole = [
        reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_NEW, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]
    assert len({len(ids) for ids in whole}) > 2

    megacore.convert("llama", published, place / "with ends")
    results = load(place / "with ends").generate(PROMPTS, Limits(max_new_tokens=NUM_NEW), GREEDY)

    assert ids_of(results) == whole
    assert all(result.ended_by == ("end" if result.ids[-1] in ends else "max_new_tokens") for result in results)


def test_a_text_ends_where_the_context_of_the_model_is_full(place):
    [result] = load(place / LLAMA).generate([PROMPTS[1]], Limits(max_new_tokens=100, end_ids=()), GREEDY)
    assert len(PROMPTS[1] + result.ids) == 32
    assert result.ended_by == "context"


def test_sampled_tokens_are_the_same_in_any_batch_and_at_two_ranks(place, ranks):
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=7)
    limits = Limits(max_new_tokens=NUM_NEW, end_ids=range(12))
    generator = load(place / LLAMA)
    together = ids_of(generator.generate(PROMPTS, limits, sampling))
    assert len({len(ids) for ids in together}) > 1, "one has to end before the others"
    assert ids_of(generator.generate(PROMPTS, limits, sampling, 1)) == together
    assert ids_of(generator.generate(PROMPTS, limits, replace(sampling, seed=8))) != together
    arguments = place / LLAMA, {"dtype": torch.float64}, TextGenerator.generate, (PROMPTS, limits, sampling)
    assert ids_of(ranks.run(generate_on_rank, *arguments)[0]) == together


def test_equal_prompts_are_not_answered_equally_when_tokens_are_drawn(place):
    one, other = load(place / LLAMA).generate([PROMPTS[0]] * 2, SOME, Sampling(temperature=2.0, seed=1))
    assert one.ids != other.ids


def test_weights_are_computed_with_as_they_are_stored_unless_another_dtype_is_asked_for(place):
    megacore.convert("llama", place / f"published {LLAMA}", place / "bf16", dtype=torch.bfloat16)
    stored = TextGenerator(Checkpoint(place / "bf16"), SINGLE)
    assert {parameter.dtype for parameter in stored.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load(place / "bf16").model.parameters()} == {torch.float64}


def test_an_attention_that_keeps_no_keys_and_values_is_refused(place):
    class Forgetful(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden, positions):
            return self.layer(hidden, replace(positions, cache=None))

    generator = load(place / LLAMA)
    generator.model.decoder.layers["3"] = Forgetful(generator.model.decoder.layers["3"])
    with pytest.raises(PluginError, match=r"^layer 3 of llama does not cache keys and values: .* Export the model"):
        generator.generate(PROMPTS, SOME, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], r"the prompt \[\] has no token, so there is nothing to continue: give one with text"),
        ([5] * 32, r"the prompt \[5, 5, .*…? has 32 tokens, and the context of the model is 32: .* Shorten the prompt"),
        ([5, VOCAB], r"the prompt \[5, 99\] has the token id 99, and the vocabulary of .* ends at 98"),
        ("Hello", r"has no tokenizer, .*: convert the model from a directory that has one"),
        ([{"role": "user", "content": "Hello"}], r"has no tokenizer"),
    ],
    ids=["empty", "too long", "beyond the vocabulary", "text without a tokenizer", "chat without a tokenizer"],
)
def test_a_prompt_that_the_model_cannot_go_on_from_is_refused(prompt, said, place):
    with pytest.raises(GenerationError, match=said):
        megacore.generate(place / LLAMA, [PROMPTS[0], prompt])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"stop": "word"}, r"stop is a list of texts, not a text: \['word'\]"),
        ({"stop": ["a", ""]}, "a stop text is empty"),
        ({"stop": ["a"]}, "has no tokenizer"),
        ({"temperature": -1.0}, "the temperature must be 0 or above, not -1"),
        ({"temperature": 1.0, "top_k": 0}, "top-k must be a number of tokens, at least 1, not 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p must be a probability above 0, at most 1, not 0"),
        ({"top_p": 0.5}, "top-k and top-p have no effect without a temperature"),
        ({"batch_size": 0}, "the batch size must be at least 1, not 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_means_nothing_is_refused(settings, said, place):
    with pytest.raises(GenerationError, match=said):
        megacore.generate(place / LLAMA, **({"prompts": [PROMPTS[0]]} | settings))


def test_a_size_that_the_model_cannot_be_cut_into_is_refused_before_anything_starts(place):
    with pytest.raises(LayoutError, match="5"):
        megacore.generate(place / LLAMA, [PROMPTS[0]], tp=5)
