"""News of jobs, from the thread that draws to every client that listens."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

# Names of events.
JOB, PREVIEW = "job", "preview"


@dataclass(frozen=True)
class News:
    """Something that happened to a job.

    Attributes:
        number: Counts up.
        event: "job" or "preview".
        job: The job's id.
        data: What clients are sent.
    """

    number: int
    event: str
    job: str
    data: dict[str, Any]


class Subscription:
    """News for one client. Of each kind of news of each job, only the latest one waits for a slow client."""

    def __init__(self, owner: str, job: str | None) -> None:
        """Subscribe to the jobs of an owner, or to one of them."""
        self.owner, self.job = owner, job
        self._pending: OrderedDict[tuple[str, str], News] = OrderedDict()
        self._arrived = asyncio.Event()
        self._closed = False

    def wants(self, owner: str, job: str) -> bool:
        """Whether news of a job are for this client."""
        return owner == self.owner and self.job in (None, job)

    def put(self, news: News) -> None:
        """Add news; called in the loop's thread."""
        key = (news.event, news.job)
        self._pending.pop(key, None)
        self._pending[key] = news
        self._arrived.set()

    def close(self) -> None:
        """End the stream."""
        self._closed = True
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[News]:
        """Yield news until the server ends."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._pending:
                yield self._pending.popitem(last=False)[1]
            if self._closed:
                return


class Hub:
    """Everybody who listens."""

    def __init__(self) -> None:
        """Nobody listens yet."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._subscriptions: set[Subscription] = set()
        self._numbers = itertools.count(1)
        self._closed = False

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver news in a loop."""
        self._loop = loop

    def subscribe(self, owner: str, job: str | None = None) -> Subscription:
        """Listen to the jobs of an owner, or to one of them."""
        subscription = Subscription(owner, job)
        with self._lock:
            self._subscriptions.add(subscription)
        if self._closed:
            subscription.close()
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Listen no more."""
        with self._lock:
            self._subscriptions.discard(subscription)

    def hears(self, owner: str, job: str) -> bool:
        """Whether somebody listens to a job."""
        with self._lock:
            return any(subscription.wants(owner, job) for subscription in self._subscriptions)

    @property
    def listeners(self) -> int:
        """How many clients listen."""
        return len(self._subscriptions)

    def publish(self, event: str, owner: str, job: str, data: dict[str, Any]) -> None:
        """Tell of a job, from any thread."""
        news = News(next(self._numbers), event, job, data)
        with self._lock:
            wanted = [subscription for subscription in self._subscriptions if subscription.wants(owner, job)]
        if self._loop is None or self._loop.is_closed():
            return
        for subscription in wanted:
            self._loop.call_soon_threadsafe(subscription.put, news)

    def close(self) -> None:
        """End all streams; called in the loop's thread."""
        self._closed = True
        with self._lock:
            everybody = list(self._subscriptions)
        for subscription in everybody:
            subscription.close()
