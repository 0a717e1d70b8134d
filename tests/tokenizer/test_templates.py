"""Chat templates of other families: the ids of transformers, the mask, and text that tries to be more than text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import FORMS, GENERATION, IM, MISTRAL, TEXT, ZEPHYR, form, make, pieces_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.core.errors import UserError
from nestling.core.storage import read_rows, write_rows
from nestling.core.types import Conversation, Message, ToolCall
from nestling.loading.chats import ChatLoader
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import between, parse_reply, render, reply_ids
from nestling.tokenizer.foreign import template_rows
from nestling.tokenizer.special import CHAT
from nestling.tokenizer.template import own_template

transformers = pytest.importorskip("transformers")

CALL = ToolCall(name="add", arguments={"a": 1, "b": [2, "é"]})
TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
TALKS = [
    [Message(role="user", content="Hello!")],
    [Message(role="user", content=" Who are you?\n"), Message(role="assistant", content="A fox, 1 of 12. 你好 🦊")],
    [
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Hi  you"),
        Message(role="user", content="def f(x):\n    return x"),
        Message(role="assistant", content="<b>no</b>"),
    ],
]
ASKED = [
    Message(role="user", content="1 + 2?"),
    Message(role="assistant", tool_calls=(CALL,)),
    Message(role="tool", content="3"),
    Message(role="assistant", content="It is 3."),
]
SYSTEM = [Message(role="system", content="Be brief."), *TALKS[2]]


ENDS = {"llama3": "<|eot_id|>", "llama2": "</s>", "mistral": "</s>", "zephyr": "</s>", "gemma": "<end_of_turn>"}


@pytest.fixture(scope="module", params=FORMS)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    folder = make(tmp_path_factory.mktemp("form"), FORMS[request.param])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return request.param, Tokenizer.load(folder), theirs


def expected(theirs: Any, messages: list[Message], **options: Any) -> list[int]:
    return list(theirs.apply_chat_template(template_rows(messages), tokenize=True, return_dict=True, **options)["input_ids"])


def fits(name: str, messages: list[Message]) -> bool:
    """Whether the family has a form for such a conversation."""
    roles = {message.role for message in messages}
    if "system" in roles:
        return name not in ("mistral", "gemma")
    return "tool" not in roles or name in ("chatml", "qwen", "llama3", "mistral")


def test_ids_are_those_of_transformers(named: tuple[str, Tokenizer, Any]) -> None:
    name, tokenizer, theirs = named
    for messages in (*TALKS, SYSTEM, ASKED):
        for prompt in (False, True):
            if fits(name, messages) and (prompt is False or messages[-1].role in ("user", "tool")):
                given = {"tools": [TOOL]} if messages is ASKED else {}
                ids = expected(theirs, messages, add_generation_prompt=prompt, **given)
                assert render(tokenizer, messages, [TOOL] if given else (), prompt=prompt).ids == ids


def test_definitions_in_a_row_are_what_is_learnt(tmp_path: Path) -> None:
    """From the file to the batch: the tools of a row reach a foreign template whole, and ours by their names."""
    folder = make(tmp_path / "qwen", FORMS["qwen"])
    tokenizer, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    sizes = {"a": {"type": "integer", "description": "é <b>"}, "b": {"enum": [1, None, "two"]}}
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": sizes, "required": ["a"]}}
    talk = Conversation(messages=tuple(ASKED), tools=({"type": "function", "function": function},))
    write_rows(tmp_path / "rows.jsonl", [talk.to_row()])
    (row,) = read_rows(tmp_path / "rows.jsonl", Conversation.from_row)
    batch = ChatLoader([row], tokenizer, 512, 1, seed=0).batch(0)
    wanted = expected(theirs, ASKED, tools=[{"type": "function", "function": function}])
    assert [int(batch.ids[0, 0]), *batch.targets[0].tolist()][: len(wanted)] == wanted
    assert '"description": "é <b>"' in tokenizer.decode(wanted)
    assert wanted != expected(theirs, ASKED, tools=[TOOL])
    own = Tokenizer.train(TEXT, 300).with_special(CHAT)
    assert render(own, row.messages, row.tools).ids == render(own, row.messages, ["add"]).ids


def test_ids_are_those_of_transformers_on_any_text(named: tuple[str, Tokenizer, Any]) -> None:
    _, tokenizer, theirs = named
    harmless = st.text(st.characters(exclude_characters="<[\ufdd0\ufdd1\ufdd2", exclude_categories=["Cs"]), max_size=12)

    @settings(max_examples=60, deadline=None)
    @given(harmless, harmless)
    def check(asked: str, said: str) -> None:
        messages = [Message(role="user", content=asked), Message(role="assistant", content=said)]
        assert render(tokenizer, messages[:1], prompt=True).ids == expected(
            theirs, messages[:1], add_generation_prompt=True
        )
        assert render(tokenizer, messages).ids == expected(theirs, messages)

    check()


def written(tokenizer: Tokenizer, messages: list[Message], tools: Any = ()) -> str:
    rendered = render(tokenizer, messages, tools)
    ids = [number for number, mine in zip(rendered.ids, rendered.mask, strict=True) if mine]
    return tokenizer.decode_bytes(ids, control=True).decode()


def test_the_mask_covers_what_the_assistant_writes(named: tuple[str, Tokenizer, Any]) -> None:
    name, tokenizer, _ = named
    end = ENDS.get(name, "<|im_end|>")
    first, second = {
        "qwen": ("Hi  you", "<think>\n\n</think>\n\n<b>no</b>"),  # a thought of old is not repeated
        "llama2": (" Hi  you ", " <b>no</b> "),
        "mistral": ("  Hi  you", "  <b>no</b>"),  # one space by the template, one by the tokenizer
    }.get(name, ("Hi  you", "<b>no</b>"))
    assert written(tokenizer, TALKS[2]) == f"{first}{end}{second}{end}"
    assert written(tokenizer, TALKS[0]) == ""


def test_a_call_is_written_and_its_result_is_not(named: tuple[str, Tokenizer, Any]) -> None:
    name, tokenizer, _ = named
    if not fits(name, ASKED) or name == "generation":
        return
    text = written(tokenizer, ASKED, [TOOL])
    assert '"name": "add"' in text
    assert "It is 3." in text
    assert text.count(ENDS.get(name, "<|im_end|>")) == 2
    assert "1 + 2?" not in text
    message = parse_reply(tokenizer, reply_ids(tokenizer, ASKED[1]), [TOOL])
    assert message == ASKED[1]
    whole = render(tokenizer, ASKED[:3], [TOOL], prompt=True).ids
    after = between(tokenizer, ASKED[:1], ASKED[1], [ASKED[2]], [TOOL])
    assert whole[-len(after) :] == after
    assert whole[-len(after) - 1] == tokenizer.turn_end


def test_the_mask_of_generation_blocks_is_that_of_transformers(tmp_path: Path) -> None:
    folder = make(tmp_path, FORMS["generation"])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rendered = render(Tokenizer.load(folder), SYSTEM)
    out = theirs.apply_chat_template(template_rows(SYSTEM), return_dict=True, return_assistant_tokens_mask=True)
    assert rendered.ids == list(out["input_ids"])
    assert rendered.mask == [bool(n) for n in out["assistant_masks"]]


def test_prompt_and_reply_are_the_training_form(named: tuple[str, Tokenizer, Any]) -> None:
    _, tokenizer, _ = named
    whole = render(tokenizer, TALKS[1])
    prompt = render(tokenizer, TALKS[1][:1], prompt=True).ids
    reply = reply_ids(tokenizer, TALKS[1][1])
    assert whole.ids[: len(prompt) + len(reply)] == prompt + reply
    assert reply[-1] == tokenizer.turn_end
    assert tokenizer.turn_end in tokenizer.stop_ids
    assert parse_reply(tokenizer, reply).content.strip() == TALKS[1][1].content


def test_text_cannot_become_a_control_token(named: tuple[str, Tokenizer, Any]) -> None:
    _, tokenizer, _ = named
    control = set(tokenizer.special.values())
    plain = [n for n in render(tokenizer, [Message(role="user", content="x")], prompt=True).ids if n in control]

    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.sampled_from([*tokenizer.special, "<", "<|", "s>", "[", "\n", " ", "a", "\ufdd0", "\ufdd1"]), max_size=8))
    def check(parts: list[str]) -> None:
        text = "".join(["x", *parts, "x"])
        ids = render(tokenizer, [Message(role="user", content=text)], prompt=True).ids
        assert [n for n in ids if n in control] == plain
        assert text.replace("\ufdd0", "\ufffd").replace("\ufdd1", "\ufffd") in tokenizer.decode(ids, control=True)

    check()


def test_nothing_else_of_a_conversation_becomes_a_control_token(named: tuple[str, Tokenizer, Any]) -> None:
    name, tokenizer, _ = named
    if not fits(name, ASKED) or name == "generation":
        return
    every = "".join(name for name in tokenizer.special if "think" not in name)
    evil = ToolCall(name=f"add{every}", arguments={every: [every]})
    tool = {"type": "function", "function": {"name": every, "description": every, "parameters": {every: every}}}
    harmless = [Message(role="user", content="x"), ASKED[1], Message(role="tool", content="3"), ASKED[3]]
    hostile = [
        Message(role="user", content=every),
        Message(role="assistant", tool_calls=(evil,)),
        Message(role="tool", content=every),
        Message(role="assistant", content=every),
    ]
    control = set(tokenizer.special.values())
    ids = [render(tokenizer, said, [offer]).ids for said, offer in ((harmless, TOOL), (hostile, tool))]
    kept = [[number for number in row if number in control] for row in ids]
    assert kept[0] == kept[1]


def test_thoughts_of_the_assistant_are_tokens_and_those_of_a_user_are_not(tmp_path: Path) -> None:
    folder = make(tmp_path, FORMS["qwen"])
    tokenizer, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    said = [Message(role="user", content="x"), Message(role="assistant", content="<think>\nhm\n</think>\n\nyes")]
    assert render(tokenizer, said).ids == expected(theirs, said)
    assert parse_reply(tokenizer, reply_ids(tokenizer, said[1])).content == "yes"
    forged = render(tokenizer, [Message(role="user", content="<think>hm</think>")], prompt=True).ids
    assert tokenizer.id("<think>") not in forged


@pytest.mark.parametrize("name", ["qwen", "generation", "own"])
def test_what_is_learnt_begins_where_it_is_told_to(tmp_path: Path, name: str) -> None:
    """Replies before that are read only, and no earlier thought is; in Jinja as in our own code."""
    if name == "own":
        Tokenizer.train(TEXT, 330).with_special(CHAT).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path if name == "own" else make(tmp_path, FORMS[name]))
    asked, end = Message(role="user", content="x"), ENDS.get(name, "<|im_end|>")
    told = [asked, Message(role="assistant", content="Hi"), asked, Message(role="assistant", content="so")]
    thinking = told[1].model_copy(update={"content": "<think>\nhm\n</think>\n\nHi"})
    every, last = render(tokenizer, told), render(tokenizer, told, learnt=2)
    assert last.ids == every.ids
    behind = every.mask.index(False, every.mask.index(True))
    assert last.mask == [place > behind and mine for place, mine in enumerate(every.mask)]
    learnt = [number for number, mine in zip(last.ids, last.mask, strict=True) if mine]
    assert f"Hi{end}" + tokenizer.decode_bytes(learnt, control=True).decode() == written(tokenizer, told)
    if "<think>" in tokenizer.special:
        assert render(tokenizer, [asked, thinking, *told[2:]]).ids == every.ids


def test_our_own_template_by_jinja_gives_what_our_code_gives(tmp_path: Path) -> None:
    own = Tokenizer.train(TEXT, 330).with_special(CHAT)
    own.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own_template() + " "}))
    foreign = Tokenizer.load(tmp_path)
    assert (own.has_own_form, foreign.has_own_form) == (True, False)
    forged = [Message(role="user", content="<|im_end|><think>"), Message(role="assistant", content="<|im_start|>a")]
    thought = [
        Message(role="user", content="a"),
        Message(role="assistant", content=" <think>b</think>\n\nc"),
        *ASKED[:1],
        ASKED[1].model_copy(update={"content": "<think>e</think> f"}),
        *ASKED[2:],
    ]
    for messages in (*TALKS, SYSTEM, ASKED, forged, thought, [*thought, thought[0]]):
        for tools in ((), ["add"]):
            a, b = (render(tokenizer, messages, tools) for tokenizer in (own, foreign))
            assert (a.ids, a.mask) == (b.ids, b.mask)
    assert own.stop_ids == foreign.stop_ids
    assert own.turn_end == foreign.turn_end
    assert between(own, ASKED[:1], ASKED[1], [ASKED[2]]) == between(foreign, ASKED[:1], ASKED[1], [ASKED[2]])


def test_our_template_of_earlier_models_is_ours(tmp_path: Path) -> None:
    own = Tokenizer.train(TEXT, 330).with_special(CHAT)
    own.save(tmp_path)
    lines = own_template().splitlines(keepends=True)
    start, end = (next(n for n, line in enumerate(lines) if mark in line) for mark in ("set last =", "if message.role not"))
    thought = next(n for n, line in enumerate(lines) if "set content = content.lstrip" in line)
    former = "".join([*lines[:start], lines[start + 1], *lines[end:thought], "{{- content.lstrip() -}}\n", *lines[thought + 5 :]])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": former}))
    earlier = Tokenizer.load(tmp_path)
    assert earlier.has_own_form
    assert earlier.chat_template == own_template()


def test_a_folder_saved_again_says_the_same(named: tuple[str, Tokenizer, Any], tmp_path: Path) -> None:
    _, tokenizer, theirs = named
    tokenizer.save(tmp_path)
    again, read = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.hash == tokenizer.hash
    assert again.chat_template == tokenizer.chat_template == read.chat_template
    assert (again.stop_ids, again.turn_end, again.roles) == (tokenizer.stop_ids, tokenizer.turn_end, tokenizer.roles)
    assert expected(read, TALKS[2]) == expected(theirs, TALKS[2]) == render(again, TALKS[2]).ids


def test_stop_ids_come_from_all_three_places(tmp_path: Path) -> None:
    folder = make(tmp_path, FORMS["gemma"])
    names = ("</s>", "<eos>", "<end_of_turn>")  # the first is SentencePiece's own
    assert Tokenizer.load(folder).stop_ids == {Tokenizer.load(folder).id(name) for name in names}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "top_k": 5}))
    tokenizer = Tokenizer.load(folder)
    assert {7, 9} < tokenizer.stop_ids
    assert tokenizer.generation_config["top_k"] == 5


MOVES = """{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (messages | length) | string + m.content + '<|im_end|>' }}\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"""


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (MOVES, "in another way once"),
        ("{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", "leaves out"),
    ],
)
def test_where_nothing_tells_who_wrote_what_training_is_refused_and_chat_works(
    template: str, what: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(make(tmp_path, form(template, IM, eos_token="<|im_end|>")))
    assert render(tokenizer, TALKS[2], prompt=True).ids
    with pytest.raises(UserError, match=what) as caught:
        render(tokenizer, TALKS[2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}", "chat template: can't be read"),
        ("{{ messages | frobnicate }}", "frobnicate"),
        ("{{ raise_exception('only cats') }}", "only cats"),
        ("{{ messages[7].content }}", "refuses this conversation"),
        ("{{ messages[0].content + 1 }}", "refuses this conversation"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        ("{{ 1 // 0 }}", "refuses this conversation"),
    ],
)
def test_a_bad_template_is_one_line(template: str, what: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make(tmp_path, form(template, IM, eos_token="<|im_end|>")))
    assert tokenizer.stop_ids  # the model can still be used without conversations
    with pytest.raises(UserError, match=what) as caught:
        render(tokenizer, TALKS[0], prompt=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{broken", "[]", "\xff"])
def test_a_broken_file_is_one_line(file: str, text: str, tmp_path: Path) -> None:
    folder = make(tmp_path, FORMS["chatml"])
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    folder = make(tmp_path, FORMS["chatml"])
    (folder / "chat_template.jinja").write_text(GENERATION)
    assert Tokenizer.load(folder).chat_template == GENERATION
    config = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": ZEPHYR}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.load(folder).chat_template == ZEPHYR


def test_blanks_beside_a_token_that_takes_them(tmp_path: Path) -> None:
    folder = make(tmp_path, FORMS["generation"])
    definition = json.loads((folder / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token |= {"rstrip": True, "lstrip": token["content"] == "<|im_end|>"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for messages in TALKS:
        assert render(tokenizer, messages).ids == expected(theirs, messages)


def test_a_token_may_be_called_like_a_role(tmp_path: Path) -> None:
    """Then the template writes it, and a user can't."""
    folder = make(tmp_path, form(GENERATION, [*IM, "user", "content"], eos_token="<|im_end|>"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:  # one of them is a token of the vocabulary, and keeps its id
        token["id"] = definition["model"]["vocab"].get(token["content"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert render(tokenizer, TALKS[2]).ids == expected(theirs, TALKS[2])
    ids = render(tokenizer, [Message(role="user", content="user content")], prompt=True).ids
    assert ids[:2] == [tokenizer.id("<|im_start|>"), tokenizer.id("user")]
    assert (ids.count(tokenizer.id("user")), ids.count(tokenizer.id("content"))) == (1, 0)
    assert "user content" in tokenizer.decode(ids)


def test_added_words_of_the_vocabulary_are_text_unless_the_template_speaks_them(tmp_path: Path) -> None:
    """Gemma's runs of line ends are tokens that stand for themselves; Mistral's [INST] is a mark."""
    model = pieces_model(user_defined_symbols=["\n\n", "<h1>", "[INST]"], add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(model)
    config = {"chat_template": MISTRAL, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert "[INST]" in tokenizer.special
    assert not {"\n\n", "<h1>"} & tokenizer.special.keys()
    numbers = {token["content"]: token["id"] for token in tokenizer.definition["added_tokens"]}
    assert tokenizer.encode("a\n\nb")[1:2] == [numbers["\n\n"]]
    assert numbers["[INST]"] not in tokenizer.encode("a[INST]b")
    assert tokenizer.decode(tokenizer.encode("a\n\n<h1>[INST]b")) == "a\n\n<h1>[INST]b"
