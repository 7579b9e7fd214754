"""How many second tries a gateway allows itself (sans-IO).

When workers fail because they are overloaded, retrying every request doubles the load that makes
them fail. So retries are paid from a budget that grows with the requests: a few failures are mended
at once, and a fleet that fails as a whole is not asked twice for everything.

The form is that of Finagle's RetryBudget and of Envoy's ``retry_budget``: a share of the requests,
and a floor so that a gateway with little traffic may retry at all.
"""

from __future__ import annotations

from math import exp

WINDOW_S = 10.0
"""Requests and retries are forgotten with this time constant (Finagle's time to live)."""


class RetryBudget:
    """Compares retries with requests of late.

    Args:
        share: Retries allowed for each request.
        floor_per_s: Retries a second that are allowed whatever the requests.
    """

    def __init__(self, share: float, floor_per_s: float) -> None:
        self._share = share
        self._floor = floor_per_s * WINDOW_S
        self._requests = 0.0
        self._retries = 0.0
        self._at_s: float | None = None

    def request(self, now_s: float) -> None:
        """A request came."""
        self._forget(now_s)
        self._requests += 1.0

    def take(self, now_s: float) -> bool:
        """Return whether one more retry is allowed, and count it if so."""
        self._forget(now_s)
        if self._retries + 1.0 > self._floor + self._share * self._requests:
            return False
        self._retries += 1.0
        return True

    def _forget(self, now_s: float) -> None:
        passed_s = 0.0 if self._at_s is None else max(0.0, now_s - self._at_s)
        self._at_s = now_s
        if passed_s:
            kept = exp(-passed_s / WINDOW_S)
            self._requests *= kept
            self._retries *= kept
