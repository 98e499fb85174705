"""Records of a data set of the hub, through `datasets`, which fetches and keeps it.

Only this file imports `datasets`, when a data set is named. Its tables lie on disk, and are read a batch at a time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from qlora_lite.data.sources.arrow_tables import ROWS, row_records
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError, QLoRAError

FORM = re.compile(
    r"(?P<name>[\w.-]{2,}(?:/[\w.-]+)?)"
    r"(?::(?P<config>[\w.+-]+))?"
    r":(?P<split>\w[\w.-]*(?:\[[^\[\]]*\])?)",
    re.ASCII,
)


class HubDataset(NamedTuple):
    """A data set by its name on the hub, as `datasets.load_dataset` takes it; a local folder is one, too."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return ":".join(filter(None, self))


def parse_hub_dataset(location: str) -> HubDataset | None:
    """Returns the data set that `name:split` or `name:config:split` names, None for text of another form."""
    match = FORM.fullmatch(location)
    return HubDataset(match["name"], match["config"], match["split"]) if match else None


def hub_records(named: HubDataset) -> Iterator[RawRecord]:
    """Yields the rows of a data set. Raises CheckpointError if it cannot be loaded."""
    return row_records(_tables(named), str(named))


def hub_fingerprint(named: HubDataset) -> str:
    """Returns the SHA-256 of a data set's rows in hexadecimal.

    The revision would change with a data set's README, and the bytes of its tables with the version of `datasets`.
    """
    digest = hashlib.sha256()
    for record in hub_records(named):
        digest.update(json.dumps(record.value, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _tables(named: HubDataset) -> Iterator[Any]:
    try:
        with _quiet_datasets(named) as datasets:
            rows = datasets.load_dataset(named.name, named.config, split=named.split)
        # As tables, values are not decoded: a column of pictures does not need the libraries for them.
        yield from rows.with_format("arrow").iter(ROWS)
    except QLoRAError:
        raise
    except Exception as error:  # it raises its own errors, those of the hub's client, ValueError and OSError
        problem = f"{named} is not a file or folder, and as a data set of the hub it cannot be loaded"
        raise CheckpointError(f"{problem}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, and that of its cause, where `datasets` says there what happened."""
    first = next(iter(str(error).strip().splitlines()), "").rstrip(".:") or type(error).__name__
    cause = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") else None
    return first if cause is None else f"{first}: {_reason(cause)}"


@contextmanager
def _quiet_datasets(named: HubDataset) -> Iterator[Any]:
    """Yields the module `datasets`, whose progress bars, logs and warnings are off within the block."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        needed = f"{named} is not a file or folder, and a data set of the hub needs datasets to be read"
        raise CheckpointError(f"{needed}; run pip install 'qlora-lite[data]'") from error
    hub = importlib.import_module("huggingface_hub.utils")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        switches = [(module, not module.are_progress_bars_disabled()) for module in (datasets.utils, hub)]
        levels = [(module.logging, module.logging.get_verbosity()) for module in (datasets, hub)]
        try:
            for module, _ in switches:
                module.disable_progress_bars()
            for logging, _ in levels:
                logging.set_verbosity_error()
            yield datasets
        finally:
            for module, shown in switches:
                if shown:
                    module.enable_progress_bars()
            for logging, level in levels:
                logging.set_verbosity(level)
