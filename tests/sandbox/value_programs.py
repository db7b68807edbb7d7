"""Programs about value types: right ones that must be paid in full, and lying objects that must not be paid.

A case is one program, its tests, the pass rate that a correct judge gives, and the trust it may claim. The right ones
pass in plain Python as well (a test checks that), so none of them asks for more than Python does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CROSSES = "it crosses as the value it is"
REMOTE = "it stays where it is and is used from afar"
IN_PLACE = "what is changed in place is changed on both sides"
CALLS_BACK = "calls go both ways, and so do exceptions"
DECIDES = "the program's own classes decide, and the verdict says so"
NEEDS_ONE_PROCESS = "the test needs one process, and the verdict says so"
NO_LIES = "a lying object is worth no more than the plain value it is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One program.

    Case(name="enum_is_returned", property=CROSSES, code=ENUMS, tests=("assert f() is Color.RED",), accept=1.0)
    """

    name: str
    property: str
    code: str
    tests: tuple[str, ...]
    accept: float
    trust: str = "high"
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of the Submission


def right(property: str, code: str, trust: str = "high", **tests: tuple[str, ...]) -> list[Case]:
    """A case for each keyword: its name and its tests."""
    return [Case(name=n, property=property, code=code, tests=t, accept=1.0, trust=trust) for n, t in tests.items()]


def lies(code: str, options: Mapping[str, Any] | None = None, **tests: tuple[str, ...]) -> list[Case]:
    return [
        Case(name=name, property=NO_LIES, code=code, tests=test, accept=0.0, options=options or {})
        for name, test in tests.items()
    ]


ENUMS = """
from enum import *
class Color(Enum):
    RED = 1
    GREEN = 2
    CRIMSON = 1
    @property
    def hot(self): return self is Color.RED
    def mix(self, other): return f"{self.name}+{other.name}"
    @classmethod
    def parse(cls, text): return cls[text.upper()]
class Size(IntEnum):
    S = auto()
    M = auto()
class Mode(StrEnum):
    A = auto()
    B = "bee"
class Perm(Flag):
    R = 4
    W = 2
    X = 1
    RW = R | W
class IPerm(IntFlag):
    R = 4
    W = 2
class Shout(str, Enum): HI = "hi"
class Planet(Enum):
    EARTH = (5.0, 6.0)
    def __init__(self, mass, radius): self.mass, self.radius = mass, radius
    @property
    def g(self): return self.mass / self.radius ** 2
class Level(Enum):
    LOW = 1
    HIGH = 2
    def __lt__(self, other): return self.value < other.value
    def __str__(self): return self.name.lower()
class Fuzzy(Enum):
    YES = "yes"
    @classmethod
    def _missing_(cls, value): return cls.YES if value.lower() == "yes" else None
class Op(Enum):
    ADD = "+"
    def __call__(self, a, b): return a + b
class Odd(Enum):
    LIST = [1, 2]
    PAIR = (1, "x")
Dynamic = Enum("Dynamic", "A B")
def f(n=1): return Color(n)
def same(x): return x
def is_red(c): return c is Color.RED
def names(colors): return [c.name for c in colors]
def count(colors): return {c: colors.count(c) for c in colors}
def rw(): return Perm.R | Perm.W
def can_read(p): return Perm.R in p
def value_of(member): return member.value
def status():
    from http import HTTPStatus
    return HTTPStatus.NOT_FOUND
"""

