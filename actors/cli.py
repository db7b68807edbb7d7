"""The `diffrl` command: train, eval, generate, config. Bad input is one line on stderr and exit status 2."""

import sys
from typing import Annotated

import typer

from diffrl.config import RLConfig
from diffrl.config_file import dump_config, load_config
from diffrl.errors import ConfigError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning from unit tests for masked diffusion language models.",
)

ConfigPath = Annotated[str, typer.Argument(help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=20")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, start nothing")] = False,
) -> None:
    """Run one stage: pretrain, midtrain, sft or rl, whatever the config says."""
    resolved = load_config(config, overrides or [])
    if isinstance(resolved, RLConfig):
        from actors.driver import train as train_rl  # imports Ray and torch: not for `diffrl --help`

        train_rl(resolved, dry_run=dry_run)
    else:
        from actors.stages import train_supervised

        train_supervised(resolved, dry_run=dry_run)


@app.command(name="config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved config, defaults included."""
    print(dump_config(load_config(config, overrides or [])), end="")


@app.command(name="eval")
def evaluate(
    benchmark: Annotated[str, typer.Option(help="humaneval")],
    data: Annotated[str, typer.Option(help="the benchmark's own file")],
    solutions: Annotated[str, typer.Option(help="canonical: judge the data set's own solutions")] = "canonical",
    allow_unisolated: Annotated[bool, typer.Option(help="judge without bubblewrap")] = False,
) -> None:
    """Judge a benchmark's solutions in the sandbox."""
    from actors.commands import judge_solutions

    judge_solutions(benchmark, data, solutions, allow_unisolated=allow_unisolated)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Hugging Face folder, such as runs/quickstart/model")],
    prompt: Annotated[str, typer.Option(help="what the program should do")],
    steps: int = 34,
    tokens: int = 34,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> None:
    """Sample completions of one prompt in this process."""
    from actors.commands import generate_texts

    for text in generate_texts(model, prompt, steps, tokens, temperature, samples, seed):
        print(text)


def main() -> None:
    try:
        app()
    except ConfigError as error:
        print(f"diffrl: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
