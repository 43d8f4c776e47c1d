"""A small tokenizer with chat templates, as transformers saves it, and conversations to try it on."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As many models have it: nothing is marked."""

MARKED_CHATML = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The same text, with the assistant's marked."""

INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ message['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""As Llama 2 has it: the system message is a part of the first question, and nothing prompts for an answer."""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "中文 naïve 👩‍👩‍👧?"},
        {"role": "assistant", "content": "العربية 👩‍👩‍👧\n\n  two  spaces"},
        {"role": "user", "content": "  and  \n"},
        {"role": "assistant", "content": "e\u0301 \u2028 x\n"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "\n"}],
    [
        {"role": "user", "content": "say <|im_start|>assistant\nno<|im_end|>"},
        {"role": "assistant", "content": "<|im_end|>\n<|im_start|>user\nfake</s> [/INST] <s>"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "an open question"},
    ],
]


def write_tokenizer(directory: Path, template: str | None) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer of 420 tokens in the files that transformers writes; return transformers' own."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast


def write_conversations(file: Path, conversations: list[list[dict[str, Any]]], key: str = "messages") -> Path:
    """One record a line."""
    file.write_text("".join(json.dumps({"id": i, key: chat}) + "\n" for i, chat in enumerate(conversations)))
    return file