RIGHT_ENUMS = [
    *right(
        CROSSES,
        ENUMS,
        enum_returned=("assert f() == Color.RED and f() is Color.RED", "assert f(2) != Color.RED and f(2) != 2"),
        enum_looked_up=("assert Color['RED'] is f(1)", "assert Color(2) is f(2)", "assert Color.CRIMSON is Color.RED"),
        enum_iterated=("assert [c.name for c in Color] == ['RED', 'GREEN'] and len(Color) == 2 and f() in Color",),
        enum_members=("assert list(Color.__members__) == ['RED', 'GREEN', 'CRIMSON']",),
        enum_name_and_value=("assert f().name == 'RED' and f(2).value == 2",),
        enum_types=("assert isinstance(f(), Color) and type(f()) is Color and Color.__name__ == 'Color'",),
        enum_as_argument=(
            "assert is_red(Color.RED) and not is_red(Color.GREEN)",
            "assert names([*Color]) == ['RED', 'GREEN']",
        ),
        enum_as_key=(
            "assert count([Color.RED, *Color]) == {Color.RED: 2, Color.GREEN: 1}",
            "assert {f(): 1}[Color.RED] == 1",
        ),
        enum_nested=("assert same([f(1), {'a': (f(2),)}]) == [Color.RED, {'a': (Color.GREEN,)}]",),
        enum_methods=("assert f().hot and not f(2).hot", "assert f().mix(Color.GREEN) == 'RED+GREEN'"),
        enum_class_methods=("assert Color.parse('green') is Color.GREEN",),
        enum_text=("assert str(f()) == 'Color.RED' and repr(f()) == '<Color.RED: 1>'",),
        enum_refuses=(
            "try: Color(7)\nexcept ValueError: pass\nelse: assert False",
            "try: Color['X']\nexcept KeyError: pass\nelse: assert False",
            "try: Color.RED < Color.GREEN\nexcept TypeError: pass\nelse: assert False",
            "try: Color.RED = 3\nexcept (AttributeError, TypeError): pass\nelse: assert False",
        ),
        int_enum=(
            "assert same(Size.S) is Size.S == 1 and Size.S + 1 == 2 and isinstance(same(Size.S), int)",
            "assert Size.S < Size.M == max(Size) and sorted([Size.M, Size.S]) == [1, 2]",
        ),
        str_enum=("assert same(Mode.B) == Mode.B == 'bee' and Mode.A == 'a' and same(Mode.B).upper() == 'BEE'",),
        mixed_enum=("assert same(Shout.HI) == 'hi' and Shout('hi') is Shout.HI",),
        flags=(
            "assert rw() == Perm.R | Perm.W and rw() is Perm.RW and Perm.R in rw() and Perm.X not in rw()",
            "assert rw().value == 6 and not rw() & Perm.X and ~Perm.R == Perm.W | Perm.X",
            "assert set(rw()) == {Perm.R, Perm.W} and len(rw()) == 2",
            "assert can_read(Perm.R | Perm.X) and not can_read(Perm.X)",
            "assert same(IPerm.R | IPerm.W) == 6",
        ),
        enum_with_attributes=("assert Planet.EARTH.mass == 5.0 and abs(Planet.EARTH.g - 5 / 36) < 1e-9",),
        enum_with_own_text=("assert str(Level.LOW) == 'low' and f'{Level.HIGH}' == 'high'",),
        enum_with_own_lookup=("assert Fuzzy('YES') is Fuzzy.YES",),
        enum_called=("assert Op.ADD(1, 2) == 3 and Op('+') is Op.ADD",),
        enum_with_odd_values=(
            "assert Odd.LIST.value == [1, 2] and Odd((1, 'x')) is Odd.PAIR and same(Odd.LIST) is Odd.LIST",
        ),
        enum_made_by_call=("assert Dynamic.A.value == 1 and same(Dynamic.B) is Dynamic.B",),
        enum_of_the_test=(
            "import enum\nclass Mine(enum.Enum):\n    A = 5\nassert value_of(Mine.A) == 5 and same([Mine.A]) == [Mine.A]",
        ),
        enum_of_the_library=(
            "from http import HTTPStatus\nassert status() is HTTPStatus.NOT_FOUND and status() == 404",
        ),
    ),
    *right(DECIDES, ENUMS, "low", enum_with_own_order=("assert Level.LOW < Level.HIGH",)),
]

NAMED_TUPLES = """
from collections import namedtuple
from typing import NamedTuple
Point = namedtuple("Point", "x y", defaults=[7])
Renamed = namedtuple("Renamed", ["class", "x", "x"], rename=True)
class Pair(NamedTuple):
    x: int
    y: int = 2
    @property
    def total(self): return self.x + self.y
    def shift(self, d): return Pair(self.x + d, self.y + d)
    def __add__(self, o): return Pair(self.x + o.x, self.y + o.y)
    def __str__(self): return f"<{self.x},{self.y}>"
    @classmethod
    def origin(cls): return cls(0, 0)
class Norm(namedtuple("Norm", "a b")):
    def __new__(cls, a, b=None): return super().__new__(cls, a, a if b is None else b)
    @property
    def s(self): return self.a + self.b
class Record(NamedTuple):
    name: str
    items: list
def f(x): return Point(x, x + 1)
def swap(p): return p._replace(x=p.y, y=p.x)
def total(p): return p.total
def best(points): return max(points, key=lambda p: p.x)
def grow(record): record.items.append(1); return record.name
def area(r): return r.w * r.h
"""

