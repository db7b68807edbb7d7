"""The board's web server, and what keeps it safe.

What models wrote is shown to a browser, so: it travels as JSON and is put on pages as text alone; pages load nothing but the
files of `static/` (content security policy); nothing can be changed (GET and HEAD only). Who may read:

- It listens on loopback unless told otherwise. Then, and wherever a token is given, every request needs the token: once as
  `?token=` in the address, which is answered with a cookie, or as `Authorization: Bearer`. It travels unencrypted: across a
  network that others can read, use a tunnel.
- A web page of someone else cannot read it through a name that leads here (DNS rebinding): the Host header must be an
  IP address, localhost, this machine's name or one given with --name. Nor does the cookie go with others' requests.
- Files are served from a list made at start, never by a path from the address.
"""

import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import parse_qsl, urlencode, urlsplit

from diffrl.board.api import Board
from diffrl.board.run import open_run
from diffrl.errors import ConfigError, shown

DEFAULT_PORT = 8266  # beside Ray's dashboard
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
    "data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MIN_TOKEN = 16  # characters
SECONDS_PER_REQUEST = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardOptions:
    """BoardOptions(host="0.0.0.0", port=8266, token="s3cret-of-sixteen", names=("box.local",), tokenizer=None)"""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT  # 0: a free one
    token: str | None = None
    names: tuple[str, ...] = ()  # by which it may be asked for, besides its addresses
    tokenizer: str | None = None  # folder


class BoardServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, board: Board, options: BoardOptions):
        self.board = board
        self.token = token_for(options)
        self.names = {"localhost", socket.gethostname().casefold(), *(name.casefold() for name in options.names)}
        self.static = static_files()
        if ":" in options.host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((options.host, options.port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--host, --port: cannot listen on {shown(options.host)}, port {options.port} ({error}); choose others"
            ) from None
        self.cookie_name = f"diffrl_board_{self.server_port}"  # cookies do not know ports

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def cookie(self) -> str:
        """What the cookie holds: not the token itself."""
        assert self.token is not None
        return hmac.digest(self.token.encode(), b"diffrl board cookie", hashlib.sha256).hex()


def token_for(options: BoardOptions) -> str | None:
    """The given token, one made now where the board can be reached from elsewhere, None on loopback."""
    if options.token is not None:
        if len(options.token) < MIN_TOKEN or not options.token.isascii() or not options.token.isprintable():
            raise ConfigError(
                f"--token: must have at least {MIN_TOKEN} printable ASCII characters; leave it out to get one"
            )
        return options.token
    return None if is_loopback(options.host) else secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or "" for all addresses
        return False


def static_files() -> dict[str, tuple[str, bytes]]:
    """Path of the address -> content type and bytes."""
    found = {}
    for file in files("diffrl.board").joinpath("static").iterdir():
        ending = file.name[file.name.rfind(".") :]
        if ending in CONTENT_TYPES:
            found[f"/static/{file.name}"] = (CONTENT_TYPES[ending], file.read_bytes())
    return found | {"/": found["/static/index.html"]}


def host_name(header: str) -> str:
    """Of a Host header, without its port."""
    name = header.strip().casefold()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    server: BoardServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffrl", ""
    timeout = SECONDS_PER_REQUEST

    def do_GET(self) -> None:
        try:
            self.respond()
        except (ConnectionError, TimeoutError):  # the browser has left
            self.close_connection = True

    do_HEAD = do_GET

    def refuse_method(self) -> None:
        self.close_connection = True  # a body may follow
        self.send(405, "text/plain; charset=utf-8", b"This board is read-only: GET and HEAD\n", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = refuse_method

    def respond(self) -> None:
        if not self.host_is_ours():
            self.say(421, "This board is not reached by that name: use its address, or start it with --name NAME")
            return
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query, keep_blank_values=True, max_num_fields=50))
        if self.server.token is not None and not self.is_admitted():
            if self.is_token(query.pop("token", "")):
                self.admit(address.path, query)
            else:
                self.say(
                    401, "This board needs its token: open the address that `diffrl board` printed when it started"
                )
            return
        if address.path.startswith("/api/"):
            self.answer(address.path.removeprefix("/api/"), query)
        elif address.path in self.server.static:
            self.send(200, *self.server.static[address.path])
        else:
            self.say(404, "There is no such page")

    def host_is_ours(self) -> bool:
        hosts = self.headers.get_all("Host") or []
        return len(hosts) == 1 and ((name := host_name(hosts[0])) in self.server.names or is_address(name))

    def is_token(self, given: str) -> bool:
        assert self.server.token is not None
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode())

    def is_admitted(self) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind == "Bearer" and self.is_token(given):
            return True
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie_name)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.server.cookie().encode())

    def admit(self, path: str, query: Mapping[str, str]) -> None:
        """To the same address without the token, so that it stays out of the browser's history."""
        known = path if path in self.server.static or path.startswith("/api/") else "/"
        cookie = f"{self.server.cookie_name}={self.server.cookie()}; Path=/; HttpOnly; SameSite=Strict"
        location = urlsplit(known)._replace(query=urlencode(query)).geturl()
        self.send(303, "text/plain; charset=utf-8", b"", {"Set-Cookie": cookie, "Location": location})

    def answer(self, name: str, query: Mapping[str, str]) -> None:
        try:
            status, value = 200, self.server.board.answer(name, query)
        except LookupError as error:
            status, value = 404, {"error": str(error.args[0] if error.args else error)}
        except (
            ValueError,
            OSError,
        ) as error:  # a question that makes no sense; a file that has been damaged or removed
            status, value = 400, {"error": str(error)}
        body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
        self.send(status, "application/json; charset=utf-8", body)

    def say(self, status: int, text: str) -> None:
        self.send(status, "text/plain; charset=utf-8", f"{text}\n".encode())

    def send(self, status: int, content_type: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), **HEADERS, **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself gets the same headers, and repeats nothing of the request."""
        self.close_connection = True
        self.send(code, "text/plain; charset=utf-8", b"This request cannot be understood\n")

    def log_message(self, format: str, *args: object) -> None:
        """Silent: addresses may hold the token."""


def open_board(folders: Sequence[str], options: BoardOptions) -> BoardServer:
    """Raises ConfigError for what cannot be shown or listened on."""
    if not 0 <= options.port < 65_536:
        raise ConfigError(f"--port: {options.port} must be from 0 (a free one) to 65535")
    board = Board([open_run(folder, options.tokenizer) for folder in folders])
    server = BoardServer(board, options)
    board.start()
    return server


def serve(folders: Sequence[str], options: BoardOptions) -> None:
    """Until Ctrl-C. The line on stdout is the address to open."""
    with open_board(folders, options) as server:
        print(f"{server.url}{f'?token={server.token}' if server.token else ''}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.board.close()
