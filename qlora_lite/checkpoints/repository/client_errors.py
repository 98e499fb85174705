"""Turns the errors of huggingface_hub, and of the network below it, into one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from qlora_lite.errors import CheckpointError, QLoRAError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def hub_errors(problem: str) -> Iterator[None]:
    """Turns any error of the hub's client into a CheckpointError of one sentence, which begins with `problem`."""
    try:
        yield
    except (QLoRAError, MemoryError):
        raise
    except Exception as error:  # the client raises its own errors, httpx's and the system's
        raise CheckpointError(f"{problem}: {reason(error)}") from error


def endpoint() -> str:
    """Returns the address of the hub, which HF_ENDPOINT may change."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_transport_error(error: BaseException) -> bool:
    """Whether the network failed, as opposed to an answer of the hub that reports an error."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The class of all errors of the HTTP library, which is httpx in older releases of huggingface_hub.
    of_library = HfHubHTTPError.__bases__[0]
    return isinstance(error, (of_library, OfflineModeIsEnabled)) and not isinstance(error, HfHubHTTPError)


def reason(error: Exception) -> str:
    """Returns why the hub's client failed, and what to do about it, without the address of the request."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and keeps the client off the network"
    if isinstance(error, errors.HFValidationError):
        return "this is not the name of a repository, which is owner/name"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"there is no token; {LOG_IN}"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated; ask for access on its page at {endpoint()}, and {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint()} has no such repository, or it is private; check the spelling, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.HfHubHTTPError):
        return _answer(error)
    # What the client says of files that it neither fetched nor uploaded; the cause says why.
    if isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__)
    if is_transport_error(error):
        why = _first_line(error)
        never_reached = "Connect" in type(error).__name__  # ConnectError and ConnectTimeout, which errors.py lacks
        return (
            f"{endpoint()} cannot be reached ({why})"
            if never_reached
            else f"the connection to {endpoint()} broke ({why}); start again to go on, files that are complete stay"
        )
    return getattr(error, "strerror", None) or _first_line(error)


def _answer(error: Exception) -> str:
    """Returns what an error answer of the hub says."""
    status = error.response.status_code  # type: ignore[attr-defined]
    message = getattr(error, "server_message", None) or HTTPStatus(status).phrase
    said = f"{endpoint()} answered {status}, {' '.join(str(message).split())}"
    if status == HTTPStatus.UNAUTHORIZED:
        return f"{said}; the token is missing or was refused: {LOG_IN}"
    if status == HTTPStatus.FORBIDDEN:
        return f"{said}; the token does not allow this: use one that does, or another repository"
    return f"{said}; try again later" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else said


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
