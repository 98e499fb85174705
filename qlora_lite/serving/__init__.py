"""An HTTP server of answers, with the interface of OpenAI's chat and text completions.

In reading order:

wanted       what a request asks for, checked
stop_texts   ends an answer at a text, also if it comes in pieces
answers      one answer at a time, a short queue, and time limits
replies      the objects that clients of OpenAI's interface expect
app          the routes
server       the address, and the running server
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.serving.answers import Answers as Answers
    from qlora_lite.serving.answers import Limits as Limits
    from qlora_lite.serving.app import make_app as make_app

__getattr__, __dir__, __all__ = lazy_names(__name__, {"answers": "Answers Limits", "app": "make_app"})
