"""Which of the program's names a test uses as sources of objects, read from the test's source alone.

Most tests call functions and compare plain values. There an instance of the program's own class is a wrong answer, and
nothing that it does may count. A test that constructs a class of the program, reads `node.next`, or checks
`isinstance(shape, Circle)` is about objects. The program cannot make a test one or the other.

A name is a source of objects when the test
- reads an attribute that no plain value has from it, from what it returns, or from a variable that is made with it,
- subclasses it, or gives it to isinstance or issubclass, or
- writes it in CapWords (`Stack` or `BST`, not `Find_Max`).
Where an attribute is read from something that cannot be followed (a parameter), every name counts.
"""

import ast
import re
from collections.abc import Iterator, Sequence

from sandbox.judge.value_types import PURE_MODULES, VALUE_ATTRIBUTES

_CAP_WORDS = re.compile(r"[A-Z][A-Za-z0-9]*")
_COMMON_MODULES = PURE_MODULES | {"np", "numpy", "os", "sys", "asyncio", "types"}  # if imported by the program
_SHARED_STREAMS = frozenset({"redirect_stdout", "redirect_stderr"})
_SHARED = _SHARED_STREAMS | {"sys.stdin", "sys.stdout", "sys.stderr", "open", "patch"}
_SHARED |= {"tempfile", "unittest.mock", "random.seed", "os.environ"}
SHARED_WORDS = frozenset(word for name in _SHARED for word in name.split("."))  # one of them is in every such test
_SELF = {"self", "cls"}


def sources_of_objects(sources: Sequence[str], names: frozenset[str], entry_point: str | None) -> frozenset[str]:
    """Those of the program's `names` that yield objects in a test made of `sources`.

    An entry point in CapWords may still be a function, so it is one of them only when the test shows it.
    """
    return _shown(sources, names) | {name for name in names if name != entry_point and _CAP_WORDS.fullmatch(name)}


def sources_in_cap_words(names: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name in names if _CAP_WORDS.fullmatch(name))


def called_names(sources: Sequence[str]) -> frozenset[str]:
    """Names that the test calls, as in `name(...)`."""
    return frozenset(call.func.id for call in _calls(sources) if isinstance(call.func, ast.Name))


def checking_names(sources: Sequence[str], names: frozenset[str]) -> frozenset[str]:
    """Names that the test calls with what it got from others of `names`, as in `Counter(f(2)) == Counter("aa")`."""
    found = set()
    for name in names:
        made = set(names - {name})
        for node in _nodes(sources):
            made |= {target for target, made_with in _bindings(node) if made_with & made}
        calls = [call for call in _calls(sources) if isinstance(call.func, ast.Name) and call.func.id == name]
        if any(_names_in(argument) & made for call in calls for argument in call.args):
            found.add(name)
    return frozenset(found)


def shares_state(sources: Sequence[str]) -> bool:
    """Whether the test prepares or watches what only one process has: standard streams, files, seeds, patches."""
    for node in _nodes(sources):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if f"{node.value.id}.{node.attr}" in _SHARED or node.attr in _SHARED_STREAMS:
                return True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in _SHARED:
            return True
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            if not _SHARED.isdisjoint(modules):
                return True
    return False


def _calls(sources: Sequence[str]) -> Iterator[ast.Call]:
    return (node for node in _nodes(sources) if isinstance(node, ast.Call))


def _nodes(sources: Sequence[str]) -> Iterator[ast.AST]:
    return (node for source in sources for node in ast.walk(ast.parse(source)))


def _shown(sources: Sequence[str], names: frozenset[str]) -> frozenset[str]:
    flows: dict[str, set[str]] = {}  # name -> names that what is bound to it was made with
    open_names: set[str] = set()  # parameters, bound to anything
    used: set[str] = set()  # names from which objects come
    modules = _modules(sources)
    for node in _nodes(sources):
        for target, made_with in _bindings(node):
            if target not in modules:  # math.isclose(f(2), 4) changes nothing
                flows.setdefault(target, set()).update(made_with)
        if isinstance(node, ast.arg) and node.arg not in _SELF:
            open_names.add(node.arg)
        elif isinstance(node, ast.Attribute) and node.attr not in VALUE_ATTRIBUTES and not _is_self(node.value):
            used |= _names_in(node.value) - modules
        elif isinstance(node, ast.ClassDef):
            used |= {name for base in node.bases for name in _names_in(base)}
        elif isinstance(node, ast.Call) and _names_in(node.func) & {"isinstance", "issubclass"}:
            used |= {name for argument in node.args[1:] for name in _names_in(argument)}
    todo, reached = list(used), set(used)
    while todo:
        for name in flows.get(todo.pop(), set()) - reached:
            reached.add(name)
            todo.append(name)
    return names if reached & open_names else names & reached


def _modules(sources: Sequence[str]) -> set[str]:
    """Names that stand for a module in the test, or for what it imports from one."""
    imports = [node for node in _nodes(sources) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    stored = {n.id for n in _nodes(sources) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return imported | (_COMMON_MODULES - stored)


def _bindings(node: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """(name, names that its new value is made with) for each name that a node binds or changes."""
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
        pairs = [(node.target, node.value)]
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        pairs = [(node.target, node.iter)]
    elif isinstance(node, ast.withitem):
        pairs = [(node.optional_vars, node.context_expr)]
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        pairs = [(ast.Name(node.name), node)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # items.append(f(2))
        pairs = [(node.func.value, argument) for argument in [*node.args, *(k.value for k in node.keywords)]]
    else:
        return
    for target, value in pairs:
        if target is not None and value is not None:
            for name in _names_in(target):
                yield name, _names_in(value)


def _names_in(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in _SELF
