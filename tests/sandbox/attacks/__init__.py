"""Programs that attack a judge, and honest ones that look odd: one property each, and what a correct judge may give.

Most are judged by asserts on f(x) = x * x. A program that proves something to itself (it found a way out, it saw a mark
that an earlier run left) returns the right value then and None otherwise, so it must get 0. A program that only makes
trouble computes f rightly; it may get everything, and what counts is what comes after it.

forgeries.py   wrong programs that want to be paid, by the link, by what they return, by names, by frames and memory
intruders.py   ways to other processes, to files of the machine, and to the next program
hogs.py        too much CPU, memory, output, time; sources, results and exits that are hard to digest
neighbours.py  ways to the judge's own processes and files where all have one uid (for that kind of pod only)
honest.py      right programs that must be paid
"""

from tests.sandbox.attacks.attack import Attack
from tests.sandbox.attacks.forgeries import FORGERIES
from tests.sandbox.attacks.hogs import HOGS
from tests.sandbox.attacks.honest import HONEST
from tests.sandbox.attacks.intruders import INTRUDERS
from tests.sandbox.attacks.neighbours import NEIGHBOURS

ATTACKS: list[Attack] = [*FORGERIES, *INTRUDERS, *HOGS, *HONEST]
__all__ = ["ATTACKS", "NEIGHBOURS"]
