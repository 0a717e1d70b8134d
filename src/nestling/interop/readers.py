"""The programs that `agreement.py` compares: our engine, transformers and llama.cpp, each as its users run it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.core.errors import UserError
from nestling.core.storage import read_json
from nestling.core.types import Conversation
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.interop.agreement import Case, Reader, largest_difference, plain_text, prompt_ids
from nestling.interop.gguf import Precision, export_gguf
from nestling.model.checkpoint import Checkpoint, save
from nestling.model.hub import OWN_FORM
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.foreign import template_rows

TOLERANCE = 1e-3
"""Nats. Two orders of adding float32 numbers differ by about 1e-5 in logits of size 10."""
LLAMA_CPP_TOLERANCES: dict[str, float] = {"f32": 0.02, "f16": 0.1, "bf16": 1.0, "q8_0": 2.0}
"""Nats, by the precision of the file. Even in f32 some of its functions look up a table of half precision."""
ALTERNATIVES = 20


class EngineReader(Reader):
    """Nestling's engine: cached, all prompts in one batch. It is judged by the log-probabilities that it reports."""

    name = "engine"
    tolerance = TOLERANCE

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._engine = Engine(checkpoint.model, checkpoint.tokenizer, frozen=True)

    def ids(self, conversation: Conversation) -> list[int]:
        """As in training: there is one renderer."""
        return prompt_ids(self._checkpoint, conversation)

    def differences(self, cases: Sequence[Case]) -> list[float]:
        """At the tokens of each reply, of those tokens and of the likeliest others."""
        found = []
        for case, done in zip(cases, self._generate([c.prompt for c in cases], _longest(cases)), strict=True):
            worst, start = 0.0, len(case.prompt) - 1
            for place, (token, expected) in enumerate(zip(done.ids, case.reply, strict=False)):
                row = case.logprobs[start + place]
                told = [(token, done.logprobs[place]), *done.top_logprobs[place]]
                worst = max(worst, *(abs(float(row[number]) - value) for number, value in told))
                if token != expected:
                    break  # from here on it reads another text than the reference
            found.append(worst)
        return found

    def greedy(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        """The `greedy` strategy's tokens."""
        return [list(done.ids) for done in self._generate(prompts, count)]

    def _generate(self, prompts: Sequence[list[int]], count: int) -> list[Any]:
        sampling = Sampling(strategy="greedy", max_tokens=count, top_logprobs=ALTERNATIVES)
        return self._engine.generate([Request(ids, sampling, seed=0) for ids in prompts])


class TransformersReader(Reader):
    """transformers: its tokenizer, its chat template, its model class in float32, its `generate`."""

    name = "transformers"
    tolerance = TOLERANCE

    def __init__(self, folder: Path) -> None:
        library: Any = importlib.import_module("transformers")
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        self._tokenizer = library.AutoTokenizer.from_pretrained(folder)
        self._model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, conversation: Conversation) -> list[int]:
        """By `apply_chat_template`; a base model's text by the tokenizer alone, after the same first token."""
        if self._tokenizer.chat_template is None:
            ids = self._tokenizer(plain_text(conversation))["input_ids"]
            begins = ids[:1] == [self._tokenizer.bos_token_id]
            return ids if begins else [self._tokenizer.eos_token_id, *ids]
        rows, tools = template_rows(conversation.messages), list(conversation.tools) or None
        return self._tokenizer.apply_chat_template(rows, tools, add_generation_prompt=True, return_dict=True)["input_ids"]

    @torch.no_grad()
    def differences(self, cases: Sequence[Case]) -> list[float]:
        """Of a full forward pass, at every token."""
        return [largest_difference(self._model(torch.tensor([case.ids])).logits[0], case) for case in cases]

    def greedy(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        """By `generate` without sampling."""
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        replies = []
        for ids in prompts:
            given = torch.tensor([ids])
            out = self._model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, **plain)
            replies.append(out[0, len(ids) :].tolist())
        return replies


@functools.cache
def _llama_cpp() -> tuple[Any, Any]:
    """llama-cpp-python with a silent log, as it shows llama.cpp's warnings unasked; and the function that is called instead."""
    library: Any = importlib.import_module("llama_cpp")
    silent = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(silent, None)
    return library, silent


