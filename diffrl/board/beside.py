"""`python -m diffrl.board.beside FOLDER PORT`: the board of a run that is going on, until standard input ends.

As `diffrl board` on loopback, at a low priority; DIFFRL_BOARD_TOKEN is its token. The first line of its output is the address,
or says why there is none.
"""

import os
import sys
import threading

from diffrl.board.server import BoardOptions, open_board
from diffrl.errors import ConfigError

NICENESS = 10  # the run comes first


def main(folder: str, port: str) -> int:
    os.nice(NICENESS)
    try:
        server = open_board([folder], BoardOptions(port=int(port), token=os.environ.get("DIFFRL_BOARD_TOKEN") or None))
    except ConfigError as error:
        print(error, flush=True)
        return 2
    with server:
        print(f"{server.url}{' (it asks for DIFFRL_BOARD_TOKEN)' if server.token else ''}", flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.buffer.read()
        server.board.close()
        server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
