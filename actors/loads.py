"""How much the workers of a pool have to do. Finding the one with least takes no longer for a thousand of them."""

from collections.abc import Iterator


class Loads:
    """Slots of a pool by their load. One with a load of `full` or more has no room, one of no known load does not count."""

    def __init__(self, full: int):
        self.full = full
        self.of: dict[int, int] = {}
        # By load; each in the order in which they got it.
        self.with_room: list[dict[int, None]] = [{} for _ in range(full)]

    def set(self, slot: int, load: int | None) -> None:
        old = self.of.pop(slot, None)
        if old is not None and old < self.full:
            del self.with_room[old][slot]
        if load is not None:
            self.of[slot] = load
            if load < self.full:
                self.with_room[load][slot] = None

    def least(self) -> Iterator[int]:
        """Slots with room, those with the least load first."""
        return (slot for slots in self.with_room for slot in slots)

    def has_room(self, slot: int) -> bool:
        return self.of.get(slot, self.full) < self.full
