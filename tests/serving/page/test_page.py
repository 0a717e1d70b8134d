"""The page's files: sent with the right types and policy, complete, and of this service alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import nestling
from nestling.serving.routes.page import TYPES

PAGE = Path(nestling.__file__).parent / "serving" / "page"
FILES = sorted(path for path in PAGE.rglob("*") if path.is_file() and path.suffix in TYPES)
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
NAMES = [str(path.relative_to(PAGE)) for path in FILES]
ELSEWHERE = re.compile(r"""(?:https?:)?//[a-z0-9]""", re.IGNORECASE)
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml")
IMPORT = re.compile(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""")
NAMED_IMPORT = re.compile(r"""import \{([^}]*)\} from "([^"]+)";""")
EXPORT = re.compile(r"^export (?:async )?(?:function|class|const|let) (\w+)", re.MULTILINE)
USED_KEY = re.compile(r"""\bt\(\s*["']([a-z0-9_-]+)["']""")


@pytest.fixture(scope="module")
def client(make_app):
    app, _ = make_app()
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def test_the_page_is_on_the_root(client):
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>Nestling</title>" in response.text


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_its_type_and_the_policy(client, name):
    response = client.get(f"/page/{name}")
    assert response.status_code == 200
    assert response.content == (PAGE / name).read_bytes()
    assert response.headers["content-type"].split(";")[0] == TYPES[Path(name).suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]


def test_a_file_that_is_known_is_not_sent_again(client):
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert client.get("/page/main.js", headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", ["none.js", "../app.py", "%2e%2e/app.py", "..%2fapp.py", "strings", "", "/etc/passwd"])
def test_nothing_else_is_sent(client, path):
    response = client.get(f"/page/{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_url"


def test_the_page_needs_no_key_and_what_it_asks_does(make_app):
    app, _ = make_app(keys=({"name": "ann", "secret": "s3cret"},))
    with TestClient(app) as client:
        assert client.get("/").status_code == client.get("/page/main.js").status_code == 200
        assert client.post("/api/render", json={"texts": []}).status_code == 401
        headers = {"authorization": "Bearer s3cret"}
        assert client.post("/api/render", json={"texts": ["*a*"]}, headers=headers).json() == {
            "data": ["<p><em>a</em></p>\n"]
        }


def test_too_much_is_not_rendered(client):
    assert client.post("/api/render", json={"texts": ["a" * 400_000, "b" * 200_000]}).status_code == 400
    assert client.post("/api/render", json={"texts": ["a"] * 501}).status_code == 400


def test_markup_holds_no_script_and_no_style():
    """What the policy forbids would silently not work."""
    markup = (PAGE / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>(.*?)</script>", markup, re.DOTALL) == ["", ""]
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", markup)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_file_names_another_host(path):
    text = path.read_text(encoding="utf-8")
    for name in NAMESPACES:
        text = text.replace(name, "")
    assert not ELSEWHERE.search(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_files_that_are_there(path):
    for name in IMPORT.findall(path.read_text(encoding="utf-8")):
        assert name.startswith("./"), name
        assert (path.parent / name).is_file(), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_is_there_and_used(path):
    text = path.read_text(encoding="utf-8")
    for names, source in NAMED_IMPORT.findall(text):
        offered = EXPORT.findall((path.parent / source).read_text(encoding="utf-8"))
        for name in (one.strip() for one in names.split(",") if one.strip()):
            assert name in offered, f"{source} has no {name}"
            assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is not used"


def test_the_markup_names_files_that_are_there():
    markup = (PAGE / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'(?:src|href)="/page/([^"]+)"', markup):
        assert (PAGE / name).is_file(), name


def texts(language: str) -> dict[str, str]:
    return json.loads((PAGE / "strings" / f"{language}.json").read_text(encoding="utf-8"))


def test_both_languages_say_the_same_things():
    english, chinese = texts("en"), texts("zh")
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert text.strip(), key
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_text_that_is_named_is_there():
    english = texts("en")
    named = {key for path in SCRIPTS for key in USED_KEY.findall(path.read_text(encoding="utf-8"))}
    assert named <= set(english), named - set(english)
    assert len(named) > 100


def test_every_text_is_used():
    """A key stands in a script, whole or as the beginning of a template: t(`vote_${name}`)."""
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    begun = tuple(re.findall(r"`([a-z_]+_)\$\{", scripts))
    unused = [
        key
        for key in texts("en")
        if not re.search(rf"""["'`]{re.escape(key)}["'`]""", scripts) and not key.startswith(begun)
    ]
    assert unused == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_fits_in_the_head(path):
    """At most 300 lines, none longer than 132 characters, and it says what it is for."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    assert lines[0].startswith("// ")
    assert [line for line in lines if len(line) > 132] == []
