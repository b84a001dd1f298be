"""For how long something has not moved although it should: health is progress, not an answer to a ping. Pure."""


class Standstill:
    """One thing that moves: a position, a counter, what a hand is at. Told at each look; times are the caller's."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since_s: float | None = None

    def look(self, where: object, *, waiting: bool, now_s: float) -> float:
        """Seconds since it last moved or had nothing to do, as of the looks so far."""
        if not waiting:
            self._since_s = None
        elif self._since_s is None or where != self._seen:
            self._since_s = now_s
        self._seen = where
        return 0.0 if self._since_s is None else now_s - self._since_s