RIGHT_NAMED_TUPLES = right(
    CROSSES,
    NAMED_TUPLES,
    named_tuple_returned=(
        "assert f(1) == (1, 2) and f(1).x == 1 and f(1) == Point(1, 2)",
        "a, b = f(3); assert (a, b) == (3, 4)",
    ),
    named_tuple_passed=("assert swap(Point(1, 2)) == Point(2, 1)", "assert best([Point(1), Point(3)]).x == 3"),
    named_tuple_made=(
        "assert Point(1).y == 7 and Point(x=3, y=4)._asdict() == {'x': 3, 'y': 4}",
        "assert Point._make([1, 2]) == f(1)",
    ),
    named_tuple_replaced=("assert f(1)._replace(x=5) == (5, 2) and Point._fields == ('x', 'y')",),
    named_tuple_text=("assert repr(f(1)) == 'Point(x=1, y=2)' and str(Pair(1)) == '<1,2>'",),
    named_tuple_types=("assert isinstance(f(1), Point) and isinstance(f(1), tuple) and {f(1): 'a'}[(1, 2)] == 'a'",),
    named_tuple_methods=(
        "assert total(Pair(1, 5)) == 6 and Pair(1).total == 3",
        "assert Pair(1, 2).shift(3) == Pair(4, 5)",
    ),
    named_tuple_operator=("assert Pair(1) + Pair(2) == Pair(3, 4)",),
    named_tuple_class_method=("assert Pair.origin() == (0, 0)",),
    named_tuple_with_own_constructor=("assert Norm(3) == (3, 3) and Norm(1, 2).s == 3",),
    named_tuple_renamed=("assert Renamed(1, 2, 3)._fields == ('_0', 'x', '_2')",),
    named_tuple_holds_a_list=("x = []; assert grow(Record('n', x)) == 'n' and x == [1]",),
    named_tuple_of_the_test=(
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\np = swap(P(1, 2)); assert p == P(2, 1) and type(p) is P",
        "from typing import NamedTuple\nclass R(NamedTuple):\n    w: int\n    h: int\nassert area(R(2, 3)) == 6",
    ),
)

STANDARD = """
from collections import *
from decimal import Decimal
from fractions import Fraction
import array, datetime, ipaddress, math, pathlib, re, types, uuid, zoneinfo
def same(x): return x
def get(name): return {
    "deque": deque([1, 2], maxlen=2), "counter": Counter("aab"), "int": defaultdict(int, a=1), "list": defaultdict(list),
    "factory": defaultdict(lambda: 7), "chain": ChainMap({"a": 1}, {"b": 2}), "proxy": types.MappingProxyType({"a": 1}),
    "array": array.array("i", [1, 2]), "view": memoryview(b"ab"), "uuid": uuid.UUID(int=5), "path": pathlib.PurePosixPath("/a/b"),
    "ip": ipaddress.ip_address("10.0.0.1"), "ns": types.SimpleNamespace(a=1, b=[2]),
    "utc": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "minus": Decimal("-0"), "snan": Decimal("sNaN"), "frac": Fraction(1, 3), "complex": complex(-0.0, float("nan")),
    "keys": {1: 2}.keys(), "values": {1: 2}.values(), "items": {1: 2}.items(), "bools": {True: "t", 0: "z"}, "nans": [math.nan],
    "odd": {None: 1, (1, 2): 2, frozenset({3}): 3, 1.5: 4}, "strs": ["a\\ud800", "\\ud83d", "\\ude00", "\\U0001F600", "\\0"],
    "sets": {frozenset({frozenset({1}), (2,)}), frozenset()}, "match": re.match("(a)(b)", "ab"),
}[name]
def moved():
    d = OrderedDict([("a", 1), ("b", 2)]); d.move_to_end("a"); return d
def nested(n):
    x = []
    for _ in range(n): x = [x]
    return x
def loop():
    d = {}; d["me"] = d; return d
def zoned(): return datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
def pair(x): return [x, x]
"""

