"""Training data: records -> tokens -> batches -> a stream that can be resumed.

In reading order:

shapes          the shapes of a record: which keys it has, and what they mean
records         records, renamed and checked, and the bad ones listed
encoding        the token ids of one record, with labels on the tokens that are learned
token_arrays    tokenized examples in flat arrays, in memory or mapped from files
token_cache     the same on disk next to the data
mixture         several sources as one sequence of examples, by weights; what is held out
tokenization    records to examples, for lists, files and data sets
packing         which examples share a row
batching        batches of examples, padded or packed
stream          the batches of a run, with a position that can be resumed
summary         what a set of records becomes, in numbers
listing         what is learned from it, as a page and token by token

The room chat/ writes conversations by chat templates. The room sources/ reads records from files. The room tasks/ has
records for other tasks than that of a causal language model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.data.batching import Batch as Batch
    from qlora_lite.data.batching import batches as batches
    from qlora_lite.data.batching import labelled_tokens as labelled_tokens
    from qlora_lite.data.encoding import TokenizedExample as TokenizedExample
    from qlora_lite.data.packing import Fill as Fill
    from qlora_lite.data.packing import packed_fill as packed_fill
    from qlora_lite.data.records import read_records as read_records
    from qlora_lite.data.stream import BatchStream as BatchStream
    from qlora_lite.data.summary import Summary as Summary
    from qlora_lite.data.summary import summarize as summarize
    from qlora_lite.data.tokenization import DataConfig as DataConfig
    from qlora_lite.data.tokenization import TokenizedSet as TokenizedSet
    from qlora_lite.data.tokenization import tokenize_all as tokenize_all
    from qlora_lite.data.tokenization import tokenize_sources as tokenize_sources

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "records": "read_records",
        "encoding": "TokenizedExample",
        "tokenization": "tokenize_all tokenize_sources DataConfig TokenizedSet",
        "packing": "packed_fill Fill",
        "batching": "batches Batch labelled_tokens",
        "stream": "BatchStream",
        "summary": "summarize Summary",
    },
)
