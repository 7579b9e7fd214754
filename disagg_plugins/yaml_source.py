"""A YAML file as plain data, and the line of every key in it.

Only plain data: no tags, no merge keys, no duplicate keys; bounded in bytes, depth and the number
of values after aliases are followed, so a small file cannot become a large one.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import yaml

from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 1 << 20
"""A policy of a thousand workers is about 200 KiB."""

MAX_VALUES = 100_000
MAX_DEPTH = 32

PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class YamlSource:
    """The data of a file and where it stands.

    Attributes:
        data: Dictionaries, lists and scalars.
        lines: The 1-based line of each key or list item, by its path.
        file: The file's name, for errors.
    """

    data: object
    lines: dict[KeyPath, int]
    file: str

    def line(self, path: KeyPath) -> int | None:
        """Return the line of ``path``, or of the nearest thing around it that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read_bounded(path: Path, limit_bytes: int, what: str) -> tuple[bytes, int]:
    """Return the bytes of a regular file of at most ``limit_bytes``, and its mode.

    Raises:
        ConfigError: It is missing, no regular file, too large or not readable.
    """
    try:
        # O_NONBLOCK: a named pipe in its place must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"the {what} is not a regular file", file=str(path))
            content = file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no such {what}", file=str(path)) from None
    except OSError as exc:
        raise ConfigError(f"cannot read the {what}: {exc.strerror}", file=str(path)) from exc
    if len(content) > limit_bytes:
        raise ConfigError(f"the {what} is larger than {limit_bytes} bytes", file=str(path))
    return content, mode


def parse_yaml(content: bytes, file: str) -> YamlSource:
    """Return the data of a YAML document.

    Raises:
        ConfigError: It is no YAML, or uses what is not allowed here.
    """
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise ConfigError(f"not UTF-8 at byte {exc.start}", file=file) from exc
    except yaml.YAMLError as exc:
        raise _syntax_error(exc, file) from exc
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError("the file is empty", file=file)
        reading = _Reading(loader, file)
        return YamlSource(reading.value(node, ()), reading.lines, file)
    except yaml.YAMLError as exc:
        raise _syntax_error(exc, file) from exc
    except RecursionError:
        raise ConfigError(f"nested deeper than {MAX_DEPTH} levels", file=file) from None
    except ValueError as exc:  # from a scalar: an impossible date, a number of 5,000 digits
        raise ConfigError(f"not a value: {exc}", file=file) from exc
    finally:
        loader.dispose()


@dataclass(slots=True)
class _Reading:
    loader: yaml.SafeLoader
    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    values: int = 0

    def value(self, node: yaml.Node, path: KeyPath) -> object:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.error(node, f"more than {MAX_VALUES} values; aliases count each time", path)
        if len(path) > MAX_DEPTH:
            raise self.error(node, f"nested deeper than {MAX_DEPTH} levels", ())
        self.lines.setdefault(path, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN_TAGS:
            raise self.error(node, f"the tag {node.tag} is not allowed", path)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        if node.tag == "tag:yaml.org,2002:timestamp":
            return str(node.value)
        scalar: object = self.loader.construct_object(node)
        return scalar

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        result: dict[str, object] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise self.error(key_node, "merge keys (<<) are not allowed", path)
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node, "a key must be plain text", path)
            key, line = str(key_node.value), key_node.start_mark.line + 1
            here = (*path, key)
            if key in result:
                raise self.error(key_node, f"stands twice, first in line {first_lines[key]}", here)
            first_lines[key] = self.lines[here] = line
            result[key] = self.value(value_node, here)
        return result

    def error(self, node: yaml.Node, problem: str, path: KeyPath) -> ConfigError:
        return ConfigError(
            problem, file=self.file, line=node.start_mark.line + 1, key=dotted(path) or None
        )


def dotted(path: KeyPath) -> str:
    """Return a path as people write it: ``fleet.workers[0].url``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _syntax_error(exc: yaml.YAMLError, file: str) -> ConfigError:
    mark = getattr(exc, "problem_mark", None)
    problem = getattr(exc, "problem", None) or getattr(exc, "reason", None) or "cannot be read"
    context = getattr(exc, "context", None)
    text = f"not valid YAML: {problem}" + (f" ({context})" if context else "")
    return ConfigError(text, file=file, line=None if mark is None else mark.line + 1)
