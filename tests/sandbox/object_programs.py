"""Programs about objects: classes, nodes, changes in place; and objects that lie. See value_programs.py."""

from sandbox.types import TestMode
from tests.sandbox.value_programs import DECIDES, IN_PLACE, NEEDS_ONE_PROCESS, REMOTE, Case, lies, right

CLASSES = """
import functools
class Stack:
    made = 0
    def __init__(self, items=()): self.items = list(items); Stack.made += 1
    def push(self, x): self.items.append(x); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __setitem__(self, i, v): self.items[i] = v
    def __contains__(self, x): return x in self.items
    def __str__(self): return f"Stack{self.items}"
    def __repr__(self): return f"Stack({self.items!r})"
    def __bool__(self): return bool(self.items)
    def __call__(self, x): return [x, *self.items]
    def __eq__(self, o): return isinstance(o, Stack) and self.items == o.items
    def __hash__(self): return hash(tuple(self.items))
    def __reversed__(self): return reversed(self.items)
    def __enter__(self): return self
    def __exit__(self, *a): self.items.clear()
    @property
    def top(self): return self.items[-1]
    @top.setter
    def top(self, v): self.items[-1] = v
    @classmethod
    def of(cls, *xs): return cls(xs)
    @staticmethod
    def twice(x): return x * 2
@functools.total_ordering
class Vec:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return Vec(self.x + o.x, self.y + o.y)
    def __sub__(self, o): return Vec(self.x - o.x, self.y - o.y)
    def __mul__(self, k): return Vec(self.x * k, self.y * k) if not isinstance(k, Vec) else self.x * k.x + self.y * k.y
    __rmul__ = __mul__
    def __neg__(self): return Vec(-self.x, -self.y)
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** 0.5
    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)
    def __lt__(self, o): return abs(self) < abs(o)
    def __iadd__(self, o): self.x += o.x; self.y += o.y; return self
    def __repr__(self): return f"Vec({self.x}, {self.y})"
class Shape:
    def area(self): raise NotImplementedError
    def describe(self): return f"{type(self).__name__} {self.area():g}"
class Circle(Shape):
    PI = 3
    def __init__(self, r): self._r = r
    def area(self): return self.PI * self._r ** 2
class MyList(list):
    def second(self): return self[1]
    def push(self, x): self.append(x); return self
class MyDict(dict):
    def __missing__(self, k): return k * 2
def biggest(shapes): return max(shapes, key=lambda s: s.area())
def make(k): return Circle(k)
class Account:
    def __init__(self, b=0): self.balance = b; self.history = []
    def withdraw(self, n):
        if n > self.balance: raise ValueError("insufficient")
        self.balance -= n; self.history.append(-n)
class Conf:
    def __init__(self, **k): self.__dict__["_k"] = k
    def __getattr__(self, name):
        try: return self._k[name]
        except KeyError: raise AttributeError(name)
    def __setattr__(self, name, value): self._k[name] = value
class Seq:
    def __getitem__(self, i):
        if i >= 4: raise IndexError(i)
        return i * i
class Single:
    made = None
    def __new__(cls):
        if cls.made is None: cls.made = super().__new__(cls)
        return cls.made
class Timer:
    def __init__(self, fn): self.fn, self.n = fn, 0
    def __call__(self, *a): self.n += 1; return self.fn(*a)
@Timer
def timed(x): return x + 1
class stack:
    def __init__(self): self.xs = []
    def push(self, x): self.xs.append(x); return self
"""
NODES = """
class Node:
    def __init__(self, val, next=None): self.val = val; self.next = next
class Tree:
    def __init__(self, val=0, left=None, right=None): self.val, self.left, self.right = val, left, right
class NTree:
    def __init__(self, val): self.val = val; self.children = []
def build(xs):
    head = None
    for x in reversed(xs): head = Node(x, head)
    return head
def rev(head):
    prev = None
    while head: head.next, prev, head = prev, head, head.next
    return prev
def depth(t): return 0 if t is None else 1 + max(depth(t.left), depth(t.right))
def total(t): return t.val + sum(map(total, t.children))
def invert(t):
    if t: t.left, t.right = invert(t.right), invert(t.left)
    return t
def insert(root, v):
    if root is None: return Tree(v)
    if v < root.val: root.left = insert(root.left, v)
    else: root.right = insert(root.right, v)
    return root
def search(root, v):
    while root and root.val != v: root = root.left if v < root.val else root.right
    return root is not None
"""
CHANGES = """
def push(xs, v): xs.append(v); return xs
def alias(a, b): a.append(1); return len(b)
def rot(m):
    n = len(m)
    for i in range(n):
        for j in range(i, n): m[i][j], m[j][i] = m[j][i], m[i][j]
    for r in m: r.reverse()
def swap(xs): xs[0], xs[1] = xs[1], xs[0]
def clear(d, *, s): d.clear(); s.update({1, 2}); d["new"] = {"x": [1]}
def same(a, b): return a is b
def od(d): d.move_to_end("a"); return None
def attach(parent, child): parent.append(child)
def ba(b): b[0] = 120
def dq(d): d.rotate(1)
def glob(xs=[]): xs.append(1); return len(xs)
def inner(x): x[0][1]["k"].append(5)
n = 0
table = {"a": 1}
log = []
def inc():
    global n
    n += 1
    log.append(n)
def look(key): return table[key]
class Sorter:
    def __init__(self, data): self.data = data
    def sort(self): self.data.sort()
class Box:
    def __init__(self): self.items = []
    def put(self, x): self.items.append(x)
    def last(self): return self.items[-1]
"""
DATACLASSES = """
from dataclasses import dataclass, field
@dataclass
class Point:
    x: int
    y: int = 0
    tags: list = field(default_factory=list)
    def norm(self): return (self.x ** 2 + self.y ** 2) ** 0.5
    def moved(self, d): return Point(self.x + d, self.y + d)
@dataclass(frozen=True, order=True)
class V:
    major: int
    minor: int
def f(x): return Point(x, x + 1)
def g(p): return p.x * p.y
def h(ps): return [p.x for p in ps]
"""

