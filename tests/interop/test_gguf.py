"""GGUF files: read back with the `gguf` package, and computed by llama.cpp where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.interop.gguf import export_gguf
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import build
from nestling.model.hub import make_config
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render
from nestling.tokenizer.special import CALL_START, CHAT, TURN_END, TURN_START
from nestling.tokenizer.template import own_template

gguf = pytest.importorskip("gguf")

TEXT = ["The cat can't sit on 12 mats, and 345 dogs didn't.\n\n  Voilà!\tÇa va? 你好，世界 한국 🦊 I'LL"] * 4
SIZES = {"context": 64, "d_model": 64, "n_layers": 2, "n_heads": 4}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_context": 16}
YARN = {"kind": "yarn", "factor": 4.0, "original_context": 16}
EXPERTS = {"count": 4, "per_token": 2, "d_ff": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"n_kv_heads": 2},
    "llama, biases": {"bias": True, "qkv_bias": True, "tied": True},
    "llama, llama3": {"rope_scaling": LLAMA3},
    "llama, linear": {"rope_scaling": {"kind": "linear", "factor": 3.0}},
    "mistral": {"n_kv_heads": 2, "window": 64},
    "qwen2": {"n_kv_heads": 2},
    "qwen2, yarn": {"rope_scaling": YARN},
    "qwen2, sharper yarn": {"rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}},
    "qwen3": {"n_kv_heads": 2, "head_size": 32},
    "qwen3_moe": {"n_kv_heads": 2, "experts": EXPERTS},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, 300).with_special(CHAT)


def scrambled(tokenizer: Tokenizer, architecture: str, **changes: Any) -> Checkpoint:
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size, "architecture": architecture}
    model = build(make_config({**sizes, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1, generator=generator)
    return Checkpoint(model, tokenizer)


def open_llama(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **exact)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_same_logits(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = scrambled(tokenizer, family.split(",")[0], **FAMILIES[family])
    export_gguf(found, tmp_path / "m.gguf", "f32")
    theirs = open_llama(tmp_path / "m.gguf")
    ids = torch.randint(0, tokenizer.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    theirs.eval(ids.tolist())
    ours = found.model(ids.unsqueeze(0))[0]
    atol = 3e-3 if family == "gpt2" else 2e-4  # llama.cpp looks GELU up in a table of half precision
    torch.testing.assert_close(torch.from_numpy(np.array(theirs.scores[:40])), ours, rtol=0, atol=atol)
    assert ours.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [("f16", 0.003), ("bf16", 0.03), ("q8_0", 0.03)])
def test_smaller_numbers_cost_a_little(precision: Any, tolerance: float, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = scrambled(tokenizer, "qwen3")
    sizes = {}
    for kind in ("f32", precision):
        export_gguf(found, tmp_path / f"{kind}.gguf", kind)
        sizes[kind] = (tmp_path / f"{kind}.gguf").stat().st_size
    assert sizes[precision] < 0.62 * sizes["f32"]
    theirs = open_llama(tmp_path / f"{precision}.gguf")
    ids = list(range(40, 60))
    theirs.eval(ids)
    difference = torch.from_numpy(np.array(theirs.scores[:20])) - found.model(torch.tensor([ids]))[0]
    assert 1e-6 < difference.abs().mean() < tolerance


@pytest.mark.parametrize(("pattern", "digits"), [("gpt4", 1), ("gpt4", 3), ("gpt2", 1)])
def test_llama_cpp_cuts_text_as_we_do(pattern: Any, digits: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TEXT, 330, pattern=pattern, digits=digits).with_special(CHAT)
    export_gguf(scrambled(tokenizer, "llama"), tmp_path / "m.gguf")
    theirs = open_llama(tmp_path / "m.gguf")
    texts = (*TEXT[:1], " 1234567 a\n\n\n b", "we'Ve  it's\r\n\tx", "a  b   c\n", "<|im_end|>", "…。！ ٣٤٥ e\u0301", " ", "")
    for text in texts:
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text), text


def test_a_rendered_conversation_is_read_as_we_render_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export_gguf(scrambled(tokenizer, "llama"), tmp_path / "m.gguf")
    theirs = open_llama(tmp_path / "m.gguf")
    ids = render(tokenizer, [Message(role="user", content="The cat?\n")], prompt=True).ids
    text = tokenizer.decode(ids, control=True)
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
    assert theirs.metadata["tokenizer.chat_template"] == own_template()
    assert theirs.token_eos() == tokenizer.id(TURN_END)


def test_what_stands_in_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = scrambled(tokenizer, "qwen3", vocab_size=tokenizer.vocab_size + 3)
    export_gguf(found, tmp_path / "m.gguf", "q8_0", name="Birdie")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.name").contents() == "Birdie"
    assert reader.get_field("qwen3.context_length").contents() == 64
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert len(tokens) == len(kinds) == tokenizer.vocab_size + 3
    kind = dict(zip(tokens, kinds, strict=True))
    assert (kind[TURN_START], kind[CALL_START], kind["a"], kinds[-1]) == (3, 4, 1, 5)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["blk.0.attn_q.weight"], types["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")
    back = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    np.testing.assert_allclose(back["token_embd.weight"], found.model.embedding.weight.detach(), atol=0.003)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("architecture", "changes", "what"),
    [
        ("gpt1", {}, "the architecture gpt1"),
        ("qwen3", {"positions": "alibi"}, "positions alibi in the graph qwen3"),
        ("gpt2", {"activation": "gelu"}, "activation gelu"),
        ("mistral", {"window": 8}, "a window of 8 in a context of 64"),
        ("llama", {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_context": 32}}, "dynamic RoPE"),
        ("qwen3", {"rope_scaling": LLAMA3}, "Llama 3's RoPE scaling"),
        ("llama", {"rope_scaling": {**YARN, "truncate": False}}, "YaRN without truncation"),
        ("qwen3_moe", {"experts": {**EXPERTS, "normalised": False}}, "don't sum to one"),
        ("qwen3_moe", {"experts": {**EXPERTS, "dense_layers": (1,)}}, "dense layers"),
        ("llama", {"experts": EXPERTS}, "a feed-forward of experts"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    architecture: str, changes: dict[str, Any], what: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=what):
        export_gguf(scrambled(tokenizer, architecture, **changes), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [lambda: Tokenizer.train(TEXT, 300, digits=2), lambda: Tokenizer.characters(TEXT)])
def test_a_way_of_cutting_that_llama_cpp_lacks_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no name for the way"):
        export_gguf(scrambled(make(), "llama"), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def sentencepiece(folder: Path, **changes: Any) -> Tokenizer:
    """A tokenizer as Llama 2's, from a small model of SentencePiece's."""
    library = pytest.importorskip("sentencepiece")
    prefix = str(folder / "tokenizer")
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    settings = {"model_type": "bpe", "vocab_size": 340, "hard_vocab_limit": False, "minloglevel": 2, **plain, **changes}
    library.SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 5), model_prefix=prefix, **settings)
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": LLAMA2}))
    return Tokenizer.load(folder)


LLAMA2 = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_cuts_text_as_sentencepiece_does(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, add_dummy_prefix=prefix)
    export_gguf(scrambled(tokenizer, "llama", vocab_size=tokenizer.vocab_size + 4), tmp_path / "m.gguf")
    theirs = open_llama(tmp_path / "m.gguf")
    texts = (TEXT[0], " 1234567 a\n\n\n b", "  two", "we'Ve\r\n\tx", "🦊 e\u0301 \x07 …。！ ٣", "<|x|> [INST]", " ", "")
    for text in texts:
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text), text
    assert (theirs.token_eos(), theirs.token_bos()) == (tokenizer.id("</s>"), tokenizer.id("<s>"))
    talk = [Message(role="user", content="The cat?"), Message(role="assistant", content="No."), Message(role="user", content="x")]
    ids = render(tokenizer, talk, prompt=True).ids
    text = "<s>[INST] The cat? [/INST] No. </s><s>[INST] x [/INST]"
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
    assert theirs.metadata["tokenizer.chat_template"] == LLAMA2
    assert theirs.metadata["tokenizer.ggml.add_bos_token"] == "true"
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = dict(zip(tokens, reader.get_field("tokenizer.ggml.token_type").contents(), strict=True))
    assert [kinds[name] for name in ("<unk>", "<s>", "<0x41>", "▁")] == [2, 3, 6, 1]


@pytest.mark.parametrize("changes", [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}])
def test_a_sentencepiece_model_that_llama_cpp_lacks_is_refused(changes: Any, tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, **changes)
    with pytest.raises(UserError, match=r"llama\.cpp has no form for SentencePiece models of this kind"):
        export_gguf(scrambled(tokenizer, "llama"), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    """llama.cpp would also join "a" and "bc" where only "ab" and "c" are listed."""
    tokenizer = sentencepiece(tmp_path)
    model = tokenizer.definition["model"]
    left, right = next(pair for pair in model["merges"] if len(pair[0]) > 1)
    model["vocab"][left[1:] + right] = tokenizer.vocab_size
    with pytest.raises(UserError, match="the merges of this tokenizer"):
        export_gguf(scrambled(tokenizer, "llama"), tmp_path / "m.gguf")
