"""Chat templates of strangers: they end, and what they cannot do is an error with a message."""

import json
from pathlib import Path

import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chat import ChatRenderer
from illada_megatron.data.preprocessing.chat_template import ChatTemplate, load_chat_template
from illada_megatron.data.preprocessing.template_sandbox import MOST_STEPS

MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]


def _render(source: str) -> str:
    return ChatRenderer(ChatTemplate(source=source, variables={}), []).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% for i in 'x' * 999999 %}{% for j in 'x' * 999999 %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(90) }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{% set x = namespace(a=3) %}{% for i in range(99) %}{% set x.a = x.a * x.a %}{% endfor %}",
        "{{ (((10 ** 99) ** 99) ** 99) ** 99 }}",
    ],
)
def test_a_template_without_an_end_is_refused(source: str) -> None:
    """By what it does and not by a clock: the same documents are left out on any machine."""
    with pytest.raises(ValueError, match=f"it takes more than {MOST_STEPS:,} steps"):
        _render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(100) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/hostname' %}",
        "{{ '%d' % 'x' }}",
        "{{ [1][5].x }}",
        "{{ 1 / 0 }}",
        "{{ messages | sort }}",
        "{{ 'x' | int(base=99) | round(method='up') }}",
    ],
)
def test_what_a_template_may_not_do(source: str) -> None:
    """A ValueError counts the conversation as bad, with its line; anything else would be a traceback."""
    with pytest.raises(ValueError, match=r"the chat template refuses: ."):
        _render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{% for a in b %}" * 50 + "{% endfor %}" * 50,
        "{{ 1" + "+1" * 100_000 + " }}",
        "{{ " + "1" * 5000 + " }}",
        "{% for %}",
        "{{ x",
    ],
    ids=["brackets", "conditions", "loops", "a sum", "a long number", "an error", "no end"],
)
def test_what_python_cannot_compile(source: str) -> None:
    with pytest.raises(DataError, match="chat template"):
        _render(source)


def test_what_templates_do_goes_on() -> None:
    """Loops with a filter, their own variables, recursion, macros, namespaces, and more calls than any of them has."""
    source = (
        "{% macro twice(text) %}{{ text * 2 }}{% endmacro %}{% set at = namespace(n=0) %}"
        "{% for message in messages if message.role != 'system' %}{% set at.n = at.n + loop.length %}"
        "{{ loop.index }}{{ loop.last }}{{ twice(message.content) }}"
        "{% if not loop.last %}{{ loop.nextitem.role }};{% endif %}{% endfor %}{{ at.n }}"
        "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}<{{ loop(x) }}>"
        "{% else %}{{ x }}{% endif %}{% endfor %}"
        "{% for i in range(2000) %}{{ range(9) | length }}{% break %}{% else %}{% endfor %}{{ 2 ** 10 * 3 }}"
    )
    assert _render(source) == "1FalseWhat?What?assistant;2TrueThis.This.41<2<3>>93072"
    renderer = ChatRenderer(ChatTemplate(source="{% for i in range(9000) %}{% endfor %}x", variables={}), [])
    for _ in range(2 * MOST_STEPS // 18000):  # the count begins anew for each conversation
        assert renderer.render(MESSAGES) == "x"


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b"1" * 5000, b"\xff", b'{"chat_template": 5}'])
def test_files_that_hold_no_template(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: "):
        load_chat_template(tmp_path / "tokenizer.json", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"t\.jinja: a chat template is text in UTF-8"):
        load_chat_template(tmp_path / "tokenizer.json", tmp_path / "t.jinja")