RIGHT_OBJECTS = [
    *right(
        REMOTE,
        CLASSES,
        methods=("s = Stack(); s.push(1).push(2); assert s.pop() == 2 and len(s) == 1 and s.top == 1",),
        containers=(
            "s = Stack([1, 2]); assert list(s) == [1, 2] and s[0] == 1 and s[-1:] == [2] and list(reversed(s)) == [2, 1]",
            "s = Stack([1]); s[0] = 5; assert s.items == [5]",
            "assert len(Stack()) == 0 and not Stack() and Stack([1])",
        ),
        calls_and_text=(
            "s = Stack([1]); assert s(0) == [0, 1] and str(s) == f'{s}' == 'Stack[1]' and repr(Vec(1, 2)) == 'Vec(1, 2)'",
        ),
        properties=("s = Stack([1]); s.top = 6; assert s.items == [6]",),
        class_and_static_methods=("assert Stack.of(1, 2).items == [1, 2] and Stack.twice(4) == 8 and Stack.made >= 1",),
        class_attributes=("Circle.PI = 4; assert Circle(1).area() == 4; Circle.PI = 3",),
        unbound_methods=("s = Stack(); Stack.push(s, 1); assert s.items == [1]",),
        with_statement=("with Stack([1]) as s: assert len(s) == 1\nassert len(s) == 0",),
        operators_of_two=(
            "v = Vec(1, 2) + Vec(3, 4); assert (v.x, v.y) == (4, 6) and Vec(1, 2) * Vec(3, 4) == 11",
            "v = Vec(1, 1); v += Vec(1, 2); assert v.y == 3",
        ),
        operators_of_one=("assert abs(Vec(3, 4)) == 5 and (-Vec(1, 2)).x == -1",),
        missing_operators=(
            "try: len(Vec(1, 2))\nexcept TypeError: pass\nelse: assert False",
            "try: -Stack()\nexcept TypeError: pass\nelse: assert False",
        ),
        inheritance=(
            "c = Circle(2); assert c.area() == 12 and c.describe() == 'Circle 12'",
            "assert isinstance(Circle(1), Shape) and issubclass(Circle, Shape)",
        ),
        types_of_objects=(
            "assert type(make(1)) is Circle and make(2).__class__.__name__ == 'Circle' and not isinstance(make(1), Stack)",
        ),
        objects_as_arguments=("assert biggest([Circle(1), Circle(3)]).area() == 27",),
        attributes=(
            "a = Account(); a.balance += 5; assert a.balance == 5 and vars(a) == {'balance': 5, 'history': []}",
            "assert hasattr(Circle(1), 'area') and not hasattr(Circle(1), 'nope') and getattr(Circle(1), 'PI') == 3",
            "c = Conf(a=1); c.b = 2; assert c.a == 1 and c.b == 2 and not hasattr(c, 'c')",
        ),
        methods_that_raise=(
            "a = Account(10)\ntry: a.withdraw(50)\nexcept ValueError as e: assert str(e) == 'insufficient'\nelse: assert False",
        ),
        hashes=("assert hash(Stack([1])) == hash(Stack([1]))",),
        nothing_is_none=("assert make(2) is not None and make(1) != None",),
        copies=("import copy\na = Account(3); b = copy.deepcopy(a); b.balance = 9; assert a.balance == 3",),
        subclass_of_list=(
            "s = MyList([1, 2]); assert s.push(3).second() == 2 and len(s) == 3 and s == [1, 2, 3] and 3 in list(s)",
        ),
        subclass_of_dict=("d = MyDict(a=1); assert d['a'] == 1 and d['q'] == 'qq' and d == {'a': 1}",),
        old_iteration=("assert list(Seq()) == [0, 1, 4, 9] and 4 in Seq()",),
        singleton=("assert Single() is Single()",),
        decorator_class=("timed(1); assert timed(2) == 3 and timed.n == 2",),
        class_in_lower_case=("s = stack().push(1); assert s.xs == [1]",),
    ),
    *right(
        DECIDES,
        CLASSES,
        "low",
        comparisons=("assert Vec(1, 2) == Vec(1, 2) and Vec(1, 2) != Vec(2, 2)", "assert Vec(1, 2) in [Vec(1, 2)]"),
        order=(
            "assert Vec(1, 1) < Vec(2, 2) and sorted([Vec(2, 2), Vec(1, 1)])[0].x == 1 and max(Vec(1, 1), Vec(0, 1)).x == 1",
        ),
        membership=("assert 3 in Stack([3]) and 4 not in Stack([3])",),
        operators_with_values=("assert (Vec(1, 2) * 3).x == 3 and (3 * Vec(1, 2)).y == 6",),
        sets_of_objects=("assert len({Stack([1]), Stack([1]), Stack([2])}) == 2",),
    ),
    *right(
        NEEDS_ONE_PROCESS,
        CLASSES + "import random\ndef hello(): print('hi')\ndef roll(): return random.randint(1, 10**9)\n"
        "def lines(file): return [line.strip() for line in file.read().splitlines()]\n",
        "low",
        subclass_in_the_test=(
            "class Square(Shape):\n    def area(self): return 4\nassert Square().describe() == 'Square 4'",
        ),
        object_of_the_test=(
            "class Big:\n    def area(self): return 99\nassert biggest([Big(), Circle(1)]).area() == 99",
        ),
        captured_output=(
            "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out): hello()\n"
            "assert out.getvalue() == 'hi\\n'",
        ),
        seeded=("import random\nrandom.seed(3); a = roll(); random.seed(3); assert a == roll()",),
        file_of_the_test=("import io\nassert lines(io.StringIO('a\\nb')) == ['a', 'b']",),
    ),
    *right(
        REMOTE,
        DATACLASSES,
        dataclass_attributes=(
            "assert f(1).x == 1 and f(1).y == 2 and f(3).norm() == 5.0",
            "p = Point(1); p.x = 5; assert p.x == 5 and g(p) == 0",
        ),
        dataclass_text=("assert str(Point(1, 2)) == 'Point(x=1, y=2, tags=[])'",),
        dataclass_passed=("assert g(Point(1, 2)) == 2 and h([Point(1), Point(2)]) == [1, 2] and f(1).moved(2).x == 3",),
        frozen_dataclass=(
            "import dataclasses\ntry: V(1, 2).major = 3\nexcept dataclasses.FrozenInstanceError: pass\nelse: assert False",
        ),
    ),
    *right(
        DECIDES,
        DATACLASSES,
        "low",
        dataclasses_compared=(
            "assert f(1) == Point(1, 2)",
            "assert [f(1)] == [Point(1, 2)]",
            "assert not Point(1, 2) != Point(1, 2)",
        ),
        dataclasses_ordered=(
            "assert V(1, 2) < V(1, 3) and max(V(1, 2), V(2, 0)) == V(2, 0) and len({V(1, 2), V(1, 2)}) == 1",
        ),
        dataclass_as_dict=(
            "import dataclasses\nassert dataclasses.asdict(Point(1, 2)) == {'x': 1, 'y': 2, 'tags': []}",
        ),
    ),
    *right(
        REMOTE,
        NODES,
        list_read=(
            "out = []\nn = build([1, 2, 3])\nwhile n:\n    out.append(n.val); n = n.next\nassert out == [1, 2, 3]",
        ),
        list_read_by_a_helper=(
            "def to_list(n): return [n.val] + to_list(n.next) if n else []\nassert to_list(rev(build([1, 2]))) == [2, 1]",
        ),
        list_built=("a = Node(1); a.next = Node(2); r = rev(a); assert r.val == 2 and r.next is a and a.next is None",),
        tree_built=(
            "t = Tree(1, Tree(2, Tree(3)), Tree(4)); i = invert(t); assert depth(t) == 3 and i is t and t.left.val == 4",
        ),
        tree_grown=(
            "r = None\nfor v in [5, 3, 8]: r = insert(r, v)\nassert search(r, 3) and not search(r, 4) and r.left.val == 3",
        ),
        children_appended=(
            "r = NTree(1); c = NTree(3); r.children.append(c); c.children.append(NTree(4)); assert total(r) == 8",
        ),
    ),
    *right(
        IN_PLACE,
        CHANGES,
        argument_returned=("a = [1]; r = push(a, 2); assert r is a and a == [1, 2]",),
        one_list_twice=(
            "a = []; assert alias(a, a) == 1 and a == [1]",
            "x = []; assert same(x, x) and same({'a': x}['a'], x) and not same([], [])",
        ),
        rows_keep_their_identity=(
            "m = [[1, 2], [3, 4]]; row = m[0]; rot(m); assert m == [[3, 1], [4, 2]] and m[0] is row",
            "a, b = [1], [2]; m = [a, b]; swap(m); assert m[0] is b and m[1] is a",
            "m = [[0]] * 2; push(m[0], 1); assert m == [[0, 1]] * 2",
        ),
        keyword_arguments=("d, s = {'old': 1}, set(); clear(d, s=s); assert d == {'new': {'x': [1]}} and s == {1, 2}",),
        one_argument_into_another=("p, c = [], [7]; attach(p, c); assert p[0] is c",),
        deep_inside=("k = []; inner([(1, {'k': k})]); assert k == [5]",),
        other_containers=(
            "from collections import OrderedDict, deque\nd = OrderedDict(a=1, b=2); od(d); assert list(d) == ['b', 'a']\n"
            "q = deque([1, 2, 3]); dq(q); assert list(q) == [3, 1, 2]\nb = bytearray(b'abc'); ba(b); assert b == b'xbc'",
        ),
        argument_kept_by_an_object=(
            "d = [3, 1]; s = Sorter(d); s.sort(); assert d == [1, 3]; d.append(5); assert s.data == [1, 3, 5]",
            "s = Sorter([]); xs = []; s.data = xs; xs.append(1); assert s.data == [1]",
        ),
        default_argument=("assert [glob(), glob()] == [1, 2]",),
        global_number=("inc(); inc(); assert n == 2 and log == [1, 2]",),
        global_list=("l = log; inc(); assert l is log and l[-1] == n",),
        global_dict_changed_by_the_test=("table['q'] = 5; assert look('q') == 5",),
        list_in_an_attribute=(
            "b = Box(); i = b.items; b.put(3); i.append(4); assert b.last() == 4; b.put(5); assert i == [3, 4, 5] == b.items",
        ),
    ),
]

