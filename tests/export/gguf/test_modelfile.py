"""Tests of ollama's Modelfile."""

from __future__ import annotations

from types import SimpleNamespace

from qlora_lite.export.gguf.modelfile import adapter_modelfile, model_modelfile, sampling, stop_texts

TOKENS = ["<s>", "</s>", '<|"|>', "a"]


def test_answers_end_where_the_generation_config_says() -> None:
    assert stop_texts(SimpleNamespace(eos_token_id=[1, 2, 1, 99], stop_strings=["###"]), TOKENS) == [
        "</s>",
        '<|"|>',
        "###",
    ]
    assert stop_texts(SimpleNamespace(eos_token_id=1, stop_strings="x"), TOKENS) == ["</s>", "x"]
    assert stop_texts(SimpleNamespace(eos_token_id=None), TOKENS) == stop_texts(None, TOKENS) == []


def test_sampling_is_told_if_the_model_samples() -> None:
    settings = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "top_k": None}
    assert sampling(SimpleNamespace(do_sample=True, **settings)) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "repeat_penalty": 1.1,
    }
    assert sampling(SimpleNamespace(do_sample=False, **settings)) == sampling(None) == {}


def test_texts() -> None:
    text = model_modelfile("model-q8_0.gguf", ['<|"|>'], {"temperature": 0.6, "top_k": 20})
    assert text == 'FROM ./model-q8_0.gguf\nPARAMETER stop "<|\\"|>"\nPARAMETER temperature 0.6\nPARAMETER top_k 20\n'
    assert adapter_modelfile("adapter-f16.gguf", "/base").endswith("\nFROM /base\nADAPTER ./adapter-f16.gguf\n")
