"""How many requests are in flight at once: as many as a server makes use of.

Arithmetic on answers, refusals and the clock; nothing of connections.
"""

FIRST, MOST = 64, 1024
"""Requests at once to begin with, and at most, which doubling reaches."""


GAIN = 1.1
"""By what factor twice as many requests must raise the answers a second, else they do not pay."""


class Window:
    """How many requests may be in flight, given what came of those that were.

    given: at most so many; None lets the window follow the server. Then it is doubled as long as
    that pays: where no more answers a second come than before, it goes back and stays. In either
    case a server that says it is busy halves it, and every windowful of answers adds an eighth.
    """

    def __init__(self, given: int | None = None) -> None:
        self.size = given or FIRST
        self._most = given or MOST
        self._climbs = True
        self._rate = 0.0  # answers a second, before the last doubling
        self._refusals = 0  # that are still those of one window
        self.begin()

    def begin(self) -> None:
        """Requests begin to go out, or fewer go out than may: what was counted is of no use."""
        self._count, self._began = 0, None

    def answered(self, now: float) -> None:
        """An answer came, at `now` in seconds, while more requests were waiting to go out."""
        self._count += 1
        self._refusals = max(0, self._refusals - 1)
        if not self._climbs:
            if self._count >= self.size:
                self.size, self._count = min(self._most, self.size + max(1, self.size // 8)), 0
            return
        if self._began is None:  # the first windowful was sent before the window had this size
            if self._count >= self.size:
                self._count, self._began = 0, now
            return
        if self._count < self.size:
            return
        rate = self._count / max(now - self._began, 1e-9)
        if self._rate and rate < GAIN * self._rate:
            self._stay(self.size // 2)
        elif self.size == self._most:
            self._stay(self.size)
        else:
            self._rate, self.size = rate, 2 * self.size
        self.begin()

    def refused(self) -> None:
        """The server said that it is busy. Of one window of requests only the first counts."""
        if self._refusals == 0:
            self._refusals = self.size
            self._climbs = False
            self.size = max(1, self.size // 2)
            self.begin()

    def _stay(self, size: int) -> None:
        """Climb no more; a refusal may still make less of it, which then grows back to here."""
        self._climbs = False
        self.size = self._most = size
