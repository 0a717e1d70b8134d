"""Checkpoints of other programs, written here after their published layouts and read back: logits as theirs."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nestling.core.errors import UserError
from nestling.interop.foreign_tokenizer import find_tokenizer
from nestling.interop.importing import import_checkpoint
from nestling.model import checkpoint
from nestling.tokenizer.bpe import Tokenizer

VOCAB, CONTEXT = 300, 16
TEXT = "Once upon a time there was a small fox, and the fox said: 12 + 7 = 19!"
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer of VOCAB ids or fewer."""
    (tmp_path / "source").mkdir()
    Tokenizer.train([TEXT] * 9, 290).save(tmp_path / "source")
    return tmp_path / "source"


def gpt2(heads: int = 4, width: int = 32, **changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": width, "n_layer": 2, "n_head": heads}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **changes)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def ids(vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (2, CONTEXT), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same(found: checkpoint.Checkpoint, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.model(ids(wanted.shape[-1])), wanted, rtol=0, atol=tolerance * float(wanted.abs().max())
    )


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("described", [False, True])
@torch.no_grad()
def test_gpt2_names_with_and_without_config(folder: Path, prefix: str, described: bool) -> None:
    """pytorch_model.bin as it was published: no prefix, masks among the tensors, the sizes of heads known or 64."""
    model = gpt2(width=128, heads=2)
    state = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    state = {prefix + name: value for name, value in state.items() if name != "lm_head.weight"}
    state |= {f"{prefix}h.{n}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for n in range(2)}
    torch.save(state, folder / "pytorch_model.bin")
    if described:
        model.config.save_pretrained(folder)
    found, source = import_checkpoint(folder)
    assert_same(found, model(ids()).logits)
    assert "gpt2" in source.kind or "GPT-2" in source.kind


@torch.no_grad()
def test_parts_with_an_index(folder: Path) -> None:
    model = gpt2()
    model.config.save_pretrained(folder)
    names = sorted(model.transformer.state_dict())
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: model.transformer.state_dict()[name] for name in part}, folder / file)
    where = {name: file for file, part in halves.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same(import_checkpoint(folder)[0], model(ids()).logits)


def nanogpt(folder: Path, network: GPT2LMHeadModel, bias: bool = True, **more: Any) -> None:
    """What nanoGPT's train.py saves of a compiled model: Linear instead of Conv1D, so every matrix the other way round."""
    state = {}
    for name, value in network.state_dict().items():
        if bias or not name.endswith("bias"):
            state[f"_orig_mod.{name}"] = value.T.contiguous() if name.endswith(TURNED) else value
    config = network.config
    args = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "block_size": CONTEXT}
    args |= {"bias": bias, "vocab_size": config.vocab_size, "dropout": 0.1}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    saved = {
        "model": state,
        "optimizer": optimizer,
        "model_args": args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.0),
    }
    torch.save({**saved, "config": {"out_dir": "out", "compile": True}, **more}, folder / "ckpt.pt")


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@torch.no_grad()
def test_nanogpt(folder: Path, activation: str) -> None:
    model = gpt2(activation_function=activation)
    nanogpt(folder, model)
    found, source = import_checkpoint(folder, activation="" if activation == "gelu" else activation)
    assert_same(found, model(ids()).logits)
    assert source.kind == "nanoGPT checkpoint"
    assert found.model.config.tied
    assert found.model.config.dropout == 0.1


@torch.no_grad()
def test_nanogpt_without_biases(folder: Path) -> None:
    model = gpt2(activation_function="gelu")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    nanogpt(folder, model, bias=False)
    assert_same(import_checkpoint(folder / "ckpt.pt")[0], model(ids()).logits)


@torch.no_grad()
def test_what_was_imported_opens_in_transformers(folder: Path, tmp_path: Path) -> None:
    model = gpt2(activation_function="gelu")
    nanogpt(folder, model)
    found, _ = import_checkpoint(folder)
    checkpoint.save(tmp_path / "out", found.model, found.tokenizer, found.provenance)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    assert_same(checkpoint.load(tmp_path / "out"), model(ids()).logits)


