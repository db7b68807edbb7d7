"""`--dry-run`: everything about a stage that can be checked here, and what it will need. Nothing is started."""

from collections.abc import Iterator
from pathlib import Path

from actors.placement import asks_of, check_cluster
from actors.prepare import num_gpus, said_in_a_line
from diffrl.config import AnyConfig, ModelConfig, RLConfig
from diffrl.estimate import describe, estimate
from diffrl.models.sizes import sizes_of
from diffrl.run_folder import check_run_folder


def dry_run(config: AnyConfig, *, model: ModelConfig | None = None, resume: str | None = None) -> None:
    """Print what was checked, what could not be, and the estimates. Raises ConfigError.

    `model`: one that takes the place of a model which an earlier stage has yet to make, of the same sizes and tokenizer.
    `resume`: as of `train_supervised`.
    """
    if model is not None:
        stand_in = model.model_copy(update={"dtype": config.model.dtype, "lora": config.model.lora})
        config = config.model_copy(update={"model": stand_in})
    with said_in_a_line(config):
        check_run_folder(Path(config.run_dir), config.model.path)
        sizes = sizes_of(config.model)
        is_here = config.model.path is None or Path(config.model.path).is_dir()
    if sizes is not None and not is_here:
        print(f"{config.stage}: the config is right; nothing was started")
        for line in unchecked(config):
            print(f"not checked: {line}")
    elif isinstance(config, RLConfig):
        from actors.driver import train  # imports Ray and DeepSpeed's callers only where they are needed

        train(config, dry_run=True, resume=resume)
    else:
        from actors.stages import train_supervised

        train_supervised(config, dry_run=True, resume=resume)
    if is_here and (line := check_cluster(asks_of(config), config.ray.address)):
        print(f"not checked: {line}")
    if sizes is not None:
        print("\n".join(describe(config, estimate(config, sizes), sizes)))


def unchecked(config: AnyConfig) -> Iterator[str]:
    """What the absence of a model that is known by its name leaves open."""
    yield f"model.path {config.model.path} is not here: weights, tokenizer, and that the data fit them (sizes by its name)"
    if config.data.path is not None and not Path(config.data.path).exists():
        yield f"data.path {config.data.path} is not here"
    if gpus := num_gpus(config):
        yield f"that there are {gpus:g} GPUs, and memory enough on them"
