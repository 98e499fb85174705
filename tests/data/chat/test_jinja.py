"""Tests of sources of chat templates, rendered by transformers. test_chat_templates.py has real templates."""

from __future__ import annotations

import itertools

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_lite.data.chat.jinja import depends_on_date, template_source, with_generation_marks
from qlora_lite.data.chat.marks import without_marks

TAGS = ["{%% %s %%}", "{%%- %s -%%}", "{%%- %s %%}", "{%% %s -%%}", "{%%%s%%}", "{%%- \n %s\t-%%}"]
MESSAGES = [[{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two "}]]


@pytest.mark.parametrize(("begin", "end"), list(itertools.product(TAGS, TAGS)))
def test_marked_text_is_where_transformers_finds_it(begin: str, end: str) -> None:
    """White space is trimmed by the tags as before, whatever their signs."""
    source = (
        f"{{% for m in messages %}}\n<{{{{ m.role }}}}>\n  {begin % 'generation'}  \n  {{{{ m.content }}}} \n"
        f"  {end % 'endgeneration'}\n \n</{{{{ m.role }}}}>\n{{% endfor %}}"
    )
    (plain,), (expected,) = render_jinja_template(MESSAGES, chat_template=source, return_assistant_tokens_mask=True)
    marked = with_generation_marks(source)
    (text,), _ = render_jinja_template(MESSAGES, chat_template=marked)
    found = without_marks(text)
    assert found.text == plain and list(found.generated) == expected and len(expected) == 2


@pytest.mark.parametrize(("begin", "end"), [("{%+ generation %}", "{%+ endgeneration +%}"), ("{% generation +%}",) * 2])
def test_signs_that_keep_white_space_are_kept(begin: str, end: str) -> None:
    end = end.replace(" generation", " endgeneration")
    source = f"a\n  {begin}\n  b\n  {end}\nc"
    (plain,), _ = render_jinja_template([[]], chat_template=source)
    (text,), _ = render_jinja_template([[]], chat_template=with_generation_marks(source))
    found = without_marks(text)
    assert found.text == plain
    assert [found.text[start:stop].strip() for start, stop in found.generated] == ["b"]


def test_marked_text_is_found_in_macros_and_filters() -> None:
    """transformers counts from the start of the macro there."""
    source = (
        "{% macro turn(m) %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}<end>{% endmacro %}"
        "{% for m in messages %}{{ turn(m) | trim }}{% endfor %}"
    )
    (text,), _ = render_jinja_template(MESSAGES, chat_template=with_generation_marks(source))
    found = without_marks(text)
    assert [found.text[start:stop] for start, stop in found.generated] == ["one", "two "]


def test_tags_in_comments_say_nothing() -> None:
    assert with_generation_marks("{#- has {% generation %} and {% endgeneration %} -#}a") is None
    assert with_generation_marks("{{ generation }}{% set generation = 1 %}") is None


def test_the_source_is_the_one_that_transformers_takes() -> None:
    named = {"default": "a", "tool_use": "b"}
    assert [template_source(named, has_tools) for has_tools in (False, True)] == ["a", "b"]
    assert template_source({"default": "a"}, True) == template_source("a", True) == "a"
    assert template_source(None, False) == ""


def test_a_date_in_any_of_several_sources_counts() -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
    assert depends_on_date(dated) and depends_on_date({"default": "a", "tool_use": dated})
    assert not depends_on_date("{{ date_string }}") and not depends_on_date(None)