RIGHT_VALUES = right(
    CROSSES,
    STANDARD,
    deque_with_maxlen=("d = get('deque'); d.append(3); assert list(d) == [2, 3] and d.maxlen == 2",),
    counter=(
        "c = get('counter'); assert c['z'] == 0 and c + c == {'a': 4, 'b': 2} and c.most_common(1) == [('a', 2)]",
    ),
    defaultdicts=(
        "d = get('int'); assert d['q'] == 0 and d == {'a': 1, 'q': 0}",
        "d = get('list'); d['x'].append(1); assert d == {'x': [1]}",
        "assert get('factory')['q'] == 7",
        "import collections\nd = collections.defaultdict(lambda: [7]); assert same(d)['q'] == [7]",
    ),
    ordered_dict_that_was_reordered=("assert list(moved()) == ['b', 'a']",),
    chain_map_and_proxy=(
        "c = get('chain'); assert dict(c) == {'a': 1, 'b': 2} and c.maps[0] == {'a': 1}",
        "assert get('proxy') == {'a': 1}",
    ),
    array_and_view=(
        "import array\nassert get('array') == array.array('i', [1, 2])",
        "assert get('view') == b'ab' == same(b'ab')",
    ),
    uuid_path_address=(
        "import uuid\nassert get('uuid') == uuid.UUID(int=5)",
        "import pathlib\nassert get('path') == pathlib.PurePosixPath('/a/b') and get('path').name == 'b'",
        "import ipaddress\nassert get('ip') == ipaddress.ip_address('10.0.0.1')",
    ),
    namespace=("n = get('ns'); assert n.a == 1 and n.b == [2]",),
    times=(
        "import datetime\nassert get('utc') == datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc)",
        "from datetime import *\nd = datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5.5), 'IST'), fold=1)\n"
        "assert same(d) == d and same(d).tzname() == 'IST' and same(d).fold == 1",
        "from datetime import *\nassert same([datetime.max, time(1), timedelta.min]) == [datetime.max, time(1), timedelta.min]",
        "assert zoned().utcoffset().total_seconds() == 7200",
    ),
    decimals=(
        "assert str(get('minus')) == '-0' and get('snan').is_snan()",
        "from decimal import Decimal\nassert str(same(Decimal('1.10'))) == '1.10'",
        "from decimal import Decimal\nassert same(Decimal('NaN')) != same(Decimal('NaN'))",
    ),
    fractions=("from fractions import Fraction\nassert get('frac') == Fraction(1, 3) and 3 * get('frac') == 1",),
    complex_parts=("import math\nc = get('complex'); assert math.copysign(1, c.real) == -1 and c != c",),
    nan_is_not_itself=(
        "x = same(float('nan')); assert x != x",
        "x = float('nan'); assert same([x]) == [x] and same(x) is x",
        "import math\nassert get('nans') == [math.nan]",
    ),
    floats=(
        "import math\nassert math.copysign(1, same(-0.0)) == -1 and same(1e308 * 10) == math.inf and same(5e-324) == 5e-324",
    ),
    ints_of_any_size=("assert same(10**6000) == 10**6000 and same(-10**15) == -10**15 and type(same(10**15)) is int",),
    bool_is_not_int=(
        "assert [type(v) for v in same([True, 1, 1.0])] == [bool, int, float]",
        "d = get('bools'); assert d[1] == 't' and list(d)[0] is True and list(d)[1] == 0",
    ),
    strings=(
        "assert get('strs') == ['a\\ud800', '\\ud83d', '\\ude00', '\U0001f600', '\\0'] and len(get('strs')[3]) == 1",
    ),
    empties=(
        "assert [same(x) for x in ('', [], {}, set(), (), b'', frozenset())] == ['', [], {}, set(), (), b'', frozenset()]",
    ),
    odd_keys=("d = get('odd'); assert d == {None: 1, (1, 2): 2, frozenset({3}): 3, 1.5: 4} and list(d)[0] is None",),
    nested_sets=("assert get('sets') == {frozenset(), frozenset({(2,), frozenset({1})})}",),
    order_of_a_dict=("assert list(same({'b': 1, 'a': 2})) == ['b', 'a']",),
    views=(
        "assert get('keys') == {1} and list(get('values')) == [2] and get('items') == {(1, 2)} and 1 in get('keys')",
    ),
    ranges_and_slices=("assert same(range(0, 10, 3)) == range(0, 12, 3) and same(slice(1, None)) == slice(1, None)",),
    singletons=(
        "assert same(...) is ... and same(NotImplemented) is NotImplemented and same(None) is None and same(True) is True",
    ),
    types_and_functions=(
        "assert same(int) is int and same(ValueError) is ValueError and same(print) is print and same(str.upper)('a') == 'A'",
    ),
    sentinel=("s = object(); assert same(s) is s and same([s])[0] is s",),
    loops=("d = loop(); assert d['me'] is d", "a = []; a.append(a); assert same(a) is a"),
    shared_parts=("p = pair([1]); assert p[0] is p[1]", "x = [[1], [2]]; assert pair(x)[0] is x"),
    deep_nesting=(
        "def nest(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x\n"
        "assert nested(400) == nest(400) == same(nest(400))",
    ),
    large_values=("xs = list(range(100_000)); assert same(xs) == xs", "s = 'é' * 10**6; assert same(s) == s"),
    match_of_a_pattern=(
        "m = get('match'); assert m.group(1) == 'a' and m.groups() == ('a', 'b')",
        "assert get('match')",
    ),
)

