"""From a policy file to a ``Policy``: every error names file, line, key and what is allowed."""

from __future__ import annotations

import difflib
import os
import types
import typing
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from disagg_plugins.credentials import looks_like_a_secret, read_secret
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import Fleet, Policy, Section, WorkerPolicy
from disagg_plugins.policy_advice import advice, contradictions
from disagg_plugins.scheduling.profile_file import read_profile
from disagg_plugins.yaml_source import (
    MAX_FILE_BYTES,
    KeyPath,
    YamlSource,
    dotted,
    parse_yaml,
    read_bounded,
)

if typing.TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SECRET_FIX = (
    "write secret: {env: NAME} or secret: {file: PATH}, and keep the secret itself out of the file"
)
ENVIRONMENT_FIX = "set it in the environment of `disagg up`: workers inherit it"
QUOTE_FIX = 'YAML reads it as something else than text: put it in quotes, "..."'

SHOWN_CHARACTERS = 60
"""Of a wrong value in an error."""


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy and the file it came from.

    Attributes:
        policy: The policy.
        path: The file, absolute; relative paths in the policy start at its folder.
        warnings: What is allowed and yet likely not meant, one sentence each.
    """

    policy: Policy
    path: Path
    warnings: tuple[str, ...]

    @property
    def base_dir(self) -> Path:
        """Return the folder where the policy's relative paths start."""
        return self.path.parent

    def secret(self) -> bytes:
        """Return the shared secret.

        Raises:
            ConfigError: See ``credentials.read_secret``.
        """
        return read_secret(self.policy.secret, self.base_dir)


def read_policy(path: str | Path) -> LoadedPolicy:
    """Read, check and return the policy of a file.

    Raises:
        ConfigError: The file cannot be read, or something in it is wrong. One error tells
            everything that was found.
    """
    absolute = Path(os.path.abspath(path))
    content, _mode = read_bounded(absolute, MAX_FILE_BYTES, "policy file")
    source = parse_yaml(content, str(path))
    if not isinstance(source.data, dict):
        raise ConfigError(
            f"a policy is a mapping of keys, not {_kind(source.data)}", file=source.file, line=1
        )
    problems = list(_secrets(source))
    policy: Policy | None = None
    try:
        policy = Policy.model_validate(source.data)
    except ValidationError as exc:
        problems += _problems(exc, source, {tuple(p.path) for p in problems})
    if policy is not None:
        problems += [_Problem(path, text) for path, text in contradictions(policy)]
    if problems or policy is None:
        raise _combined(problems, source)
    policy = _with_profile(policy, absolute.parent)
    return LoadedPolicy(policy, absolute, tuple(advice(policy, absolute.parent)))


class _FleetAlone(Section):
    """So that what is wrong with a worker is found and told as in a policy."""

    fleet: Fleet


def read_workers(content: bytes, file: str) -> tuple[WorkerPolicy, ...]:
    """Return the workers of a YAML list, as they stand in ``fleet.workers`` of a policy.

    Raises:
        ConfigError: Something is wrong; the text tells all of it, with file, line and key.
    """
    source = parse_yaml(content, file)
    if not isinstance(source.data, list):
        raise ConfigError(f"a list of workers is needed, not {_kind(source.data)}", file=file)
    return _checked_workers(source.data, source.lines, file)


def check_worker(data: object) -> WorkerPolicy:
    """Return the worker that somebody describes as in ``fleet.workers`` of a policy.

    Raises:
        ConfigError: Something is wrong; the text tells all of it, with the keys.
    """
    return _checked_workers([data], {}, None)[0]


def _checked_workers(
    data: list[object], lines: Mapping[KeyPath, int], file: str | None
) -> tuple[WorkerPolicy, ...]:
    outer: KeyPath = ("fleet", "workers")
    # The watch stands for the other workers, among whom one may write the answers.
    whole = {"fleet": {"workers": data, "watch": "elsewhere"}}
    source = YamlSource(whole, {(*outer, *path): line for path, line in lines.items()}, file or "")
    problems = list(_secrets(source))
    workers: list[WorkerPolicy] = []
    try:
        workers = _FleetAlone.model_validate(whole).fleet.workers
    except ValidationError as exc:
        problems += _problems(exc, source, {tuple(p.path) for p in problems})
    for index, worker in enumerate(workers):
        if worker.launch is not None:
            text = "only `disagg up` starts workers, and only those of the policy"
            problems.append(_Problem((*outer, index, "launch"), text))
    if problems:
        shown = 2 if file else 3  # one worker alone needs no index
        inner = [replace(problem, shown=shown) for problem in problems]
        raise _combined(inner, source)
    return tuple(workers)


