"""Answers of a model: one, token by token, a conversation, or a file of them in batches.

In reading order:

settings          GenerationSettings: the length of answers, and how tokens are drawn
prompts           the tokens of a conversation, a text or a record, and the tokens that end an answer
kept_cache        keys and values of a conversation, for its next turn
decode_step       shorter norms and attention in steps of one token
answering         answers of one prompt or a batch, by transformers' generate
compared_answers  how often a model writes the answers of tokenized examples
chat_session      a conversation, and the adapter that answers
record_prompts    the prompts of files
answer_journal    answers that are finished, kept for the case of a kill
answer_file       a file of answers, by batches of about one length
joined_products   layers with the same input, multiplied at once
repacked_codes    codes of 4-bit weights in the order of a faster CPU kernel, for as long as they are wanted
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.generation.answer_file import WrittenAnswers as WrittenAnswers
    from qlora_lite.generation.answer_file import write_answers as write_answers
    from qlora_lite.generation.answering import Answer as Answer
    from qlora_lite.generation.answering import answer_batch as answer_batch
    from qlora_lite.generation.answering import answer_prompt as answer_prompt
    from qlora_lite.generation.chat_session import ChatSession as ChatSession
    from qlora_lite.generation.compared_answers import exact_match as exact_match
    from qlora_lite.generation.compared_answers import questions_of as questions_of
    from qlora_lite.generation.kept_cache import KeptCache as KeptCache
    from qlora_lite.generation.prompts import Prompt as Prompt
    from qlora_lite.generation.prompts import Prompts as Prompts
    from qlora_lite.generation.record_prompts import PromptSet as PromptSet
    from qlora_lite.generation.record_prompts import Room as Room
    from qlora_lite.generation.record_prompts import read_prompts as read_prompts
    from qlora_lite.generation.repacked_codes import decode_copies as decode_copies
    from qlora_lite.generation.repacked_codes import decode_copy_bytes as decode_copy_bytes
    from qlora_lite.generation.settings import GenerationSettings as GenerationSettings

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "settings": "GenerationSettings",
        "prompts": "Prompts Prompt",
        "kept_cache": "KeptCache",
        "answering": "answer_prompt answer_batch Answer",
        "compared_answers": "questions_of exact_match",
        "chat_session": "ChatSession",
        "record_prompts": "read_prompts PromptSet Room",
        "answer_file": "write_answers WrittenAnswers",
        "repacked_codes": "decode_copies decode_copy_bytes",
    },
)
