"""The backend `openai`: completions from a server that speaks OpenAI's chat completions, over plain HTTP.

One request a sample, `concurrency` of them at a time and at most `requests_per_minute`. What is refused for now (429, 5xx, no
answer, half an answer) is asked again after 0.5 s, 1 s, 2 s, ... (or the server's Retry-After), `max_retries` times; then the
run stops, and the same command goes on where it was. A problem that the server calls wrong (400, 413, 422: mostly too
long) is skipped.
"""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from actors.completions import Completion, Sampled, seeds_of
from diffrl.config.curate import CurateConfig
from diffrl.errors import ConfigError, RunStoppedError, shown, suggestion
from diffrl.prompts import build_prompt
from diffrl.types import Problem

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
CHECK_S = 20.0  # for the answer to a question without work
MAX_SEED = 2**31 - 1  # of many servers
WRONG = (400, 413, 422)  # statuses that the request itself is to blame for


class RefusedError(Exception):
    """The server calls the request wrong."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer. Failure(429, "Too Many Requests", wait_s=2.0)"""

    status: int | None
    reason: str
    wait_s: float | None = None  # as the server asks

    def __str__(self) -> str:
        return f"{self.status} {self.reason}".strip() if self.status else self.reason


class Pace:
    """Lets calls through, evenly spaced, at most so many a minute."""

    def __init__(self, per_minute: float | None):
        self.gap_s = 0.0 if per_minute is None else 60.0 / per_minute
        self.next_at = 0.0
        self.lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        with self.lock:
            at = max(self.next_at, time.monotonic())
            self.next_at = at + self.gap_s
        stopped.wait(max(at - time.monotonic(), 0.0))


class OpenAISampler:
    def __init__(self, config: CurateConfig, name: str):
        """Asks the server which models it has. Raises ConfigError."""
        self.config, self.name, self.model = config, name, config.models[name]
        self.url = cast(str, self.model.url).rstrip("/")
        self.key = ""
        if self.model.api_key_env is not None:
            self.key = os.environ.get(self.model.api_key_env, "")
            if not self.key:
                raise ConfigError(
                    f"models.{name}.api_key_env: the environment has no {self.model.api_key_env}; set it to the server's key"
                )
        self.stopped = threading.Event()
        self.pace = Pace(self.model.requests_per_minute)
        self.check()

    def check(self) -> None:
        found = self.ask("/models", None, CHECK_S)
        if isinstance(found, Failure):
            if found.status in (401, 403):
                raise ConfigError(
                    f"models.{self.name}.api_key_env: {self.url} refuses the key ({found}); name the variable that holds it"
                )
            raise ConfigError(
                f"models.{self.name}.url: {self.url} does not answer as a server of models ({found}); start it, or mend the url"
            )
        data = found.get("data")
        served = [str(row.get("id")) for row in data if isinstance(row, dict)] if isinstance(data, list) else []
        wanted = cast(str, self.model.model)
        if wanted not in served:
            raise ConfigError(
                f"models.{self.name}.model: {wanted!r} is not served by {self.url}{suggestion(wanted, served)}; it has "
                f"{shown(', '.join(served) or 'none')}"
            )

    def sample(self, problems: Iterable[Problem]) -> Iterator[Sampled]:
        """In the order of the problems, a few of them under way."""
        pending: deque[tuple[Problem, list[Future[Completion]]]] = deque()
        room = 2 * self.model.concurrency  # requests
        threads = ThreadPoolExecutor(self.model.concurrency)
        try:
            for problem in problems:
                seeds = seeds_of(self.config, self.name, problem)
                pending.append((problem, [threads.submit(self.complete, problem, seed) for seed in seeds]))
                while len(pending) > 1 and sum(len(futures) for _, futures in pending) > room:
                    yield finished(*pending.popleft())
            while pending:
                yield finished(*pending.popleft())
        finally:
            self.stopped.set()  # what waits for another try gives up
            threads.shutdown(cancel_futures=True)
            self.stopped.clear()

    def complete(self, problem: Problem, seed: int) -> Completion:
        """Raises RefusedError, RunStoppedError."""
        model = self.model
        body: dict[str, Any] = {
            "model": model.model,
            "messages": [{"role": "user", "content": build_prompt(problem)}],
            "max_tokens": model.max_tokens,
            "temperature": model.temperature,
            "seed": seed % MAX_SEED,
        }
        body |= {key: value for key, value in {"top_p": model.top_p, "top_k": model.top_k}.items() if value is not None}
        wait_s = FIRST_WAIT_S
        for tries in range(1, model.max_retries + 2):
            self.pace.wait(self.stopped)
            if self.stopped.is_set():
                break
            found = self.ask("/chat/completions", body, model.timeout_s)
            completion = completion_of(found) if isinstance(found, dict) else found
            if isinstance(completion, Completion):
                return completion
            if completion.status in WRONG:
                raise RefusedError(f"the server refuses the request: {completion}")
            if completion.status is not None and completion.status < 500 and completion.status not in (408, 429):
                raise RunStoppedError(f"models.{self.name}.url: {self.url} answers {completion}")
            if tries <= model.max_retries:
                pause = completion.wait_s if completion.wait_s is not None else wait_s * (1 + random.random() / 4)
                self.stopped.wait(min(pause, LONGEST_WAIT_S))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                raise RunStoppedError(
                    f"models.{self.name}.url: {self.url} gave no answer in {tries} tries, at last {completion}; mend it and "
                    "start the same command again: it goes on where it was"
                )
        raise RunStoppedError(f"models.{self.name}: sampling was stopped")

    def ask(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any] | Failure:
        """The JSON object that the server answers with. A GET without a body."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode(errors="replace")
            return Failure(error.code, message_of(said) or str(error.reason), seconds(error.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            return Failure(None, str(getattr(error, "reason", error)) or type(error).__name__)
        except ValueError as error:  # no JSON; an address that is none
            return Failure(None, f"no JSON: {error}")
        return found if isinstance(found, dict) else Failure(None, "no JSON object")

    def close(self) -> None:
        self.stopped.set()


def finished(problem: Problem, futures: list[Future[Completion]]) -> Sampled:
    """Once all of a problem's requests are."""
    try:
        return Sampled(problem=problem, completions=tuple(future.result() for future in futures))
    except RefusedError as error:
        return Sampled(problem=problem, skipped=str(error))


def completion_of(answer: dict[str, Any]) -> Completion | Failure:
    try:
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        return Completion(
            text=text if isinstance(text, str) else "", num_tokens=int(usage.get("completion_tokens") or 0)
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return Failure(None, f"an answer that is no completion ({type(error).__name__} {error})")


def message_of(said: str) -> str:
    """What an error's body says, in one line."""
    try:
        raw = json.loads(said)
        inner = raw.get("error", raw)
        text = inner.get("message") if isinstance(inner, dict) else inner
    except (ValueError, AttributeError):
        text = said
    return " ".join(str(text or "").split())[:300]


def seconds(header: str | None) -> float | None:
    """Of a Retry-After in seconds; a date is not read."""
    return float(header) if header is not None and header.isdecimal() else None
