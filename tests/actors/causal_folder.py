"""A small autoregressive model that was taught a few programs, and a server that speaks OpenAI's chat completions."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from diffrl.data.sft import fenced
from diffrl.models.tiny import load_tokenizer, tiny_config, train_tokenizer
from diffrl.prompts import build_prompt, chat_ids
from diffrl.types import Problem


def causal_folder(path: Path, problems: Sequence[Problem], *, steps: int = 60, hidden_size: int = 64) -> Path:
    """Trained on (problem, its solution) until it knows most of them by heart."""
    texts = [f"{build_prompt(problem)}\n{fenced(problem.solution or '')}" for problem in problems]
    tokenizer = train_tokenizer(texts * 3, 400)
    config = tiny_config(tokenizer, hidden_size=hidden_size, num_layers=2, max_positions=160)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    rows = [
        [*chat_ids(tokenizer, p), *tokenizer.encode(fenced(p.solution or "")), int(tokenizer.eos_token_id or 0)]
        for p in problems
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    assert load_tokenizer(path).chat_template
    return path


Answer = Callable[[dict[str, Any], int], tuple[int, Any]]  # (request's body, its number) -> status, JSON or raw bytes


class Server:
    """Counts requests; what it answers is the test's business."""

    def __init__(self, answer: Answer, models: Sequence[str]):
        self.answer, self.models = answer, models
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def served(answer: Answer, models: Sequence[str] = ("tiny",)) -> Iterator[Server]:
    server = Server(answer, models)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"object": "list", "data": [{"id": name} for name in server.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(body)
                server.keys.append(self.headers.get("Authorization"))
                number = len(server.requests)
            self.reply(*server.answer(body, number))

        def reply(self, status: int, found: Any) -> None:
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http_server.server_address[1]}/v1"
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


def completion(text: str, num_tokens: int = 7) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"completion_tokens": num_tokens},
    }