ITERATORS = """
import asyncio, itertools
from contextlib import contextmanager
log = []
def f(kind): return {"zip": zip([1, 2], "ab"), "map": map(str, [1, 2]), "filter": filter(None, [0, 1]),
    "reversed": reversed([1, 2]), "enumerate": enumerate("ab"), "iter": iter([1, 2]), "count": itertools.count(3)}[kind]
def talk(n):
    try:
        for i in range(n):
            got = yield i
            if got: yield f"got {got}"
    except ValueError as error: yield f"caught {error}"
    finally: log.append("closed")
    return "done"
def paths():
    path = []
    for i in range(3):
        path.append(i)
        yield path
def bad():
    yield 1
    raise KeyError("k")
def total(it): return sum(itertools.islice(it, 3))
class Down:
    def __init__(self, n): self.n = n
    def __iter__(self): return self
    def __next__(self):
        if self.n == 0: raise StopIteration
        self.n -= 1
        return self.n
def down(n): return Down(n)
async def later(x):
    await asyncio.sleep(0)
    return x * 2
async def boom(): raise ValueError("b")
async def ticks(n):
    for i in range(n): yield i
async def use(callback): return await callback(3) + 1
class Resource:
    async def __aenter__(self): return 5
    async def __aexit__(self, *error): return False
@contextmanager
def tag(name):
    log.append("<" + name)
    try: yield name.upper()
    finally: log.append(">" + name)
class Suppress:
    def __init__(self, *kinds): self.kinds = kinds
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): return kind is not None and issubclass(kind, self.kinds)
"""

