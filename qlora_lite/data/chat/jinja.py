"""The source of a chat template: which one is used, whether it writes the date, and what it says is generated.

A template may put `{% generation %}` and `{% endgeneration %}` around what the model generates, as transformers has it
for masks of the assistant's tokens. Here characters of private use are written at both places, inside of the block. So
the marked text is found wherever the template puts it, in macros and filters too. Templates can ask for the date by
`strftime_now` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qlora_lite.data.chat.marks import END_OF_GENERATION, GENERATION

BEGIN_TAG = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
END_TAG = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def template_source(chat_template: object, has_tools: bool) -> str:
    """The source that transformers uses: a tokenizer's only template, or that for tools, or the default one."""
    if not isinstance(chat_template, Mapping):
        return str(chat_template or "")
    name = "tool_use" if has_tools and "tool_use" in chat_template else "default"
    return str(chat_template.get(name, ""))


def depends_on_date(chat_template: object) -> bool:
    """Whether a tokenizer's `chat_template` (a source, or several by name) may write the date of the day it is used."""
    sources = chat_template.values() if isinstance(chat_template, Mapping) else (chat_template,)
    return any("strftime_now" in str(source) for source in sources)


def with_generation_marks(source: str) -> str | None:
    """The source of a template that also writes marks around what it says is generated; None if it does not say so.

    White space around the tags is trimmed as before: a block that is always entered takes over their inner sides.
    """
    if not BEGIN_TAG.search(COMMENT.sub("", source)):
        return None
    begun = BEGIN_TAG.sub(rf"{{%\1 generation %}}{{{{ '{GENERATION}' }}}}{{% if true \2%}}", source)
    return END_TAG.sub(rf"{{%\1 endif %}}{{{{ '{END_OF_GENERATION}' }}}}{{% endgeneration \2%}}", begun)
