"""Verifies an export: compares the logits of merges into both bases with those of the adapter model, per token.

    KL(p || q) = sum over the vocabulary of p (log p - log q)

p is the adapter model, W4 x + s B (A x). q is a merge with its tensors as they are, or would be, written: W4 + s B A
(`dequantized`, the base of training) or W16 + s B A (`original`).

Weights are read when they are needed (lazy_model.py) and logits are compared a block of the vocabulary at a time, so
memory grows neither with the number of layers nor with the number of prompts. Products are in fp32 and sums over the
vocabulary in fp64, whatever the exported dtype, and never in integers, so only the weights differ between models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from qlora_lite.checks import require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.compute.slicing import rows_that_fit
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import ConfigError, QuantizationError
from qlora_lite.export.lazy_model import LazyModel, LazyWeights
from qlora_lite.positions import most_positions
from qlora_lite.progress.work import working
from qlora_lite.signals import check_signals

BASE, ADAPTER = "base", "adapter"
DEQUANTIZED, ORIGINAL = BASES = ("dequantized", "original")
# Padded tokens that go through the layers together. With more of them, weights are read fewer times.
GROUP_TOKENS = 2048
# fp64 logits of one model at once.
BLOCK_BYTES = 16 << 20
NOISE = 2  # standard errors


@dataclass(frozen=True)
class ModelsToCompare:
    """The models to compare.

    base: W4. adapter: W4 with A and B. merged: the merge by base. missing: why a base has no merge.
    """

    base: LazyWeights
    adapter: LazyWeights
    merged: Mapping[str, LazyWeights]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Agreement:
    """A merged model compared with the adapter model over all tokens.

    KL divergences are in nats. top1_agreement: the share of tokens with the same most likely next token.
    """

    mean_kl: float
    worst_kl: float
    top1_agreement: float
    loss: float | None


@dataclass(frozen=True)
class Verification:
    """The result of a comparison. Losses are means over learned tokens, in nats; None if there are no such tokens.

    written: the base of the export. merged: by base, None for a base that could not be compared, for the reason in
    `missing`. difference: loss of `original` minus that of `dequantized`. noise: its standard error over the examples,
    None for fewer than two.
    """

    written: str
    examples: int
    tokens: int
    learned_tokens: int
    base_loss: float | None
    adapter_loss: float | None
    merged: Mapping[str, Agreement | None]
    missing: Mapping[str, str]
    difference: float | None
    noise: float | None

    def to_json(self) -> dict[str, object]:
        """Returns the entry `verify` of `merge_report.json`."""
        return {**asdict(self), "recommended": self.recommended, "sentence": self.sentence()}

    def _separated(self) -> bool:
        return self.difference is not None and self.noise is not None and abs(self.difference) > NOISE * self.noise

    @property
    def recommended(self) -> str:
        """The base to ship.

        If the held-out losses differ by more than two standard errors of their difference, paired by example, the base
        with the lower loss. Otherwise the base with the lower mean KL from the adapter model, which is the model that
        was trained and tested. A base that could not be compared is not recommended.
        """
        dequantized, original = (self.merged[base] for base in BASES)
        if dequantized is None or original is None:
            return DEQUANTIZED if original is None else ORIGINAL
        if self._separated():
            return ORIGINAL if (self.difference or 0.0) < 0 else DEQUANTIZED
        return ORIGINAL if original.mean_kl < dequantized.mean_kl else DEQUANTIZED

    def sentence(self) -> str:
        """Returns one sentence: which base to ship, and why."""
        ship = self.recommended
        other = DEQUANTIZED if ship == ORIGINAL else ORIGINAL
        best, second = self.merged[ship], self.merged[other]
        if best is None or second is None:
            why = f"{other} could not be compared ({self.missing[other]})"
        elif self._separated():
            why = (
                f"its held-out loss is {best.loss:.4f} against {second.loss:.4f}, a difference of more than {NOISE} "
                f"standard errors (of {self.noise:.2g})"
            )
        else:
            losses = "no held-out loss was measured" if self.difference is None else "held-out losses are within noise"
            if self.difference is not None and self.noise is None:
                losses = "one example gives no estimate of noise"
            why = (
                f"{losses}, and it is no farther from the adapter model, which was trained and tested: mean KL "
                f"{best.mean_kl:.3g} against {second.mean_kl:.3g}"
            )
        again = "" if ship == self.written else f"; this export has {self.written}, so export again with base {ship}"
        return f"Ship the {ship} base: {why}{again}."


@dataclass
class _TokenStatistics:
    """log p(label) = z_label - log(sum(exp(z))) of some tokens, accumulated over blocks of the vocabulary.

    top: the largest logit so far. best: its token. total: sum of exp(z - top). labelled: z of the label.
    """

    labels: Tensor
    top: Tensor = field(init=False)
    best: Tensor = field(init=False)
    total: Tensor = field(init=False)
    labelled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        empty = torch.zeros(self.labels.shape, dtype=torch.float64)
        self.top, self.total, self.labelled = torch.full_like(empty, -math.inf), empty, empty.clone()
        self.best = torch.zeros_like(self.labels)

    def add(self, first: int, block: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the logits of tokens `first` and up.

        Returns exp(z - top), and the factor that converts sums over exp(z - old top) to the new top.
        """
        largest, index = block.max(1)
        self.best = torch.where(largest > self.top, index + first, self.best)
        top = torch.maximum(largest, self.top)
        shrink = torch.exp(self.top - top)
        shares = torch.exp(block - top[:, None])
        self.top, self.total = top, self.total * shrink + shares.sum(1)
        inside = ((self.labels >= first) & (self.labels < first + block.shape[1])).nonzero()[:, 0]
        self.labelled[inside] = block[inside, self.labels[inside] - first]
        return shares, shrink

    @property
    def log_total(self) -> Tensor:
        return self.top + self.total.log()

    def losses(self) -> Tensor:
        """Returns -log p of each label, 0 for a token without a label."""
        return torch.where(self.labels == IGNORE_INDEX, 0.0, self.log_total - self.labelled)


