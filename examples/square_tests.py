import math

from square import square

assert square(3) == 9
assert square(-2) == 4
assert math.isclose(square(0.5), 0.25)