def _with_profile(policy: Policy, base_dir: Path) -> Policy:
    """Return the policy with the path of its profile made absolute, after a look into the file."""
    named = policy.scheduler.profile
    if named is None:
        return policy
    path = base_dir / named.expanduser()
    read_profile(path)
    scheduler = policy.scheduler.model_copy(update={"profile": path})
    return policy.model_copy(update={"scheduler": scheduler})


@dataclass(frozen=True, slots=True)
class _Problem:
    path: KeyPath
    text: str
    fix: str | None = None
    shown: int = 0  # where the part of the path begins that is told

    def error(self, source: YamlSource) -> ConfigError:
        return ConfigError(
            self.text,
            file=source.file or None,
            line=source.line(self.path),
            key=dotted(self.path[self.shown :]) or None,
            fix=self.fix,
        )


def _combined(problems: list[_Problem], source: YamlSource) -> ConfigError:
    errors = [p.error(source) for p in problems]
    errors.sort(key=lambda e: e.line or 0)
    if len(errors) == 1:
        return errors[0]
    lines = "".join(f"\n  {error}" for error in errors)
    return ConfigError(f"{len(errors)} things are wrong:{lines}", file=source.file or None)


def _secrets(source: YamlSource) -> Iterator[_Problem]:
    """Yield a problem for each value whose key says that it is a secret; never the value."""
    stack: list[tuple[KeyPath, object]] = [((), source.data)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [((*path, index), item) for index, item in enumerate(value)]
        elif isinstance(value, (str, int, float)) and _holds_a_secret(path):
            launch = "launch" in path and "env" in path
            yield _Problem(
                path,
                "looks like a secret in plain sight; secrets never stand in the policy",
                ENVIRONMENT_FIX if launch else SECRET_FIX,
            )


def _holds_a_secret(path: KeyPath) -> bool:
    """Return whether the key is named like a secret, and is not one of ours or close to one."""
    if path == ("secret",):
        return True
    key = path[-1] if path else 0
    if not isinstance(key, str) or not looks_like_a_secret(key):
        return False
    return not difflib.get_close_matches(key, _fields(path[:-1]), n=1, cutoff=0.8)


def _problems(exc: ValidationError, source: YamlSource, known: set[KeyPath]) -> Iterator[_Problem]:
    for error in exc.errors(include_url=False, include_context=True):
        path: KeyPath = tuple(error["loc"])
        if any(path[: len(other)] == other for other in known):
            continue
        hidden = any(isinstance(part, str) and looks_like_a_secret(part) for part in path)
        kind, value = error["type"], error["input"]
        context: Mapping[str, object] = error.get("ctx", {})
        if kind == "extra_forbidden":
            yield _unknown_key(path)
        elif kind == "missing":
            yield _Problem(path, "is missing")
        elif hidden and kind in ("model_type", "string_pattern_mismatch"):
            yield _Problem(path, "is not the name of an environment variable", SECRET_FIX)
        elif kind in ("enum", "literal_error"):
            expected = str(context.get("expected", ""))
            yield _Problem(
                path, f"{_shown(value)} is not allowed; allowed: {expected}", _near(value, expected)
            )
        elif kind == "value_error":
            yield _Problem(path, str(context.get("error", error["msg"])))
        else:
            text = error["msg"][:1].lower() + error["msg"][1:]
            got = "" if hidden else f", not {_shown(value)}"
            quote = kind == "string_type" and isinstance(value, (bool, int, float))
            yield _Problem(path, text + got, QUOTE_FIX if quote else None)


def _unknown_key(path: KeyPath) -> _Problem:
    allowed = _fields(path[:-1])
    close = difflib.get_close_matches(str(path[-1]), allowed, n=1)
    fix = f"did you mean {close[0]}?" if close else None
    return _Problem(path, f"unknown key; allowed here: {', '.join(allowed)}", fix)


def _fields(path: KeyPath) -> list[str]:
    """Return the keys that the section at ``path`` may have."""
    model: type[BaseModel] = Policy
    named = False  # the next part is a name that somebody gave: SLO classes and tenants have some
    for part in path:
        if named or isinstance(part, int):
            named = False
            continue
        field = model.model_fields.get(part)
        found = None if field is None else _model_in(field.annotation)
        if found is None:
            return []
        named = field is not None and typing.get_origin(field.annotation) is dict
        model = found
    return list(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the section class inside ``X``, ``X | None``, ``list[X]`` or ``Annotated[X, ...]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _near(value: object, expected: str) -> str | None:
    words = expected.replace(" or ", ", ").replace("'", "").split(", ")
    close = difflib.get_close_matches(str(value).lower(), words, n=1)
    return f"did you mean {close[0]}?" if close else None


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)) or value is None:
        return _kind(value)
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"a {type(value).__name__}"
