"""Whose turn it is among the requests of several concurrent workers."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from safesail.interpretation.exchange import Admit

__all__ = ["Turns"]


class Turns:
    """The requests 0 … n - 1 in their order, each handed to one worker, as far as `admit` lets them.

    A request that is not admitted waits until some call in flight has ended and asks again; with no call in flight it
    never will be, and there are no more turns. After an error there are none either: what is in flight ends, and its
    answers are not lost.
    """

    def __init__(self, n: int, admit: Admit):
        self.error: Exception | None = None
        """The first one that a worker met."""
        self._waiting = deque(range(n))
        self._admit = admit
        self._n_in_flight = 0
        self._changed = asyncio.Condition()

    async def take(self) -> int | None:
        """The next request to send, which must be followed by `ending()`; None when there is none."""
        async with self._changed:
            while self._waiting:
                if self._admit([self._waiting[0]]):
                    self._n_in_flight += 1
                    return self._waiting.popleft()
                if self._n_in_flight == 0:
                    self._waiting.clear()
                else:
                    await self._changed.wait()
            return None

    @asynccontextmanager
    async def ending(self) -> AsyncIterator[None]:
        """Around the work on a request that was taken."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            self._waiting.clear()
        finally:
            async with self._changed:
                self._n_in_flight -= 1
                self._changed.notify_all()
