from actors.loads import Loads


def test_those_with_the_least_to_do_come_first():
    loads = Loads(full=2)
    for slot in range(4):
        loads.set(slot, 0)
    loads.set(0, 1)
    assert list(loads.least()) == [1, 2, 3, 0]
    loads.set(1, 2)  # full
    loads.set(2, None)  # takes nothing
    loads.set(3, 5)  # more than full
    assert list(loads.least()) == [0]
    assert [slot for slot in range(5) if loads.has_room(slot)] == [0]
    loads.set(2, 1)
    loads.set(1, 0)
    loads.set(3, None)
    assert list(loads.least()) == [1, 0, 2]
