"""`--dry-run`: everything about a stage that can be checked here, and what it will need. Nothing is started."""

from collections.abc import Iterator
from pathlib import Path

from diffrl.config import AnyConfig, ModelConfig, RLConfig
from diffrl.errors import ConfigError
from diffrl.estimate import describe, estimate
from diffrl.models.sizes import Sizes, sizes_of


def dry_run(config: AnyConfig, *, model: ModelConfig | None = None, resume: str | None = None) -> None:
    """Print what was checked, what could not be, and the estimates. Raises ConfigError.

    `model`: one that takes the place of a model which an earlier stage has yet to make, of the same sizes and tokenizer.
    """
    if model is not None:
        stand_in = model.model_copy(update={"dtype": config.model.dtype, "lora": config.model.lora})
        config = config.model_copy(update={"model": stand_in})
    sizes = known_sizes(config.model)
    if sizes is not None and config.model.path is not None and not Path(config.model.path).is_dir():
        print(f"{config.stage}: the config is right; nothing was started")
        for line in unchecked(config):
            print(f"not checked: {line}")
    elif isinstance(config, RLConfig):
        from actors.driver import train  # imports Ray and DeepSpeed's callers only where they are needed

        train(config, dry_run=True, resume=resume)
    else:
        from actors.stages import train_supervised

        train_supervised(config, dry_run=True, resume=resume)
    if sizes is not None:
        print("\n".join(describe(config, estimate(config, sizes), sizes)))


def known_sizes(model: ModelConfig) -> Sizes | None:
    try:
        return sizes_of(model)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def unchecked(config: AnyConfig) -> Iterator[str]:
    """What the absence of a model that is known by its name leaves open."""
    yield f"model.path {config.model.path} is not here: weights, tokenizer, and that the data fit them (sizes by its name)"
    if config.data.path is not None and not Path(config.data.path).exists():
        yield f"data.path {config.data.path} is not here"
    gpus = (
        config.num_gpus if isinstance(config, RLConfig) else config.workers.num_workers * config.workers.gpus_per_worker
    )
    if gpus:
        yield f"that there are {gpus:g} GPUs, and memory enough on them"