@dataclass
class _ModelSums:
    """Sums of one model over all groups. losses: one sum for each example. worst: the largest KL of a token."""

    losses: list[float] = field(default_factory=list)
    kl: float = 0.0
    worst: float = 0.0
    agreeing: int = 0

    def agreement(self, tokens: int, learned: int) -> Agreement:
        loss = sum(self.losses) / learned if learned else None
        return Agreement(self.kl / tokens, self.worst, self.agreeing / tokens, loss)


def _groups(examples: Sequence[TokenizedExample]) -> Iterator[list[TokenizedExample]]:
    """Yields groups of examples of similar length, of at most GROUP_TOKENS with padding; a longer example alone."""
    group: list[TokenizedExample] = []
    for example in sorted(examples, key=lambda example: len(example.input_ids)):
        if group and (len(group) + 1) * len(example.input_ids) > GROUP_TOKENS:
            yield group
            group = []
        group.append(example)
    yield group


@dataclass(frozen=True)
class _Group:
    """Examples as one padded batch.

    mask: True for tokens, False for padding, `(examples, width)`. labels, owner: for each token under the mask, the
    label of the next token, and the index of its example.
    """

    batch: dict[str, Tensor]
    mask: Tensor
    labels: Tensor
    owner: Tensor

    @classmethod
    def of(cls, examples: list[TokenizedExample]) -> _Group:
        width = max(len(example.input_ids) for example in examples)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        ids = padded([example.input_ids for example in examples], 0)
        mask = padded([[1] * len(example.input_ids) for example in examples], 0)
        after = padded([[*example.labels[1:], IGNORE_INDEX] for example in examples], IGNORE_INDEX)
        owner = torch.arange(len(examples))[:, None].expand_as(ids)
        inside = mask.bool()
        return cls({"input_ids": ids, "attention_mask": mask}, inside, after[inside], owner[inside])


def _compare_group(
    model: LazyModel, models: Mapping[str, LazyWeights], group: _Group, sums: dict[str, _ModelSums]
) -> None:
    """Adds the results of one group to the sums. All models' logits are computed together, block by block."""
    hidden = {name: model.head_inputs(weights, group.batch)[group.mask] for name, weights in models.items()}
    count = rows_that_fit(BLOCK_BYTES, torch.float64.itemsize * len(group.labels))
    seen = {name: _TokenStatistics(group.labels) for name in models}
    gaps = {name: torch.zeros(len(group.labels), dtype=torch.float64) for name in models}
    logits = [model.logits(weights, hidden[name], count) for name, weights in models.items()]
    for blocks in zip(*logits, strict=True):
        block = dict(zip(models, blocks, strict=True))
        first, ours = block[ADAPTER]
        shares, shrink = seen[ADAPTER].add(first, ours)
        for name, (_, theirs) in block.items():
            if name != ADAPTER:
                seen[name].add(first, theirs)
            if name in BASES:
                gaps[name] = gaps[name] * shrink + (shares * (ours - theirs)).sum(1)
    adapter = seen[ADAPTER]
    for name, tokens in seen.items():
        if not tokens.log_total.isfinite().all():
            raise QuantizationError(f"the logits of the {name} model are not finite; check its weights")
        by_example = torch.zeros(int(group.owner[-1]) + 1, dtype=torch.float64)
        sums[name].losses += by_example.index_add(0, group.owner, tokens.losses()).tolist()
        if name in BASES:
            # Rounding may give a value below zero where both models are equal.
            kl = (gaps[name] / adapter.total + tokens.log_total - adapter.log_total).clamp_min(0)
            sums[name].kl += float(kl.sum())
            sums[name].worst = max(sums[name].worst, float(kl.max()))
            sums[name].agreeing += int((tokens.best == adapter.best).sum())