_LIES = ("eq", "lt", "gt", "le", "ge", "contains", "bool")
_METHODS = (
    "\n".join(f"    def __{name}__(s, *o): return True" for name in _LIES)
    + """
    def __ne__(s, *o): return False
    def __hash__(s): return hash(4)
    def __len__(s): return 4
    def __iter__(s): return iter([4])
    def __getitem__(s, i): return 4
    def __sub__(s, o): return s
    __rsub__ = __sub__
    def __abs__(s): return 0
    def __float__(s): return 4.0
    def __int__(s): return 4
    __index__ = __int__
    def __str__(s): return "4"
    def __getattr__(s, name):
        if name[:2] == "__": raise AttributeError(name)
        return lambda *a: True
"""
)
_ASKED = (
    "assert f(2) == 4",
    "assert not f(2) != 4",
    "assert f(2) in [4]",
    "assert f(2) in {4}",
    "assert f(2) < 5 or 5 > f(2)",
    "assert f(2)",
    "assert 4 in f(2)",
    "assert len(f(2)) == 4",
    "assert list(f(2)) == [4]",
    "assert f(2)[0] == 4",
    "assert abs(f(2) - 4) < 1e-6",
    "assert abs(4 - f(2)) < 1e-6",
    "assert str(f(2)) == '4'",
    "assert int(f(2)) == 4",
    "assert [0, 1, 2, 3, 4][f(2)] == 4",
    "import math\nassert math.isclose(f(2), 4)",
    "assert f(2) == f(2)",
    "assert sorted(f(2)) == [4]",
    "assert f(2).isdigit()",
    "assert f(2).startswith('4')",
    "assert f(2).issubset({4})",
    "assert f(2).count(4) == 1",
    "def check(x): assert abs(x - 4) < 1e-6\ncheck(f(2))",
    "assert [f(2), {'a': f(2)}] == [4, {'a': 4}]",
    "assert max(f(2), 4) == 4",
    "try: assert f(2) == 5\nexcept AssertionError: pass",
)
_OF_ANY_MEMBER = ("assert f(2)", "assert f(2) == f(2)")  # true of a plain value as well
_OF_ANY_INT = (*_OF_ANY_MEMBER, "assert f(2) < 5 or 5 > f(2)", "assert max(f(2), 4) == 4")
_CONTEXTS = (
    "with f(2) as c: assert c.get(1) == 4",
    "with f(2) as c: assert 1 == 2",
    "with f(2) as c:\n    x = c.none()\n    assert x[0] == 4",
)

