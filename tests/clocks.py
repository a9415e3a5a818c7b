"""A clock for what waits: it moves only while somebody sleeps."""


class Clock:
    """Tells the time, from `now` on. With `error`, the third sleep of equal length from time 0 on raises it."""

    def __init__(self, now: float = 0.0, error: type[BaseException] | None = None) -> None:
        self.now = now
        self.error = error

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.error and self.now > 2 * seconds:
            raise self.error