def _paired_difference(one: list[float], other: list[float], learned: list[int]) -> tuple[float, float | None]:
    """Returns the mean loss of `one` minus that of `other` over all learned tokens, and its standard error.

    With d the difference and n the number of learned tokens of each of k examples, mean = sum(d) / sum(n). It is a
    ratio, so its standard error is sqrt(k / (k - 1) * sum((d - n * mean)^2)) / sum(n) (W. G. Cochran, Sampling
    Techniques, section 2.11). The error is None for fewer than two examples.
    """
    pairs = [(mine - theirs, count) for mine, theirs, count in zip(one, other, learned, strict=True) if count]
    total, examples = sum(count for _, count in pairs), len(pairs)
    mean = sum(difference for difference, _ in pairs) / total
    if examples < 2:
        return mean, None
    squares = sum((difference - mean * count) ** 2 for difference, count in pairs)
    return mean, math.sqrt(examples / (examples - 1) * squares) / total


def check_examples(examples: Sequence[TokenizedExample], model: nn.Module, vocabulary: int | None) -> None:
    """Raises ConfigError for examples that a model of this vocabulary size cannot be run on."""
    require(len(examples) > 0, "verify needs at least one example", len(examples))
    longest, limit = max(len(example.input_ids) for example in examples), most_positions(model)
    if limit is not None and longest > limit:
        raise ConfigError(f"verify has an example of {longest} tokens, the model takes {limit}; cut them to max_length")
    largest = max(max(example.input_ids) for example in examples)
    if vocabulary is not None and largest >= vocabulary:
        raise ConfigError(f"verify has token {largest}, the model has {vocabulary}; use the tokenizer of this model")


def compare(
    empty: nn.Module, compared: ModelsToCompare, examples: Sequence[TokenizedExample], written: str = DEQUANTIZED
) -> Verification:
    """Runs the examples through the models of `compared`.

    KL and agreement are over all tokens, losses over learned tokens; without these, the base model is not run. empty:
    the model on meta. written: the base of the export. Raises ConfigError for a model that lazy_model.py cannot run,
    QuantizationError for a merge that exceeds the range of the dtype, and for logits that are not finite.
    """
    model = LazyModel(empty, compared.base.tensors)
    learned = [example.learned_tokens for group in _groups(examples) for example in group]
    models = {ADAPTER: compared.adapter, **compared.merged}
    if sum(learned):
        models[BASE] = compared.base
    sums = {name: _ModelSums() for name in models}
    with working("verifying", len(examples), "prompts") as work:
        for group in _groups(examples):
            check_signals()
            _compare_group(model, models, _Group.of(group), sums)
            work.advance(len(group))
    tokens = sum(len(example.input_ids) for example in examples)

    def loss(name: str) -> float | None:
        return sum(sums[name].losses) / sum(learned) if sum(learned) else None

    difference: tuple[float | None, float | None] = (None, None)
    if sum(learned) and all(base in models for base in BASES):
        difference = _paired_difference(sums[ORIGINAL].losses, sums[DEQUANTIZED].losses, learned)
    merged = {base: sums[base].agreement(tokens, sum(learned)) if base in models else None for base in BASES}
    losses = loss(BASE) if BASE in models else None, loss(ADAPTER)
    counts = len(examples), tokens, sum(learned)
    return Verification(written, *counts, *losses, merged, compared.missing, *difference)


def render(found: Verification) -> str:
    """Returns a table with one row for each model, and the sentence below it."""
    from rich.console import Console
    from rich.table import Table

    title = f"{found.examples} prompts, {found.tokens} tokens, {found.learned_tokens} of them learned"
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for name in ("mean KL", "worst KL", "same top token", "held-out loss"):
        table.add_column(name, justify="right")

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    table.add_row("base", "–", "–", "–", shown(found.base_loss))
    table.add_row("adapter", "–", "–", "–", shown(found.adapter_loss))
    for base, figures in found.merged.items():
        name = f"merged, {base}" + (" (written)" if base == found.written else "")
        if figures is None:
            table.add_row(name, *4 * ("–",))
            continue
        cells = f"{figures.mean_kl:.3g}", f"{figures.worst_kl:.3g}", f"{figures.top1_agreement:.2%}"
        table.add_row(name, *cells, shown(figures.loss))
    console = Console(width=120, record=False)
    with console.capture() as capture:
        console.print(table)
    no_loss = "" if found.learned_tokens else "No held-out loss: the prompts have no completions.\n"
    return f"{capture.get()}{no_loss}{found.sentence()}"
