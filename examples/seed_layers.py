"""Trains, merges and unmerges the two LoRA layers: does merging keep the output, and unmerging restore the weights?

    python examples/seed_layers.py [--tiny]

An embedding and a linear layer with LoRA learn to which of eight classes each token belongs; only A and B are trained.
Then both layers are merged, compared and unmerged. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from qlora_lite import Embedding, LinearWithLoRA, LoraLayer

TOKENS = 64
CLASSES = 8
BATCH = 32
MERGE_TOLERANCE = 1e-5


def basic_setup() -> tuple[Embedding, LinearWithLoRA]:
    # Create a LoRA-adapted embedding layer
    embedding = Embedding(
        vocab_size=50000,  # Vocabulary size
        embed_dim=768,  # Embedding dimension
        rank=16,  # LoRA rank
        alpha=32,  # Scaling factor
        merge_weights=True,  # Enable weight merging
    )

    # Create a LoRA-adapted linear layer
    linear = LinearWithLoRA(
        fan_in=768,  # Input dimension
        fan_out=768,  # Output dimension
        rank=16,  # LoRA rank
        alpha=32,  # Scaling factor
        bias=True,  # Use bias
    )
    return embedding, linear


def tiny_setup() -> tuple[Embedding, LinearWithLoRA]:
    embedding = Embedding(vocab_size=500, embed_dim=64, rank=4, alpha=32)
    return embedding, LinearWithLoRA(fan_in=64, fan_out=64, rank=4, alpha=32)


def training_loop(
    embedding: Embedding,
    linear: LinearWithLoRA,
    dataloader: Iterable[dict[str, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    num_epochs: int,
) -> None:
    # Initialize optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": embedding.parameters()},
            {"params": linear.parameters()},
        ],
        lr=1e-4,
    )

    # Training loop
    for _epoch in range(num_epochs):
        for batch in dataloader:
            optimizer.zero_grad()

            # Forward pass
            embeds = embedding(batch["input_ids"])
            output = linear(embeds)

            # Calculate loss and backward pass
            loss = criterion(output, batch["labels"])
            loss.backward()

            optimizer.step()


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Returns max |got - expected| / max |expected|."""
    return float((got - expected).abs().max() / expected.abs().max())


def print_layers(layers: Sequence[LoraLayer], base_weights: Sequence[Tensor]) -> None:
    """Prints a row for each layer: the shapes, and the distance of the merged weight W from W0."""
    row = "{:<16}{:>14}{:>14}{:>12}{:>26}"
    print(row.format("layer", "W0", "A", "B", "max |W - W0| / max |W0|"))
    for layer, base in zip(layers, base_weights, strict=True):
        shapes = (str(tuple(matrix.shape)) for matrix in (base, layer.lora_A, layer.lora_B))
        print(row.format(type(layer).__name__, *shapes, f"{relative_difference(layer.weight, base):.2f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains, merges and unmerges the two LoRA layers.")
    parser.add_argument("--tiny", action="store_true", help="small layers: a few seconds instead of twenty")
    tiny = parser.parse_args().tiny
    torch.manual_seed(0)
    embedding, linear = tiny_setup() if tiny else basic_setup()
    layers = (embedding, linear)
    tokens = torch.randperm(embedding.in_features)[:TOKENS]
    classes = tokens % CLASSES
    batches = zip(tokens.split(BATCH), classes.split(BATCH), strict=True)
    dataloader = [{"input_ids": some, "labels": theirs} for some, theirs in batches]
    criterion = nn.CrossEntropyLoss()

    @torch.no_grad()
    def answer() -> Tensor:
        output: Tensor = linear(embedding(tokens))
        return output

    base_weights = [layer.weight.detach().clone() for layer in layers]
    loss_before = float(criterion(answer(), classes))
    training_loop(embedding, linear, dataloader, criterion, num_epochs=300)
    apart = answer()
    loss_after = float(criterion(apart, classes))

    for layer in layers:
        layer.merge_weights()
    merged_difference = relative_difference(answer(), apart)
    print_layers(layers, base_weights)
    for layer in layers:
        layer.unmerge_weights()
    restored = all(torch.equal(layer.weight, base) for layer, base in zip(layers, base_weights, strict=True))

    print(f"loss before {loss_before:.3f}, after {loss_after:.3f}")
    print(f"merged against unmerged output: relative difference {merged_difference:.1e}")
    print(f"weights after unmerging: {'bit-identical to the initial ones' if restored else 'CHANGED'}")
    result = {"loss_before": loss_before, "loss_after": loss_after, "merged_difference": merged_difference}
    print(json.dumps({**result, "restored": restored}))
    if not restored or merged_difference > MERGE_TOLERANCE or loss_after >= loss_before:
        raise SystemExit("error: the loss, the merged output or the unmerged weights are wrong; see the lines above")


if __name__ == "__main__":
    main()
