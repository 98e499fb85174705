"""The records of a training run, for each task: what is learned of them, their batches, and held-out scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_lite.errors import CheckpointError, ConfigError, listing

if TYPE_CHECKING:
    from qlora_lite.data.batching import Batch
    from qlora_lite.data.images.processor import ImageProcessor
    from qlora_lite.data.mixture import Mixture
    from qlora_lite.data.tasks.labels import Labels
    from qlora_lite.tasks import Task
    from qlora_lite.training.evaluation import Evaluate


def task_with_records(options: Mapping[str, Any]) -> Task | None:
    """Returns the task of the model to train, if its records are not those of a causal language model.

    Raises ConfigError for options that such a task does not take.
    """
    from qlora_lite.checkpoints.hub import checkpoint_folder, read_config, task_for
    from qlora_lite.generation.answering import writes_answers
    from qlora_lite.tasks import CAUSAL_LM, IMAGE_TEXT_TO_TEXT

    config = read_config(checkpoint_folder(options["model"], weights=False))
    task = task_for(config, options["task"])
    if options["eval_generate"] is not None and not writes_answers(task, config):
        raise ConfigError(
            f"--eval-generate is for causal language models, which write answers, and this model is made for "
            f"{task.name}; leave it out"
        )
    if task in (CAUSAL_LM, IMAGE_TEXT_TO_TEXT):
        if options["regression"]:
            raise ConfigError("--regression is for --task sequence-classification; leave it out")
        return None
    if options["packing"]:
        raise ConfigError(f"--packing is for causal language models; with the task {task.name}, leave it out")
    if options["memory_budget"] is not None:
        raise ConfigError(f"--memory-budget predicts causal language models; with the task {task.name}, leave it out")
    return task


def labels_of_records(
    examples: Mixture, held_out: Mixture | None, task: Task, options: Mapping[str, Any], config: Any
) -> Labels:
    """Returns what the records have to say. Raises CheckpointError for held-out records with other labels.

    A checkpoint of a classifier keeps its labels, in their order, if it has all of the records'. config: of that
    checkpoint. Raises CheckpointError too for labels that the adapter of --from-adapter does not have.
    """
    from qlora_lite.checkpoints.hub import task_for
    from qlora_lite.data.tasks.labels import check_known, find_labels, labels_for
    from qlora_lite.lora.peft.options import labels_of_adapter

    found = find_labels(examples, task.name, options["regression"])
    if options["eval_data"] and held_out is not None:
        check_known(found, held_out, task.name)
    if options["from_adapter"] is not None and found.names:
        known = labels_of_adapter(options["from_adapter"])
        labels = labels_for(found, known if isinstance(known, list) else None)
        if isinstance(known, list) and labels.names != tuple(known):
            unknown = listing(name for name in found.names if name not in known)
            raise CheckpointError(
                f"records have labels that {options['from_adapter']} does not have: {unknown}; it has {listing(known)}"
            )
        return labels
    is_classifier = task_for(config) is task
    return labels_for(found, list(config.id2label.values()) if is_classifier else None)


def prepare_for_labels_(model: Any, labels: Labels, pad_token_id: int) -> None:
    """Writes to a classifier's config what transformers' models read there: the problem, and the padding token."""
    from qlora_lite.checkpoints.hub import set_padding_
    from qlora_lite.tasks import task_of

    if not task_of(model).has_labels:
        return
    if labels.problem_type is not None:
        model.config.problem_type = labels.problem_type
    set_padding_(model.config, pad_token_id)


def run_batches(
    examples: Mixture,
    labels: Labels | None,
    options: Mapping[str, Any],
    tokenizer: Any,
    seed: int,
    epochs: int | None = None,
    images: ImageProcessor | None = None,
) -> Iterator[Batch]:
    """The batches of examples, of a task with labels if there are some."""
    from qlora_lite.data.batching import batches
    from qlora_lite.data.tasks.batching import task_batches
    from qlora_lite.data.tasks.labels import MASKED
    from qlora_lite.data.tasks.masking import Masking

    packing, max_length, rows = options["packing"], options["max_length"], options["batch_size"]
    pad = tokenizer.pad_token_id
    if labels is not None:
        masking = Masking.of(tokenizer) if labels.kind == MASKED else None
        return task_batches(examples, labels, rows, seed, pad_token_id=pad, epochs=epochs, masking=masking)
    shape: dict[str, Any] = {"packing": packing, "max_length": max_length, "images": images}
    return batches(examples, rows, seed, pad_token_id=pad, epochs=epochs, **shape)


@dataclass(frozen=True)
class HeldOutBatches:
    """The batches of held-out examples, in the same order each time. make: makes them once more."""

    make: Callable[[], Iterator[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        return self.make()


def held_out_batches(
    examples: Mixture | None,
    labels: Labels | None,
    options: Mapping[str, Any],
    tokenizer: Any,
    images: ImageProcessor | None,
) -> HeldOutBatches | None:
    """The batches of held-out examples, of the shape of those that are trained on; None without examples."""
    if examples is None:
        return None
    return HeldOutBatches(functools.partial(run_batches, examples, labels, options, tokenizer, 0, 1, images))


def exact_match_of(examples: Mixture | None, options: Mapping[str, Any], tokenizer: Any) -> Evaluate | None:
    """Returns what computes the exact match of --eval-generate, and prints of how many held-out examples it is.

    None without the option. Raises ConfigError where no answers can be compared.
    """
    from qlora_lite.generation.compared_answers import LONGEST_ANSWER, exact_match, questions_of
    from qlora_lite.training.distributed import is_first_process

    most = options["eval_generate"]
    if most is None or examples is None:
        return None
    questions = questions_of(examples, tokenizer, most)
    what = f"with an answer of at most {LONGEST_ANSWER} tokens"
    if not questions:
        images = " and without images" if examples.has_images else ""
        raise ConfigError(f"--eval-generate found no held-out example {what} behind a prompt{images}; leave it out")
    if is_first_process():
        print(f"exact match: of {len(questions):,} held-out examples {what}")
    return lambda model: {"exact_match": exact_match(model, tokenizer, questions)}
