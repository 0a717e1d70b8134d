"""Constrained text from a model that knows nothing: only the constraint can make it valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import jsonschema
import pytest
import torch
from toys.models import random_model

from nestling.core.errors import UserError
from nestling.generation.constraints import Grammars, unpack
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CALL_END, CALL_START, END_OF_TEXT, TURN_END

WORD = {"type": "string", "maxLength": 6}
SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "optional and nested": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog", "Käse ☃", 7, None]},
            "tags": {"type": "array", "items": WORD, "minItems": 1, "maxItems": 3},
            "where": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": False},
        },
        "required": ["kind"],
        "additionalProperties": False,
    },
    "choice of shapes": {
        "anyOf": [
            {"type": "integer", "exclusiveMinimum": 10, "maximum": 99999},
            {"type": "array", "prefixItems": [{"const": "a"}, {"type": "boolean"}], "minItems": 2, "items": False},
            {"$ref": "#/$defs/date"},
        ],
        "$defs": {"date": {"type": "string", "format": "date"}},
    },
    "patterns": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "n": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
        },
        "required": ["id", "n"],
        "additionalProperties": False,
    },
}  # fmt: skip


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(random_model(tokenizer.vocab_size), tokenizer, rows=64)


def write(engine: Engine, constraint: dict | None, count: int = 1, **settings: object) -> list[Completion]:
    sampling = Sampling(constraint=constraint, **{"max_tokens": 200, **settings})
    return engine.generate([Request([1, 3, 2], sampling, seed) for seed in range(count)])


@pytest.mark.parametrize("name", SCHEMAS)
def test_fifty_texts_of_a_schema_are_valid(engine: Engine, name: str) -> None:
    found = write(engine, {"json_schema": SCHEMAS[name]}, 50)
    for done in found:
        assert done.finish == "stop"
        jsonschema.validate(json.loads(done.text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    assert len({done.text for done in found}) > 12


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"strategy": "greedy"},
        {"top_p": 0.3, "temperature": 2.0},
        {"top_k": 1},
        {"typical_p": 0.1},
        {"eta_cutoff": 0.5, "frequency_penalty": 2.0},
        {"logit_bias": {5: 100.0, 34: -100.0}},
        {"strategy": "beam"},
        {"strategy": "stochastic_beam"},
        {"strategy": "contrastive"},
    ],
    ids=str,
)
def test_every_way_of_decoding_obeys(engine: Engine, settings: dict) -> None:
    found = write(engine, {"json_schema": SCHEMAS["person"]}, 3, **settings)
    assert [done.finish for done in found] == ["stop"] * 3
    whole = [text for done in found for text in (done, *done.others) if text.finish == "stop"]
    person = jsonschema.Draft202012Validator(SCHEMAS["person"])
    assert [text.text for text in whole if not person.is_valid(json.loads(text.text))] == []


@pytest.mark.parametrize("regex", ["[a-c]{3,9}-(x|yy)", "(0|[1-9][0-9]{0,5})\\.[0-9]{2}", "é{2}|☃{1,3}", "a?"])
def test_regex(engine: Engine, regex: str) -> None:
    for done in write(engine, {"regex": regex}, 10):
        assert done.finish == "stop"
        assert re.fullmatch(regex, done.text)


def test_choice_takes_each(engine: Engine) -> None:
    choices = ["yes", "no", "no way", 'with "quotes"\nand lines', "日本"]
    found = {done.text for done in write(engine, {"choice": choices}, 60, temperature=3.0)}
    assert found == set(choices)


def test_lark_grammar(engine: Engine) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)+\nNUMBER: /[1-9][0-9]?/'
    for done in write(engine, {"grammar": grammar}, 10, max_tokens=250, logit_bias={43: -6.0}):  # 43: "+"
        if done.finish == "stop":
            assert re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)+", done.text)
        else:
            assert re.fullmatch(r"([1-9][0-9]?\+?)+", done.text)


def test_any_json_object(engine: Engine) -> None:
    done = [done for done in write(engine, {"json_object": True}, 30, max_tokens=250) if done.finish == "stop"]
    assert len(done) > 5
    assert all(isinstance(json.loads(text.text), dict) for text in done)


def test_neighbours_are_not_touched(engine: Engine, tokenizer: Tokenizer) -> None:
    """Constrained and free requests in one batch write what each writes alone."""
    kinds = [None, {"json_schema": SCHEMAS["person"]}, None, {"choice": ["yes", "no"]}, {"regex": "[ab]{9}"}]
    requests = [Request([7, 8], Sampling(constraint=kind, max_tokens=60), seed) for seed, kind in enumerate(kinds * 3)]
    alone = [engine.generate([request])[0] for request in requests]
    assert [done.ids for done in engine.generate(requests)] == [done.ids for done in alone]
    assert tokenizer.decode(alone[0].ids) != tokenizer.decode(alone[5].ids)


# ---- where a text ends ----


def test_a_finished_text_ends_at_once(engine: Engine, tokenizer: Tokenizer) -> None:
    """No stop token is written, or needed, where nothing else can follow."""
    sampling = Sampling(constraint={"regex": "abc"})
    done = engine.generate([Request([5], sampling, stop_ids=frozenset())])[0]
    assert (done.text, done.finish) == ("abc", "stop")
    assert tokenizer.decode(done.ids) == "abc"


def test_a_stop_token_comes_where_the_text_may_end(engine: Engine, tokenizer: Tokenizer) -> None:
    end = tokenizer.id(TURN_END)
    found = write(engine, {"regex": "(ab)+"}, 20, logit_bias={end: 5.0})
    assert {done.ids[-1] for done in found} == {end}
    assert all(re.fullmatch("(ab)+", done.text) for done in found)
    longer = write(engine, {"regex": "(ab)+"}, 5, min_tokens=10, logit_bias={end: 100.0})
    assert all(len(done.ids) > 10 and re.fullmatch("(ab)+", done.text) for done in longer)


def test_a_cut_text_says_so(engine: Engine) -> None:
    done = write(engine, {"regex": "[ab]{50}"}, max_tokens=8)[0]
    assert done.finish == "length"
    assert re.fullmatch("[ab]{1,49}", done.text)


def test_a_stop_text_still_ends_it(engine: Engine) -> None:
    done = write(engine, {"regex": "[ab]{20}c"}, stop=("b",))[0]
    assert (done.finish, set(done.text) <= {"a"}) == ("stop", True)


# ---- control tokens ----


def test_text_is_never_a_control_token(engine: Engine, tokenizer: Tokenizer) -> None:
    control = set(tokenizer.special.values()) - {tokenizer.id(TURN_END), tokenizer.id(END_OF_TEXT)}
    bias = dict.fromkeys(control, 100.0)
    for done in write(engine, {"regex": "(.|\n){30,60}"}, 10, logit_bias=bias):
        assert not control & set(done.ids)


def test_a_grammar_may_name_control_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"name": {"const": "calculator"}}, "required": ["name"]}
    grammar = f"start: {CALL_START} %json {json.dumps(schema | {'additionalProperties': False})} {CALL_END}"
    done = write(engine, {"grammar": grammar})[0]
    assert (done.ids[0], done.ids[-1], done.finish) == (tokenizer.id(CALL_START), tokenizer.id(CALL_END), "stop")
    assert json.loads(done.text) == {"name": "calculator"}


def test_what_a_tool_answers_is_not_checked(engine: Engine, tokenizer: Tokenizer) -> None:
    """After a complete call its result is forced, and the model goes on freely."""
    result = tokenizer.encode("= 801")

    def answer(ids: list[int]) -> list[int] | None:
        return result if ids[-1] == tokenizer.id(CALL_END) else None

    sampling = Sampling(constraint={"grammar": f'start: {CALL_START} "12" {CALL_END}'}, max_tokens=12)
    done = engine.generate([Request([5], sampling, interject=answer, stop_ids=frozenset())])[0]
    assert done.text.startswith("12= 801")
    assert sum(done.sampled) == 12
    streamed = "".join(engine.stream(Request([5], sampling, interject=answer, stop_ids=frozenset())))
    assert streamed == "12" + tokenizer.decode([t for t, own in zip(done.ids, done.sampled, strict=True) if own][4:])


def test_a_grammar_goes_on_after_a_tool_where_it_says_so(engine: Engine, tokenizer: Tokenizer) -> None:
    """A call, the end of the turn, the forced result, and then an answer that the grammar still describes."""
    turn = tokenizer.id(TURN_END)

    def answer(ids: list[int]) -> list[int] | None:
        return tokenizer.encode("= 801") if ids[-2:] == [tokenizer.id(CALL_END), turn] else None

    grammar = f'start: {CALL_START} "12" {CALL_END} <|im_end|> /[xy]{{3,5}}/'
    for seed in range(5):
        sampling = Sampling(constraint={"grammar": grammar}, max_tokens=20)
        done = engine.generate([Request([5], sampling, seed, interject=answer if seed else None)])[0]
        if seed == 0:
            assert (done.text, done.ids[-1], done.finish) == ("12", turn, "stop")
        else:
            own = [token for token, sampled in zip(done.ids, done.sampled, strict=True) if sampled]
            assert re.fullmatch("12[xy]{3,5}", tokenizer.decode(own))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        ({"json_schema": {"type": "objekt"}}, "sampling.constraint.json_schema: Invalid type: objekt"),
        ({"json_schema": {"type": "object", "not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json_schema": {"$ref": "#/$defs/nowhere"}}, "does not exist"),
        ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable schema"),
        ({"regex": "(a"}, "sampling.constraint.regex: unclosed group (got '(a')"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: nowhere"}, 'unknown name: "nowhere"'),
        ({"grammar": "start: <|im_start|>"}, "unknown special token"),
    ],
)
def test_a_bad_constraint_is_refused_in_one_line(engine: Engine, constraint: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        write(engine, constraint)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not engine.busy


def test_a_text_that_no_token_spells_is_refused(letters: Tokenizer) -> None:
    engine = Engine(random_model(letters.vocab_size), letters)
    assert write(engine, {"choice": ["cab", "é"]})[0].text == "cab"
    with pytest.raises(UserError, match="no token of this tokenizer can begin such a text"):
        write(engine, {"choice": ["é"]})


# ---- guides ----


def test_guides_go_their_own_way(tokenizer: Tokenizer) -> None:
    first = Grammars(tokenizer).open({"choice": ["ab", "cd"]}, [])
    second = first.copy()
    assert first.push(tokenizer.encode("a")[0]) is None
    assert second.push(tokenizer.encode("c")[0]) is None
    masks = unpack([first.allowed or b"", second.allowed or b""], tokenizer.vocab_size + 3)
    assert [row.nonzero()[:, 0].tolist() for row in masks] == [tokenizer.encode("b"), tokenizer.encode("d")]
    assert (first.push(tokenizer.encode("b")[0]), second.push(tokenizer.encode("d")[0])) == ("stop", "stop")


def mask_of(tokenizer: Tokenizer, regex: str) -> Iterator[tuple[int, bool]]:
    allowed = unpack([Grammars(tokenizer).open({"regex": regex}, []).allowed or b""], tokenizer.vocab_size)[0]
    yield from enumerate(allowed.tolist())


def test_a_mask_is_every_token_that_can_begin_the_text(tokenizer: Tokenizer) -> None:
    """Token by token: for words of one repeated letter class the beginnings are easy to tell."""
    for token, allowed in mask_of(tokenizer, "[a-z ]{12}"):
        text = tokenizer.decode([token])
        assert allowed == bool(re.fullmatch("[a-z ]{1,12}", text))


def test_compiled_constraints_are_kept_and_forgotten(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer)
    for number in range(200):
        grammars.open({"choice": [str(number % 80)]}, [])
    assert len(grammars._compiled) <= 64
    assert torch.equal(*(unpack([grammars.open({"regex": "a"}, []).allowed or b""], 300) for _ in range(2)))
