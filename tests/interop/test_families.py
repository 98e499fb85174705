"""Tests of families.py: a sample of families is equal and as docs/families.md says, and what is wrong is found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qlora_lite import LoraConfig, add_lora_
from qlora_lite.errors import CheckpointError, ConfigError

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def families(import_script: Callable[[str], Any]) -> Iterator[Any]:
    script = import_script("tests/interop/families.py")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: on small models two threads mostly wait for each other
    yield script
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checks(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/interop/family_checks.py")


@pytest.fixture(scope="module")
def pages(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/interop/family_page.py")


@pytest.mark.filterwarnings("ignore")
def test_a_sample_is_as_the_page_says(families: Any, checks: Any, pages: Any, tmp_path: Path) -> None:
    found = [result for family in families.QUICK for result in checks.results(family, tmp_path / family)]
    assert [result for result in found if result.status not in ("equal", "refused")] == []
    # One of them is refused on purpose: an encoder, whose tokens see later ones.
    done = families.figures(found)
    assert done["equal"] == done["families"] - 1 == len(families.QUICK) - 1
    assert {family for refused in done["refused"] for family in refused["families"]} >= {"bert+encoder"}
    written, listed = pages.rows_of(pages.page(found, families.MAIN_LINE)), pages.rows_of(PAGE)
    assert written == {family: listed[family] for family in families.QUICK}


def test_the_page_has_every_family(families: Any, pages: Any) -> None:
    not_tried = pages.not_tried(PAGE)
    listed = pages.rows_of(PAGE)
    assert not_tried.isdisjoint(listed) and "computed something else" in PAGE
    assert not any(cell in ("different", "failed") for row in listed.values() for cell in row)
    if f"transformers {transformers.__version__} " in PAGE:
        assert {*listed, *not_tried} == set(families.families())


@pytest.mark.filterwarnings("ignore")
def test_differences_and_failures_are_found(
    families: Any,
    checks: Any,
    pages: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_another(model: nn.Module, folder: Path) -> None:
        add_lora_(model, LoraConfig(rank=4, alpha=8))

    def fail(*given: Any, **options: Any) -> None:
        raise KeyError("lm_head.weight")

    def refuse(*given: Any, **options: Any) -> None:
        raise CheckpointError("no room")

    monkeypatch.setattr(checks, "load_adapter_", load_another)
    monkeypatch.setattr(checks, "merge_checkpoint", fail)
    monkeypatch.setattr(checks, "save_quantized", refuse)
    monkeypatch.setattr(families, "quiet", lambda: None)  # it is for a process of its own
    written = tmp_path / "results.jsonl", tmp_path / "page.md"
    options = ("--jobs", "1", "--results", str(written[0]), "--markdown", str(written[1]))
    monkeypatch.setattr(sys, "argv", ["families.py", "--family", "llama", *options])
    with pytest.raises(SystemExit) as ended:
        families.main()
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 1 and (done["equal"], done["families"], done["share"]) == (0, 1, 0.0)
    (different,), (failed,), (refused,) = done["different"], done["failed"], done["refused"]
    assert different.startswith("llama adapter: logits differ by ")
    assert failed.startswith("llama disk: KeyError: 'lm_head.weight' (test_families.py:")
    assert refused == {"check": "folder", "families": ["llama"], "sentence": "no room"}
    found = {line["check"]: line["status"] for line in map(json.loads, written[0].read_text().splitlines())}
    assert found == dict.fromkeys(set(checks.CHECKS) - {"peft"}, "equal") | {
        "adapter": "different",
        "disk": "failed",
        "folder": "refused",
    }
    page = written[1].read_text()
    assert pages.rows_of(page) == {"llama": ["yes"] * 3 + ["different", "failed", "no", "yes", "", ""]}
    assert "1. no room\n" in page


def test_only_a_setting_that_the_error_gives_is_made(checks: Any) -> None:
    error = ConfigError("2 layers get none; leave them out with exclude_modules=['a.b', 'c'] (--exclude-modules a.b,c)")
    assert checks.named_setting(error, "exclude_modules") == ["a.b", "c"]
    with pytest.raises(ConfigError, match="2 layers"):
        checks.named_setting(error, "skip_modules")


def test_sentences_that_differ_in_names_and_numbers_are_one_reason(pages: Any) -> None:
    one, other = (
        f"a {kind} lets packed examples see each other: an example by {much} of their norm; set x=False"
        for kind, much in (("MambaForCausalLM", 0.8), ("XLMWithLMHeadModel", 1))
    )
    assert pages.general(one) == pages.general(other) != pages.general(f"{one}, or not")
    many = "of 3 layers (a.b.c, d.e, and 4 more): in a qwen3_moe"
    assert pages.general(many) == pages.general("of 12 layers (x.y.z): in a deepseek_v3")
