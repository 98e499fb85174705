"""Tests of the sentences for errors of the hub's client."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import errors

from qlora_lite.checkpoints.repository.client_errors import hub_errors, is_transport_error, reason
from qlora_lite.errors import CheckpointError, ConfigError

Transport: Any = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that this release uses


def test_each_error_says_what_to_do() -> None:
    for error, sentence in {
        errors.OfflineModeIsEnabled("x"): "HF_HUB_OFFLINE is set",
        errors.HFValidationError("x"): "owner/name",
        errors.LocalTokenNotFoundError("x"): "there is no token; log in with `hf auth login`, or set HF_TOKEN",
        Transport("no route\nto host"): " broke (no route); start again to go on, files",
        OSError(28, "No space left on device"): "No space left on device",
        ValueError("first\nsecond"): "first",
        ValueError(): "ValueError",
    }.items():
        assert sentence in reason(error)
        assert "\n" not in reason(error)
    missing = errors.LocalEntryNotFoundError("x")
    missing.__cause__ = Transport("refused")
    assert "(refused)" in reason(missing)


def test_only_the_network_is_a_transport_error() -> None:
    assert is_transport_error(Transport("x")) and is_transport_error(errors.OfflineModeIsEnabled("x"))
    assert not is_transport_error(OSError("x")) and not is_transport_error(errors.HFValidationError("x"))


def test_errors_of_ours_pass() -> None:
    with pytest.raises(ConfigError, match=r"^ours$"), hub_errors("x"):
        raise ConfigError("ours")
    with pytest.raises(CheckpointError, match=r"^x cannot be done: theirs$"), hub_errors("x cannot be done"):
        raise RuntimeError("theirs")
