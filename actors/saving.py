"""What an RL run leaves on the disk beside its records: model folders and checkpoints."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from actors.learner import Learner
from actors.run_start import RunStart
from actors.weights import Weights, fetch, fetch_tensors
from diffrl.buffered import GROUPS
from diffrl.checkpoint import RunState, checkpoint_path, commit, discard, part_path, prune
from diffrl.config import ModelConfig
from diffrl.models.folders import save_folder
from diffrl.models.lora import save_adapter
from diffrl.run_folder import require_newest


def write_checkpoint(
    start: RunStart,
    state: RunState,
    learner: Learner,
    weights: Weights,
    reference: Weights | None,
    tokenizer: PreTrainedTokenizerFast,
    save_groups: Callable[[Path], None] | None,
    *,
    keep: int,
) -> None:
    """Commit a checkpoint of the run, then delete those that are no longer kept. It holds the learner's state in
    `learner`, the policy as a Hugging Face folder in `model`, the `reference`, where it is not the policy itself, and the
    `groups` that wait for their step, where there are any.

    Raises RunStoppedError when it cannot be written, and when the run has been started again elsewhere.
    """
    checkpoint = checkpoint_path(start.folder, state.step)
    part = part_path(checkpoint, start.attempt.number)
    discard(part)
    learner.save((part / "learner").resolve())
    export_policy(weights, tokenizer, part / "model")
    if reference is not None:
        save_folder(reference.hf_config, fetch(reference), part / "reference")
    if save_groups is not None:
        save_groups(part / GROUPS)
    require_newest(start.folder, start.attempt)
    commit(part, checkpoint, state.note())
    learner.saved = (checkpoint / "learner").resolve()
    prune(start.folder, keep=keep)


def export_policy(weights: Weights, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    save_folder(weights.hf_config, fetch(weights), path)
    tokenizer.save_pretrained(path)


def export_adapter(weights: Weights, model: ModelConfig, path: Path) -> None:
    """The adapters alone, as peft reads them."""
    assert weights.adapter is not None and model.lora is not None
    tensors = fetch_tensors(weights.adapter.tensors, weights.version)
    save_adapter(tensors, model.lora, path, base_path=model.path)