@torch.no_grad()
def test_characters_of_nanogpt(tmp_path: Path) -> None:
    """meta.pkl, in every form that Python's pickle gives it, without an id for the end of a text."""
    characters = sorted(set(TEXT + "\n☃"))
    table = dict(enumerate(characters))
    meta = {"vocab_size": len(table), "itos": table, "stoi": {text: n for n, text in table.items()}}
    for protocol in (1, 2, 3, 4, 5):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        tokenizer = find_tokenizer(tmp_path)
        assert tokenizer.vocab_size == len(characters)
        assert tokenizer.encode(TEXT) == [meta["stoi"][text] for text in TEXT]
        assert tokenizer.decode(tokenizer.encode("☃\n")) == "☃\n"


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "x": Harm()}))
    with pytest.raises(UserError, match="would do more than hold data"):
        find_tokenizer(tmp_path)
    torch.save({"model": {}, "x": Harm()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        import_checkpoint(tmp_path)
    assert not (tmp_path / "harm").exists()


# --- llama2.c --------------------------------------------------------------------------------------------------------

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB, "max_seq_len": CONTEXT}
HIDDEN = 48


def llama2c_state(tied: bool) -> dict[str, Tensor]:
    """A state dict as llama2.c's model.py has it."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)

    state = {"tok_embeddings.weight": drawn(VOCAB, 32), "norm.weight": drawn(32)}
    shapes = {"attention.wq": (32, 32), "attention.wk": (16, 32), "attention.wv": (16, 32), "attention.wo": (32, 32)}
    shapes |= {"feed_forward.w1": (HIDDEN, 32), "feed_forward.w2": (32, HIDDEN), "feed_forward.w3": (HIDDEN, 32)}
    shapes |= {"attention_norm": (32,), "ffn_norm": (32,)}
    for layer in range(2):
        state |= {f"layers.{layer}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    return state | {"output.weight": state["tok_embeddings.weight"] if tied else drawn(VOCAB, 32)}


def llama2c_forward(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """What run.c computes, token by token in float64: neighbours (0, 1), (2, 3), … of a head are turned together."""
    w = {name.removesuffix(".weight"): value.double().numpy() for name, value in state.items()}
    rows = []
    for row in tokens.tolist():
        keys: list[list[np.ndarray]] = [[], []]
        values: list[list[np.ndarray]] = [[], []]
        for place, token in enumerate(row):
            x = w["tok_embeddings"][token]
            for layer in range(2):
                part = f"layers.{layer}."
                h = rms(x, w[part + "attention_norm"])
                q, k, v = (w[f"{part}attention.w{name}"] @ h for name in "qkv")
                keys[layer].append(turn(k, place))
                values[layer].append(v)
                q, mixed = turn(q, place), np.zeros(32)
                for head in range(4):
                    mine, theirs = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
                    scores = np.array([q[mine] @ k[theirs] for k in keys[layer]]) / np.sqrt(8)
                    share = np.exp(scores - scores.max())
                    mixed[mine] = sum(s * v[theirs] for s, v in zip(share / share.sum(), values[layer], strict=True))
                x = x + w[part + "attention.wo"] @ mixed
                h = rms(x, w[part + "ffn_norm"])
                gate = w[part + "feed_forward.w1"] @ h
                x = x + w[part + "feed_forward.w2"] @ (gate / (1 + np.exp(-gate)) * (w[part + "feed_forward.w3"] @ h))
            rows.append(w["output"] @ rms(x, w["norm"]))
    return torch.tensor(np.array(rows)).view(*tokens.shape, -1).float()


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean() + 1e-5)


def turn(x: np.ndarray, place: int) -> np.ndarray:
    out = x.copy()
    for i in range(0, len(x), 2):
        angle = place / 10000 ** ((i % 8) / 8)
        out[i] = x[i] * np.cos(angle) - x[i + 1] * np.sin(angle)
        out[i + 1] = x[i] * np.sin(angle) + x[i + 1] * np.cos(angle)
    return out


LAYERED = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
           "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]  # fmt: skip


def binary(state: dict[str, Tensor], version: int, tied: bool, group: int = 16) -> bytes:
    """A file of llama2.c's export.py."""
    numbers = [32, HIDDEN, 2, 4, 2, VOCAB if tied or version else -VOCAB, CONTEXT]
    layers = {name: [state[f"layers.{n}.{name}.weight"] for n in range(2)] for name in LAYERED}
    matrices = [state["tok_embeddings.weight"], *(t for name in LAYERED if "norm" not in name for t in layers[name])]
    matrices += [] if tied else [state["output.weight"]]
    norms = [*layers["attention_norm"], *layers["ffn_norm"], state["norm.weight"]]
    if version == 0:
        angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
        parts = [
            matrices[0],
            *(t for name in LAYERED for t in layers[name]),
            state["norm.weight"],
            angles.cos(),
            angles.sin(),
        ]
        return struct.pack("7i", *numbers) + floats(parts + ([] if tied else [matrices[-1]]))
    head = (
        struct.pack("I", 0x616B3432) + struct.pack("i", version) + struct.pack("7i", *numbers) + struct.pack("B", tied)
    )
    if version == 1:
        return head.ljust(256, b"\0") + floats([*norms, *matrices])
    body = floats(norms)
    for matrix in matrices:
        whole, scale = quantised(matrix, group)
        body += whole.to(torch.int8).numpy().tobytes() + floats([scale])
    return (head + struct.pack("i", group)).ljust(256, b"\0") + body


def floats(tensors: list[Tensor]) -> bytes:
    return b"".join(tensor.float().contiguous().numpy().tobytes() for tensor in tensors)


def quantised(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    rows = matrix.reshape(-1, group)
    scale = rows.abs().amax(1) / 127
    return (rows / scale[:, None]).round(), scale


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
@torch.no_grad()
def test_llama2c_binary(folder: Path, version: int, tied: bool) -> None:
    state = llama2c_state(tied)
    (folder / "model.bin").write_bytes(binary(state, version, tied))
    if version == 2:  # its own rounded matrices are what must come out
        rounded = {name: quantised(value, 16) for name, value in state.items() if value.ndim == 2}
        state |= {name: (whole * scale[:, None]).view(state[name].shape) for name, (whole, scale) in rounded.items()}
    found, source = import_checkpoint(folder)
    assert_same(found, llama2c_forward(state, ids()))
    assert source.kind == f"llama2.c file, version {version}"
    assert found.model.config.tied == tied


@torch.no_grad()
def test_llama2c_training_checkpoint_opens_in_transformers(folder: Path, tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": value for name, value in llama2c_state(tied=True).items()}
    args = {**SIZES, "multiple_of": 16, "dropout": 0.0}
    torch.save(
        {"model": state, "model_args": args, "iter_num": 1, "config": {}, "best_val_loss": 2.0}, folder / "ckpt.pt"
    )
    found, _ = import_checkpoint(folder)
    wanted = llama2c_forward(llama2c_state(tied=True), ids())
    assert_same(found, wanted)
    checkpoint.save(tmp_path / "out", found.model, found.tokenizer)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(ids()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(again.config, LlamaConfig)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece model of llama2.c's kind, and the same as its tokenizer.bin."""
    place = tmp_path_factory.mktemp("pieces")
    (place / "text.txt").write_text((TEXT + "\n") * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(place / "text.txt"), model_prefix=str(place / "tokenizer"), vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, split_digits=True, allow_whitespace_only_pieces=True,
        unk_surface=r" \342\201\207 ", normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False,  # as in Llama's own; run.c, which reads tokenizer.bin, never removes any
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(str(place / "tokenizer.model"))
    tokens = []
    for number in range(model.vocab_size()):
        text = {1: "\n<s>\n", 2: "\n</s>\n"}.get(number, model.id_to_piece(number).replace("▁", " "))
        if len(text) == 6 and text.startswith("<0x"):
            text = chr(int(text[3:5], 16))
        tokens.append((text.encode(), model.get_score(number)))
    (place / "bin").mkdir()
    (place / "tok300.bin").symlink_to(place / "bin" / "tokenizer.bin")
    with (place / "bin" / "tokenizer.bin").open("wb") as file:
        file.write(struct.pack("I", max(len(raw) for raw, _ in tokens)))
        for raw, score in tokens:
            file.write(struct.pack("fI", score, len(raw)) + raw)
    return place


@pytest.mark.parametrize("name", ["tokenizer.model", "bin/tokenizer.bin", "bin", "tok300.bin"])
@pytest.mark.parametrize("text", [TEXT, "a fox\nsaid ☃ twice  é", "\x00\x7f"])
def test_tokenizers_of_llama2c(pieces: Path, name: str, text: str) -> None:
    """Ids as SentencePiece gives them, from its own file and from llama2.c's copy of it."""
    reference = sentencepiece.SentencePieceProcessor(str(pieces / "tokenizer.model"))
    tokenizer = find_tokenizer(pieces / name)
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.start_of_text == reference.bos_id()
    assert tokenizer.vocab_size == VOCAB


# --- refusals --------------------------------------------------------------------------------------------------------


def spoilt(folder: Path, name: str) -> None:
    good = binary(llama2c_state(tied=True), 1, tied=True)
    if name == "cut":
        (folder / "model.bin").write_bytes(good[:-5])
    elif name == "long":
        (folder / "model.bin").write_bytes(good + b"1234")
    elif name == "junk":
        (folder / "model.bin").write_bytes(b"nothing that anybody knows" * 40)
    elif name == "version":
        (folder / "model.bin").write_bytes(good[:4] + struct.pack("i", 7) + good[8:])
    elif name == "damaged":
        nanogpt(folder, gpt2())
        whole = (folder / "ckpt.pt").read_bytes()
        (folder / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    elif name == "missing tensor":
        nanogpt(folder, gpt2(), model={"transformer.wte.weight": torch.zeros(VOCAB, 32)})
    elif name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        nanogpt(folder, gpt2())
    elif name == "other names":
        torch.save({"encoder.weight": torch.zeros(2)}, folder / "ckpt.pt")
    elif name == "larger tokenizer":
        model = gpt2()
        model.resize_token_embeddings(200)
        nanogpt(folder, model)
    elif name == "tensorflow":
        (folder / "model.ckpt.data-00000-of-00001").touch()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut", "bytes of tensors instead of"),
        ("long", "bytes of tensors instead of"),
        ("junk", "this is no llama2.c checkpoint"),
        ("version", "this version of llama2.c's files is not known"),
        ("damaged", "damaged"),
        ("missing tensor", "lacks the tensors"),
        ("no tokenizer", "name its file or folder with --tokenizer"),
        ("other names", "unknown names of tensors"),
        ("larger tokenizer", "this tokenizer has 290 ids and the model 200"),
        ("tensorflow", "TensorFlow checkpoints are not read"),
        ("empty", "no checkpoint is here"),
    ],
)
def test_what_is_refused(folder: Path, name: str, words: str) -> None:
    spoilt(folder, name)
    with pytest.raises(UserError, match=words) as caught:
        import_checkpoint(folder)
    assert "\n" not in str(caught.value)