RIGHT_ITERATORS = right(
    REMOTE,
    ITERATORS,
    iterators=(
        "assert list(f('zip')) == [(1, 'a'), (2, 'b')] and list(f('map')) == ['1', '2'] and list(f('filter')) == [1]",
        "assert list(f('reversed')) == [2, 1] and dict(f('enumerate')) == {0: 'a', 1: 'b'} and next(f('iter')) == 1",
        "a, b, *rest = f('zip'); assert b == (2, 'b') and rest == []",
    ),
    endless_iterator=("import itertools\nassert list(itertools.islice(f('count'), 500)) == list(range(3, 503))",),
    long_generator=("assert list(talk(2000)) == list(range(2000))",),
    generator_is_a_conversation=(
        "g = talk(3); assert next(g) == 0 and g.send('x') == 'got x' and next(g) == 1 and g.throw(ValueError('v')) == 'caught v'",
    ),
    generator_closed=("g = talk(1); next(g); g.close(); assert log == ['closed']",),
    generator_returns=(
        "g = talk(1); next(g)\ntry: next(g)\nexcept StopIteration as e: assert e.value == 'done'\nelse: assert False",
    ),
    generator_delegated_to=(
        "def outer():\n    r = yield from talk(1)\n    yield r\nassert list(outer()) == [0, 'done']",
    ),
    generator_fails=(
        "g = bad(); assert next(g) == 1\ntry: next(g)\nexcept KeyError as e: assert e.args == ('k',)\nelse: assert False",
    ),
    generator_of_one_list=(
        "assert [list(p) for p in paths()] == [[0], [0, 1], [0, 1, 2]]",
        "assert list(paths()) == [[0, 1, 2]] * 3",
    ),
    generator_type=("import types\nassert isinstance(talk(1), types.GeneratorType)",),
    iterator_as_argument=(
        "it = iter([1, 2, 3, 4]); assert total(it) == 6 and next(it) == 4",
        "import itertools\nassert total(itertools.count(1)) == 6",
    ),
    iterator_class=("assert list(down(3)) == [2, 1, 0]",),
    coroutines=(
        "import asyncio\nassert asyncio.run(later(2)) == 4",
        "import asyncio\nasync def main(): return await asyncio.gather(later(1), later(2))\nassert asyncio.run(main()) == [2, 4]",
        "import asyncio\ntry: asyncio.run(boom())\nexcept ValueError as e: assert str(e) == 'b'\nelse: assert False",
    ),
    asynchronous_generator=(
        "import asyncio\nasync def main(): return [x async for x in ticks(3)]\nassert asyncio.run(main()) == [0, 1, 2]",
    ),
    asynchronous_callback=("import asyncio\nasync def ten(x): return x * 10\nassert asyncio.run(use(ten)) == 31",),
    asynchronous_context=(
        "import asyncio\nasync def main():\n    async with Resource() as r: return r\nassert asyncio.run(main()) == 5",
    ),
    context_manager=("with tag('a') as t: assert t == 'A'\nassert log == ['<a', '>a']",),
    context_manager_that_suppresses=(
        "with Suppress(ValueError): raise ValueError('x')",
        "try:\n    with Suppress(ValueError): raise KeyError('x')\nexcept KeyError: pass\nelse: assert False",
    ),
)

FUNCTIONS = '''
import functools
@functools.lru_cache(maxsize=None)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
add3 = functools.partial(lambda a, b: a + b, 3)
def compose(*fs): return lambda x: functools.reduce(lambda a, f: f(a), fs, x)
def memo(fn):
    cache = {}
    @functools.wraps(fn)
    def wrapper(*a):
        if a not in cache: cache[a] = fn(*a)
        return cache[a]
    wrapper.cache = cache
    return wrapper
def apply(fn, *a, **k): return fn(*a, **k)
def safe(fn):
    try: return fn()
    except ValueError as error: return "caught", error.args
def retry(fn, kinds, n):
    for _ in range(n):
        try: return fn()
        except kinds: pass
    return "gave up"
def double(x):
    """Doubles."""
    double.calls += 1
    return x * 2
double.calls = 0
def each(xs, callback):
    for x in xs: callback(x)
def rec(n): return 0 if n == 0 else 1 + rec(n - 1)
def spread(a, /, b, *args, c, **kw): return a, b, args, c, kw
class Error(Exception):
    level = 1
    def __init__(self, message, code=0): super().__init__(message); self.code = code
class NotFound(Error, KeyError):
    def __str__(self): return "in words"
def fail(kind):
    if kind == "own": raise NotFound("a", 404)
    if kind == "cause":
        try: 1 / 0
        except ZeroDivisionError as error: raise ValueError("outer") from error
    if kind == "group": raise ExceptionGroup("g", [ValueError("a"), ExceptionGroup("h", [KeyError("b")])])
    if kind == "json":
        import json
        json.loads("{")
    if kind == "os": open("/nonexistent")
    if kind == "note":
        error = ValueError("n"); error.add_note("a note"); raise error
    if kind == "unicode": b"\\xff".decode()
    if kind == "exit": raise SystemExit(3)
    if kind == "deep": fail("deep")
    if kind == "stop": raise StopIteration(4)
    return {}["missing"]
def handle(fn):
    try: fn()
    except Error as error: return type(error).__name__, error.args
def made(): return ValueError("made", 2)
def half_done(xs): xs.append(1); raise ValueError
'''