class LlamaCppReader(Reader):
    """llama.cpp through llama-cpp-python, with keys and values in float32: what differs is the file and the program."""

    def __init__(self, path: Path, precision: str, context: int, threads: int, tokenizer: Tokenizer) -> None:
        library, _ = _llama_cpp()
        exact = {"type_k": library.GGML_TYPE_F32, "type_v": library.GGML_TYPE_F32}
        settings = {"n_ctx": context, "logits_all": True, "verbose": False, "n_threads": threads}
        self._llama = library.Llama(str(path), **settings, **exact)
        self.name, self.tolerance = f"llama.cpp {precision}", LLAMA_CPP_TOLERANCES[precision]
        self._stops, self._start = tokenizer.stop_ids, tokenizer.start_of_text
        self._template = self._formatter(library)

    def _formatter(self, library: Any) -> Callable[..., Any] | None:
        source = self._llama.metadata.get("tokenizer.chat_template")
        if source is None:
            return None
        formats: Any = importlib.import_module("llama_cpp.llama_chat_format")
        names = (self._llama._model.token_get_text(n) for n in (self._llama.token_eos(), self._llama.token_bos()))
        end, begin = names
        return formats.Jinja2ChatFormatter(source, eos_token=end, bos_token=begin)

    def ids(self, conversation: Conversation) -> list[int]:
        """By the template in the file; a base model's text after the same first token."""
        if self._template is None:
            text = plain_text(conversation).encode()
            return [self._start, *self._llama.tokenize(text, add_bos=False, special=False)]
        rows, tools = template_rows(conversation.messages), list(conversation.tools) or None
        text = self._template(messages=rows, tools=tools).prompt
        return self._llama.tokenize(text.encode(), add_bos=False, special=True)

    def differences(self, cases: Sequence[Case]) -> list[float]:
        """Of one evaluation of the whole text, at every token."""
        return [largest_difference(self._logits(case.ids), case) for case in cases]

    def greedy(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        """Token by token from its cache."""
        replies = []
        for ids in prompts:
            reply = [int(self._logits(ids)[-1].argmax())]
            while len(reply) < count and reply[-1] not in self._stops:
                self._llama.eval(reply[-1:])
                reply.append(int(np.argmax(self._llama.scores[self._llama.n_tokens - 1])))
            replies.append(reply)
        return replies

    def _logits(self, ids: Sequence[int]) -> Tensor:
        self._llama.reset()
        self._llama.eval(list(ids))
        return torch.from_numpy(np.array(self._llama.scores[: len(ids)]))


def open_readers(
    checkpoint: Checkpoint, folder: Path, workplace: Path, precision: Precision, threads: int = 1
) -> tuple[list[Reader], dict[str, str]]:
    """Everybody who can read this checkpoint here, and why others can't.

    Args:
        folder: of the checkpoint.
        workplace: where the GGUF file is put.
        precision: of the GGUF file.
    """
    readers: list[Reader] = [EngineReader(checkpoint)]
    absent: dict[str, str] = {}
    if importlib.util.find_spec("transformers") is None:
        absent["transformers"] = "not installed"
    elif _is_own_form(folder):
        absent["transformers"] = "no family of transformers says all of this configuration"
    else:
        readers.append(TransformersReader(_whole(checkpoint, folder, workplace)))
    if importlib.util.find_spec("llama_cpp") is None:
        absent["llama.cpp"] = "not installed (pip install llama-cpp-python)"
    else:
        try:
            export_gguf(checkpoint, workplace / "model.gguf", precision)
            context = checkpoint.model.config.context
            readers.append(LlamaCppReader(workplace / "model.gguf", precision, context, threads, checkpoint.tokenizer))
        except UserError as error:
            absent["llama.cpp"] = str(error)
    return readers, absent


def _whole(checkpoint: Checkpoint, folder: Path, workplace: Path) -> Path:
    """The folder, or our export of one that others made: for some classes of tokenizers transformers makes rules of its own."""
    if (folder / "nestling.json").exists():
        return folder
    save(workplace / "exported", checkpoint.model, checkpoint.tokenizer)
    return workplace / "exported"


def _is_own_form(folder: Path) -> bool:
    return str(read_json(folder / "config.json").get("model_type")).startswith(OWN_FORM)


def _longest(cases: Sequence[Case]) -> int:
    return max(len(case.reply) for case in cases)