LIES = [
    *lies("class A:\n" + _METHODS + "def f(x): return A()\n", object_of_a_class=_ASKED),
    *lies("class f:\n    def __init__(s, *a): pass\n" + _METHODS, class_in_place_of_the_function=_ASKED),
    *lies(
        "class A:\n"
        + _METHODS
        + "A.__module__ = 'decimal'; A.__name__ = A.__qualname__ = 'Decimal'\ndef f(x): return A()\n",
        object_with_a_borrowed_name=_ASKED,
    ),
    *lies(
        "class M(type):\n    def mro(c): return [c, *bases]\n    __instancecheck__ = __eq__ = lambda *a: True\n"
        "    __hash__ = lambda c: hash(int)\nclass B:\n" + _METHODS + "bases = [B, object]\n"
        "class A(B, metaclass=M): __class__ = property(lambda s: int)\ndef f(x): return A()\n",
        object_with_a_lying_class=(*_ASKED, "assert isinstance(f(2), int) and f(2) == 4"),
    ),
    *lies(
        "from enum import Enum\nclass A(Enum):\n    X = 1\n"
        + _METHODS
        + "    value = property(lambda s: 4)\ndef f(x): return A.X\n",
        lying_enum=(*(test for test in _ASKED if test not in _OF_ANY_MEMBER), "assert f(2).value == 4"),
        enum_that_the_test_names=(
            "assert f(2) == 4 or A.X == 4",
            "assert f(2) in {A.X.name, 4}",
            "assert A.X < 5 or A.X != 4 and f(2) == 4",
        ),
    ),
    *lies(
        "from enum import IntEnum\nclass A(IntEnum):\n    X = 1\n" + _METHODS + "def f(x): return A.X\n",
        lying_int_enum=tuple(test for test in _ASKED if test not in _OF_ANY_INT),
    ),
    *lies(
        "from typing import NamedTuple\nclass A(NamedTuple):\n    x: int = 0\n    y: int = 0\n"
        + _METHODS.split("    def __getattr__")[0]
        + "    def count(s, v): return 1\n    def __add__(s, o): return (2, 4)\ndef f(x): return A()\n",
        lying_named_tuple=(
            "assert f(2) == (2, 4)",
            "assert f(2) in {(2, 4)} or 4 in f(2)",
            "assert f(2)[1] == 4",
            "assert len(f(2)) == 4",
            "assert list(f(2)) == [2, 4]",
            "assert f(2) + () == (2, 4)",
            "assert f(2).count(4) == 1",
        ),
    ),
    *lies(
        "class T(tuple):\n    _fields = ('a', 'b', 'c')\n    def __eq__(s, o): return True\ndef f(x): return T((1, 2))",
        fields_that_are_not_there=("assert f(2) == (2, 4)", "assert f(2).c == 4"),
    ),
    *(
        case
        for name, base, start, wanted in [
            *[
                ("int", "int", "0", "4"),
                ("float", "float", "0", "4.0"),
                ("str", "str", "'x'", "'4'"),
                ("list", "list", "[1]", "[4]"),
            ],
            *[
                ("tuple", "tuple", "(1,)", "(4,)"),
                ("dict", "dict", "{4: 1}", "{4: 4}"),
                ("set", "frozenset", "{1}", "{4}"),
            ],
            *[("bytes", "bytes", "b'x'", "b'4'"), ("complex", "complex", "0", "4"), ("decimal", "Decimal", "0", "4")],
            *[
                ("fraction", "Fraction", "0", "4"),
                ("deque", "deque", "[1]", "deque([4])"),
                ("counter", "Counter", "'a'", "Counter({4: 4})"),
            ],
            *[
                ("date", "date", "date(1, 1, 1).toordinal() and 1999, 1, 1", "date(2024, 1, 1)"),
                ("delta", "timedelta", "0", "timedelta(4)"),
            ],
        ]
        for case in lies(
            f"from collections import *\nfrom datetime import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
            f"class A({base}):\n{_METHODS}"
            "    for n in 'numerator real year days maxlen'.split(): locals()[n] = property(lambda s: 4)\n"
            "    get = hex = total_seconds = issuperset = startswith = lambda s, *a: 4\n"
            f"def f(x): return A({start})\ndef g(x): return [A({start})]\n",
            **{
                f"lying_subclass_of_{name}": (
                    f"assert f(2) == {wanted}",
                    f"assert f(2) in [{wanted}]",
                    f"assert g(2) == [{wanted}]",
                    f"assert not f(2) != {wanted}",
                    "assert f(2).numerator == 4 or f(2).year == 2024 or f(2).days == 4",
                    "assert f(2)[9] == 4",
                    "assert f(2).get(9) == 4",
                )
            },
        )
    ),
    *lies(
        "class E(ValueError):\n    def __str__(s): return '4'\n    def __eq__(s, o): return True\n"
        "def f(x): return E('no')\ndef g(x): raise E('no')\n",
        exception_returned=("assert f(2) == 4", "assert f(2) in [4]", "assert g(2) == 4"),
    ),
    *lies(
        "class A:\n    def __enter__(s): return s\n    def __exit__(s, *a): return True\n"
        "    def get(s, x): raise ValueError\n    def none(s): return None\ndef f(x): return A()\n",
        context_that_swallows_asserts=_CONTEXTS,
    ),
    *lies(
        "def f(cb):\n    for x in (0, 1):\n        try: cb(x)\n        except BaseException: pass\n",
        callback_whose_assert_is_swallowed=("def cb(x): assert x == 4\nf(cb)",),
    ),
    *lies(
        "class It:\n    def __iter__(s): return s\n    def __next__(s): return 0\n    __eq__ = __contains__ = lambda s, o: True\n"
        "def f(x): return It()\ndef g(x): return lambda *a: True\ndef h(x):\n    while True: yield 0\n",
        iterators_and_functions=(
            "assert f(2) == [0]",
            "assert next(f(2)) == 4",
            "assert g(2) == 4",
            "assert g(2) == True",
            "assert h(2) == 4",
            "import itertools\nassert list(itertools.islice(h(2), 2)) == [0, 4]",
        ),
    ),
    *lies(
        "class H:\n    def __hash__(s): return hash(4)\n    def __eq__(s, o): return True\n"
        "def f(x): return [H()]\ndef g(x): return {H(): H()}\ndef h(x): return {H()}\n",
        liars_in_containers=(
            "assert set(f(2)) == {4}",
            "assert 4 in g(2) or g(2)[4]",
            "assert h(2) == {4}",
            "assert f(2).index(4) == 0",
        ),
    ),
    *lies(
        "class Point:\n    def __init__(s, *a): pass\n" + _METHODS + "def distance(a, b): return a\n",
        object_of_a_class_that_the_test_names=(
            "assert abs(distance(Point(0, 0), Point(3, 4)) - 5) < 1e-6",
            "assert distance(Point(0, 0), Point(3, 4)) == 5",
            "assert distance(Point(0, 0), Point(3, 4)) < 6",
            "assert abs(5 - distance(Point(0, 0), Point(3, 4))) < 1e-6",
        ),
    ),
    *lies(
        "class Sort:\n    def __init__(s, *a): pass\n" + _METHODS,
        {"entry_point": "Sort"},
        entry_point_in_cap_words=(
            "assert Sort([2, 1]) == [1, 2]",
            "assert abs(Sort([2]) - 4) < 1e-6",
            "assert 4 in Sort([2])",
            "assert Sort(2) < 5",
        ),
    ),
    *lies(
        "class Counter:\n    def __init__(s, *a): pass\n    def __eq__(s, o): return True\nclass Decimal(Counter): pass\n"
        "def isclose(*a): return True\ndef abs(x): return 0\ndef f(x): return 'no'\n",
        own_means_of_checking=(
            "assert Counter(f(2)) == Counter('aab')",
            "x = f(2)\nassert Counter(x) == Counter('aab')",
            "x = f(2); assert isclose(x, 4)",
            "assert Decimal(f(2)) == Decimal(4)",
            "assert abs(len(f(2)) - 4) < 1e-6",
        ),
    ),
    *lies(
        "import builtins, math\nh = 9\ndef f(x):\n    global g, h\n    g = lambda *a: True\n    h = 9\n"
        "    builtins.len = lambda x: 3\n"
        "    math.isclose = lambda *a: True\n    return []\n",
        names_bound_anew=(
            "import math\nassert math.isclose(len(f(2)), 3)",
            "h = 4\nf(2); assert h == 9",
            "def g(): return 0\nf(2); assert g()",
        ),
    ),
]

_POLY = "def poly(xs, x): return sum(c * x**i for i, c in enumerate(xs))\ndef root(xs): pass\n"
_CLOSE = "assert abs(poly([2, 4], {}([2, 4]))) < 1e-9"
HELPERS = [
    Case(
        name=name,
        property=f"{kind}: what setup defines wins, save the entry point",
        code=code,
        tests=(test,),
        accept=accept,
        options=options,
    )
    for kind, test, options in [
        ("asserts", _CLOSE.format("root"), {"setup": _POLY, "entry_point": "root"}),
        (
            "check",
            "def check(candidate): " + _CLOSE.format("candidate"),
            {"setup": _POLY, "entry_point": "root", "mode": TestMode.CHECK_FUNCTION},
        ),
    ]
    for name, code, accept in [
        (f"right_program_with_helpers_{kind}", "def poly(*a): return 1\ndef root(xs): return -xs[0] / xs[1]\n", 1.0),
        (f"helper_redefined_{kind}", "def poly(*a): return 0\ndef root(xs): return 5\n", 0.0),
        (f"only_the_stub_{kind}", "def other(): pass\n", 0.0),
    ]
]
