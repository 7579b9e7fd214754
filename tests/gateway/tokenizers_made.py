"""A tokenizer that is small enough to make in a test: one token a word."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("word", "hello", "user", "assistant", "<s>", "<unk>")


def make_tokenizer(folder: Path) -> Path:
    """Write a model's tokenizer files; completions begin with ``<s>``, chats do not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder
