"""The figures of a calibration: of each layer, and of the model on held-out text, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from qlora_lite.calibration.held_out import Comparison
from qlora_lite.surgery import described_by_pattern

METHOD = "error feedback (GPTQ), signed absmax, half shift to the 16-bit model's outputs"
VERSION = 1  # of the method and the file: another one does not go on with blocks of this one
PLAIN, ROUNDED, CALIBRATED = MODELS = ("16-bit", "rounded", "calibrated")


@dataclass(frozen=True)
class LayerErrors:
    """The share of a layer's squared output that packing changes, on the calibration text.

    Of at most 1,023 rows of the weight, spread evenly.
    rounded: packed by rounding. calibrated: as it was packed.
    """

    rounded: float
    calibrated: float

    @property
    def ratio(self) -> float:
        """The error that is left of rounding's; 1 where rounding has none."""
        return self.calibrated / self.rounded if self.rounded else 1.0


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did.

    format: of the weights. data_sha256: of the calibration text's tokens. tokens, held_out_tokens: of both texts.
    layers: the errors by name. rounded: layers and stacks that were packed by rounding, with the reason. held_out: the
    models compared; None without held-out text.
    """

    format: str
    data_sha256: str
    tokens: int
    held_out_tokens: int
    seconds: float
    layers: Mapping[str, LayerErrors]
    rounded: Mapping[str, str]
    held_out: Comparison | None

    @property
    def mean_ratio(self) -> float | None:
        """The mean over layers of the error that is left of rounding's; None if no layer was calibrated."""
        return sum(errors.ratio for errors in self.layers.values()) / len(self.layers) if self.layers else None

    def perplexities(self) -> dict[str, float] | None:
        """Returns the perplexity on held-out text of each model."""
        return None if self.held_out is None else {name: self.held_out.perplexity(name) for name in MODELS}

    def divergences(self) -> dict[str, float] | None:
        """Returns the mean KL divergence from the 16-bit model on held-out text of both packed models, in nats."""
        return None if self.held_out is None else {name: self.held_out.mean_kl(name) for name in MODELS[1:]}

    def to_json(self) -> dict[str, object]:
        """Returns the contents of `calibration.json`."""
        held_out = None
        if self.held_out is not None:
            held_out = {"tokens": self.held_out_tokens, "perplexity": self.perplexities(), "kl": self.divergences()}
        return {
            "version": VERSION,
            "method": METHOD,
            "format": self.format,
            "data_sha256": self.data_sha256,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "mean_error_ratio": self.mean_ratio,
            "held_out": held_out,
            "layers": {name: asdict(errors) for name, errors in self.layers.items()},
            "rounded": dict(self.rounded),
        }

    def figures(self) -> dict[str, object]:
        """Returns the figures of a command, by name."""
        found: dict[str, object] = {"tokens": self.tokens, "seconds": self.seconds}
        found |= {"layers_calibrated": len(self.layers), "layers_rounded": len(self.rounded)}
        found |= {"mean_error_ratio": self.mean_ratio}
        for name, perplexity in (self.perplexities() or {}).items():
            found[f"perplexity_{name.replace('-', '_')}"] = perplexity
        return found | {f"kl_{name}": kl for name, kl in (self.divergences() or {}).items()}

    def sentence(self) -> str:
        """Returns one sentence: what calibration brought on held-out text."""
        divergences = self.divergences()
        if divergences is None:
            return "There was no held-out text, so what calibration brought was not measured."
        share = divergences[CALIBRATED] / divergences[ROUNDED] if divergences[ROUNDED] else 1.0
        if share < 1:
            return f"On held-out text the calibrated model is {share:.2f} times as far from the 16-bit one as rounding."
        return (
            "On held-out text the calibrated model is no nearer to the 16-bit one than rounding: give more text, or "
            "text more like that of your task."
        )


def render(report: CalibrationReport) -> str:
    """Returns a table with one row for each model, and lines about layers that were packed by rounding."""
    from rich.console import Console
    from rich.table import Table

    lines = []
    perplexities, divergences = report.perplexities(), report.divergences()
    if perplexities is not None and divergences is not None:
        table = Table("base", title=f"{report.held_out_tokens:,} tokens of held-out text", title_justify="left")
        table.add_column("perplexity", justify="right")
        table.add_column("mean KL", justify="right")
        for name, perplexity in perplexities.items():
            table.add_row(name, f"{perplexity:.3f}", f"{divergences[name]:.4f}" if name in divergences else "–")
        console = Console(width=100, record=False)
        with console.capture() as capture:
            console.print(table)
        lines.append(capture.get().rstrip("\n"))
    lines.append(report.sentence())
    if report.rounded:
        lines.append(f"{len(report.rounded)} layers and stacks were packed by rounding:")
        lines += [f"  {line}" for line in described_by_pattern(report.rounded)]
    return "\n".join(lines)
