"""Mutants of a program, and what plain execution in a throw-away process says of them: the ground truth for the judge."""

import ast
import json
import random
import subprocess
import sys
from dataclasses import replace

from sandbox.types import Limits, Submission

LIMITS = Limits(cpu_s=1, wall_s=20)
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip

# Each test in a child of its own that has run the code before; limits as the judge sets them.
_PLAIN = """
import json, os, resource, signal, sys
job = json.load(sys.stdin)
sys.stdin = open(os.devnull)
def passes(test):
    scope = {"__name__": "solution"}
    exec(job["code"], scope)
    candidate = scope.get(job["entry_point"])
    exec(job["setup"], scope)
    exec(test, scope)
    if job["mode"] == "check_function":
        scope["check"](candidate)
for test in job["tests"]:
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_s"], job["cpu_s"]))
        resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
        signal.alarm(job["wall_s"])
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
        try:
            passes(test)
            status = 0
        finally:
            os._exit(status)
    print(os.waitpid(pid, 0)[1] == 0, flush=True)
"""


def mutants(submission: Submission, count: int) -> list[Submission]:
    """At most `count` different ones, the same ones every time.

    An operator swapped, a constant off by one, a condition negated, arguments in another order, a statement left out, a
    result replaced by None.
    """
    original = ast.unparse(ast.parse(submission.code))
    sites = [(n, way) for n, node in enumerate(ast.walk(ast.parse(submission.code))) for way in range(_ways(node))]
    random.Random(submission.id).shuffle(sites)
    found: dict[str, None] = {}
    for n, way in sites:
        tree = ast.parse(submission.code)
        _mutate(list(ast.walk(tree))[n], way)
        code = ast.unparse(ast.fix_missing_locations(tree))
        if code != original and len(found) < count:
            found[code] = None
    return [replace(submission, id=f"{submission.id}/{i}", code=code, limits=LIMITS) for i, code in enumerate(found)]


def _ways(node: ast.AST) -> int:
    """How many things can be done to a node."""
    if isinstance(node, ast.FunctionDef | ast.For):
        return len(node.body)
    if isinstance(node, ast.Constant):
        return 2 if type(node.value) is int else 0
    if isinstance(node, ast.Call):
        return int(len(node.args) > 1)
    return int(isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp | ast.AugAssign | ast.If | ast.While | ast.Return))


def _mutate(node: ast.AST, way: int) -> None:
    if isinstance(node, ast.FunctionDef | ast.For):
        if not (isinstance(node.body[way], ast.Expr) and isinstance(node.body[way].value, ast.Constant)):  # a docstring
            node.body[way] = ast.Pass()
    elif isinstance(node, ast.Constant):
        node.value += (-1, 1)[way]  # type: ignore[operator]
    elif isinstance(node, ast.Call):
        node.args.reverse()
    elif isinstance(node, ast.Compare):
        node.ops[0] = _SWAPS.get(type(node.ops[0]), type(node.ops[0]))()  # type: ignore[call-overload]
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        node.op = _SWAPS.get(type(node.op), type(node.op))()  # type: ignore[assignment]
    elif isinstance(node, ast.If | ast.While):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return):
        node.value = ast.Constant(None)


def plain_execution(submission: Submission) -> list[bool]:
    """Which tests pass when code and tests simply run in one namespace."""
    job = {
        "code": submission.code,
        "setup": submission.setup,
        "tests": submission.tests,
        "mode": submission.mode,
        "entry_point": submission.entry_point,
        "cpu_s": int(submission.limits.cpu_s),
        "wall_s": int(submission.limits.wall_s),
        "memory": submission.limits.memory_mb << 20,
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PLAIN], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    return [line == "True" for line in done.stdout.splitlines()]
