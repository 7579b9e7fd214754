"""What each tenant may have at once and over time. Pure: times are parameters.

These limits are no ``disagg_select_admission``: a request counts from its admission to its very
end, whatever that is, and a refusal by anybody gives back what was taken. A hook is told neither.

A tenant that the policy names has an account of its own. All others, and requests without a tenant,
fall under the rule ``*``, if there is one: each name with an account of its own, forgotten when it
was not used for long and many others came.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.types import Refusal

if TYPE_CHECKING:
    from disagg_plugins.policy import TenantPolicy

ANYBODY = "*"

MAX_NAME_CHARS = 128
"""Longer names are cut: a UUID has 36, a SHA-256 in hexadecimal 64."""

MAX_ACCOUNTS = 10_000
"""Accounts that are remembered, some 200 bytes each. More tenants than that within the few seconds
in which a bucket fills find theirs full again."""

BURST_S = 10.0
"""A bucket without a size of its own holds what flows in within this time."""

RETRY_REQUESTS_S = 1.0
"""Told to a tenant that has all its requests in flight: one ends at any time."""


@dataclass(slots=True)
class _Account:
    requests: int = 0
    tokens: float = 0.0  # in the bucket; negative after a prompt larger than the bucket
    at_s: float = 0.0


class Tenants:
    """The accounts of all tenants.

    Args:
        rules: By tenant, ``*`` for the others; no rules: no limits, and nothing is kept.
    """

    def __init__(self, rules: Mapping[str, TenantPolicy]) -> None:
        self._rules = rules
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def rule(self, tenant: str | None) -> TenantPolicy | None:
        """Return what the policy says of a tenant, or None."""
        if not self._rules:
            return None
        return self._rules.get(tenant or ANYBODY) or self._rules.get(ANYBODY)

    def enter(self, tenant: str | None, prompt_tokens: int, now_s: float) -> Refusal | None:
        """Admit a request, which must then ``leave``; or return why not.

        A prompt larger than the whole bucket is admitted when that is full, and leaves a debt.
        """
        rule = self.rule(tenant)
        if rule is None:
            return None
        account = self._account(tenant or "")
        if rule.max_requests is not None and account.requests >= rule.max_requests:
            return Refusal(
                f"{_named(tenant)} has {account.requests} requests in flight, "
                f"{rule.max_requests} allowed (policy key scheduler.tenants)",
                RETRY_REQUESTS_S,
                status=429,
            )
        per_s = rule.prompt_tokens_per_s
        if per_s is not None:
            burst = float(rule.burst_tokens or max(1.0, per_s * BURST_S))
            passed_s = now_s - account.at_s
            if not account.at_s:
                account.tokens = burst
            else:
                account.tokens = min(burst, account.tokens + max(0.0, passed_s) * per_s)
            account.at_s = now_s
            lacking = min(float(prompt_tokens), burst) - account.tokens
            if lacking > 0.0:
                return Refusal(
                    f"{_named(tenant)} has sent more than {per_s:g} prompt tokens a second "
                    "(policy key scheduler.tenants)",
                    lacking / per_s,
                    status=429,
                )
            account.tokens -= prompt_tokens
        account.requests += 1
        return None

    def leave(self, tenant: str | None, unread_tokens: int = 0) -> None:
        """A request has ended; ``unread_tokens`` go back into the bucket."""
        account = self._accounts.get(tenant or "") if self._rules else None
        if account is not None and account.requests > 0:
            account.requests -= 1
            account.tokens += unread_tokens

    def _account(self, name: str) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = _Account()
            if len(self._accounts) > MAX_ACCOUNTS:
                self._forget()
        else:
            self._accounts.move_to_end(name)
        return account

    def _forget(self) -> None:
        """Drop the account that was used longest ago, of a few; one with requests stays.

        Those that stay are as many as there are requests in flight, which the gateway bounds.
        """
        for _ in range(8):
            name, account = next(iter(self._accounts.items()))
            if not account.requests:
                del self._accounts[name]
                return
            self._accounts.move_to_end(name)


def _named(tenant: str | None) -> str:
    return f"tenant {tenant[:64]!r}" if tenant else "a client without a tenant"