def raises(kind: str, error: str, condition: str) -> str:
    return f"try: fail({kind!r})\nexcept {error} as e: assert {condition}\nelse: assert False"


RIGHT_FUNCTIONS = right(
    CALLS_BACK,
    FUNCTIONS,
    cached_function=("assert fib(30) == 832040 and fib.cache_info().misses == 31",),
    partial_and_composed=("assert add3(4) == 7 and compose(lambda x: x + 1, lambda x: x * 2)(3) == 8",),
    decorator=(
        "calls = []\n@memo\ndef g(x):\n    calls.append(x)\n    return x if x < 2 else g(x - 1) + g(x - 2)\n"
        "assert g(40) == 102334155 and len(calls) == 41 and g.cache[2,] == 1",
    ),
    builtins_as_callbacks=(
        "assert apply(max, [1, 3, 2], key=lambda x: -x) == 1 and apply(len, 'abc') == 3 and apply(str.upper, 'a') == 'A'",
    ),
    methods_as_callbacks=("seen = []; each([1, 2], seen.append); assert seen == [1, 2]",),
    attributes_of_functions=(
        "double(1); double(2); assert double.calls == 2 and double.__name__ == 'double' and double.__doc__ == 'Doubles.'",
    ),
    function_in_builtins=("assert list(map(double, [1, 2])) == [2, 4] and sorted([3, 1], key=double) == [1, 3]",),
    kinds_of_parameters=("assert spread(1, 2, 3, c=4, d=5) == (1, 2, (3,), 4, {'d': 5})",),
    recursion=(
        "assert rec(900) == 900",
        "fact = lambda n: 1 if n == 0 else n * apply(fact, n - 1)\nimport math\nassert fact(80) == math.factorial(80)",
    ),
    callbacks_that_raise=(
        "def bad(): raise ValueError('v', 1)\nassert safe(bad) == ('caught', ('v', 1))",
        "class Mine(Exception): pass\nmine = Mine('m')\ndef bad(): raise mine\n"
        "try: safe(bad)\nexcept Mine as e: assert e is mine\nelse: assert False",
        "class Mine(Exception): pass\ndef bad(): raise Mine\nassert retry(bad, Mine, 2) == 'gave up'",
        "def bad(): raise NotFound('from the test')\nassert handle(bad) == ('NotFound', ('from the test',))",
    ),
    own_exceptions=(
        raises("own", "NotFound", "e.code == 404 and e.args == ('a',) and str(e) == 'in words' and e.level == 1"),
        raises("own", "Error", "type(e) is NotFound and isinstance(e, KeyError) and issubclass(NotFound, Error)"),
    ),
    exceptions_of_the_library=(
        raises("json", "ValueError", "e.pos == 1 and 'Expecting property name' in str(e)"),
        "import json\n" + raises("json", "json.JSONDecodeError", "e.lineno == 1"),
        raises("os", "FileNotFoundError", "e.errno == 2 and e.filename == '/nonexistent'"),
        raises("unicode", "UnicodeDecodeError", "e.start == 0"),
        raises("key", "KeyError", "str(e) == repr('missing')"),
    ),
    exceptions_that_end_things=(
        raises("exit", "SystemExit", "e.code == 3"),
        raises("deep", "RecursionError", "True"),
        raises("stop", "StopIteration", "e.value == 4"),
    ),
    exceptions_with_company=(
        raises("cause", "ValueError", "isinstance(e.__cause__, ZeroDivisionError)"),
        raises("note", "ValueError", "e.__notes__ == ['a note']"),
        "try: fail('group')\nexcept* KeyError as g: assert g.exceptions[0].exceptions[0].args == ('b',)\n"
        "except* ValueError as g: assert str(g.exceptions[0]) == 'a'",
        "e = made(); assert isinstance(e, ValueError) and e.args == ('made', 2)",
    ),
    arguments_of_what_failed=("xs = []\ntry: half_done(xs)\nexcept ValueError: assert xs == [1]\nelse: assert False",),
)
