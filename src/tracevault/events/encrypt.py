"""Encrypted fields: which values of a payload, and how they are replaced while it becomes JSON text.

After masking and before anything is kept: queue, spool, dead letters, table and backups only ever see ciphertext.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID

from tracevault.errors import ConfigError, KeyStoreError, ValidationError
from tracevault.events.data_key import ENVELOPE, KeyCache, Path, is_envelope, place_of
from tracevault.events.mask import fold
from tracevault.events.payload import EXACT, MAX_DEPTH, Encoder, Refused, Walk, decode, jsonb_text, too_deep
from tracevault.events.record import GENERATED_COLUMNS, AuditRecord
from tracevault.events.rules import got, printable

_log = logging.getLogger("tracevault")

ROOTS = ("data", "meta")
DIFF_PARTS = ("before", "after", "diff")
ANY = "*"
_KNOWN_KEYS = 1024
_MOST_WARNINGS = 1000
# After so many keys that a store failed to say anything of, it is not asked for others of the same page.
_MOST_FAILURES = 3


class Node:
    """A step of the paths. ``whole``: a path ends here, so the value is encrypted as it stands."""

    __slots__ = ("children", "whole")

    def __init__(self, paths: Iterable[Sequence[str]] = ()) -> None:
        self.children: dict[str, Node] = {}
        self.whole = False
        for path in paths:
            node = self
            for part in path:
                node = node.children.setdefault(part, Node())
            node.whole = True


class Front:
    """How far the paths have come at one place of a payload: the steps that match so far, each once.

    Where a key leads is remembered, so that the keys of most events are looked up and not folded.
    """

    __slots__ = ("_fronts", "_known", "nodes", "whole")

    def __init__(self, nodes: tuple[Node, ...], fronts: dict[tuple[Node, ...], Front]) -> None:
        self.nodes = nodes
        self.whole = any(node.whole for node in nodes)
        self._fronts = fronts
        self._known: dict[str | int, Front | None] = {}

    @classmethod
    def of(cls, paths: Iterable[Sequence[str]]) -> Front:
        """Return where all ``paths`` begin."""
        return cls((Node(paths),), {})

    def below(self, key: str | int) -> Front | None:
        """Return how far the paths come at a key, or at the item of a list; None if none goes there.

        A key with dots is also taken for as many keys. A path goes through a list by itself; `*`, or its number,
        may stand for an item.
        """
        try:
            return self._known[key]
        except KeyError:
            pass
        nodes = self.nodes + _step(self.nodes, str(key)) if isinstance(key, int) else _step(self.nodes, fold(key))
        nodes = tuple(dict.fromkeys(nodes))
        front = None
        if nodes:
            front = self._fronts.get(nodes) or self._fronts.setdefault(nodes, Front(nodes, self._fronts))
        if len(self._known) < _KNOWN_KEYS:
            self._known[key] = front
        return front


def _step(nodes: tuple[Node, ...], key: str) -> tuple[Node, ...]:
    found = _children(nodes, key)
    if "." in key:
        inner = nodes
        for part in key.split("."):
            inner = _children(inner, part)
        found += inner
    return found


def _children(nodes: tuple[Node, ...], part: str) -> tuple[Node, ...]:
    return tuple(node.children[name] for node in nodes for name in (part, ANY) if name in node.children)


def parse_paths(fields: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return the paths of `encrypt_fields` below each root; `ConfigError` for one that is none, or not allowed."""
    found: dict[str, list[tuple[str, ...]]] = {root: [] for root in ROOTS}
    for field in fields:
        root, *keys = field.split(".")
        if root not in ROOTS:
            raise ConfigError(
                f"`encrypt_fields`: a path begins with `data.` or `meta.`, got {got(field)}; "
                f"did you mean `data.{printable(field)}`?",
                field="encrypt_fields",
            )
        if not keys or not all(keys):
            raise ConfigError(
                f"`encrypt_fields`: a path is `{root}.` and keys with a dot between them, got {got(field)}",
                field="encrypt_fields",
            )
        path = tuple(map(fold, keys))
        if root == "data":
            _check_not_generated(field, path)
        found[root].append(path)
    return found


def _check_not_generated(field: str, path: tuple[str, ...]) -> None:
    for stored in GENERATED_COLUMNS:
        generated = stored.column.generated or ()
        if len(path) <= len(generated) and all(a in (ANY, b) for a, b in zip(path, generated, strict=False)):
            raise ConfigError(
                f"`encrypt_fields`: `{field}` would encrypt `data.{'.'.join(generated)}`, of which PostgreSQL makes "
                f"the column `{stored.name}`: name the other keys one by one",
                field="encrypt_fields",
            )


def _in_diff(paths: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield where the values of ``paths`` stand in what `emit_diff` stores: ``{before, after, diff}``.

    A path of the thing itself covers both sides and the differences. So does one that names a side, since what it
    hides there would else be read in the other places.
    """
    for path in paths:
        yield path
        inside = [path, path[1:]] if path[0] in ("before", "after", ANY) else [path]
        for keys in inside:
            for side in ("before", "after"):
                yield (side, *keys)
                # A key with dots, which stands for several, has its change below it as well.
                yield from (("diff", *keys[:count], side, *keys[count:]) for count in range(1, len(keys) + 1))
            if not keys:
                yield ("diff",)


class Encryption:
    """What the options `encrypt_fields` and `key_store` say."""

    def __init__(self, fields: Iterable[str], keys: KeyCache) -> None:
        paths = parse_paths(fields)
        self.keys = keys
        self.roots = {root: Front.of(paths[root]) for root in ROOTS}
        in_diff = Front.of(_in_diff(paths["data"]))
        self.diff_parts = {part: in_diff.below(part) for part in DIFF_PARTS}


class EventCipher:
    """Encrypts the values of one event. The key is looked up, or made, when the first value needs it."""

    def __init__(self, encryption: Encryption, id_: UUID, subject: str | None) -> None:
        self.id = id_
        self._encryption = encryption
        self._subject = subject

    def walk(self, encoder: Encoder, root: str) -> EncryptingWalk:
        """Return the walk through ``data`` or ``meta``."""
        return EncryptingWalk(encoder, self, self._encryption.roots[root], (root,))

    def diff_walks(self, encoder: Encoder) -> dict[str, EncryptingWalk]:
        """Return the walks through the parts of what `emit_diff` stores."""
        parts = self._encryption.diff_parts.items()
        return {part: EncryptingWalk(encoder, self, front, ("data", part)) for part, front in parts}

    def seal(self, text: str, path: Path) -> str:
        """Return the envelope of a value's JSON text."""
        if self._subject is None:
            field = "".join(f"[{part}]" if isinstance(part, int) else "." + printable(part) for part in path)[1:]
            raise ValidationError(
                f"`{field}` is to be encrypted (`encrypt_fields`), and the event does not say by whose key: give it "
                'a `target`, or `subject="user/42"`',
                field="subject",
            )
        # The canonical text, so that the same content is the same text however it was written.
        canonical = text if text[0] == '"' else jsonb_text(EXACT.decode(text))
        return self._encryption.keys.for_subject(self._subject).seal(canonical, place_of(self.id, path))


class EncryptingWalk(Walk):
    """Encodes a payload in which some values are to be encrypted.

    ``front`` is how far the paths have come, ``path`` where the walk is. Off the paths it is the usual walk.
    """

    __slots__ = ("cipher", "enclosed", "front", "path")

    def __init__(self, encoder: Encoder, cipher: EventCipher, front: Front | None, path: Path) -> None:
        super().__init__(encoder)
        self.cipher = cipher
        self.front = front
        self.path = path
        self.enclosed = False

    def object_text(self, value: dict[Any, Any], depth: int) -> str:
        front = self.front
        if front is None:
            return super().object_text(value, depth)
        if front.whole:
            return self.envelope(super().object_text, value, depth)
        self.enter(value, depth)
        known = self.encoder.prefixes  # of keys that are not masked
        parts = []
        key: Any = ""
        try:
            for key, item in value.items():
                prefix = known.get(key) if type(key) is str else None
                if prefix is None:
                    prefix = self.key_text(key)
                    if self.masks(key):
                        self.check_hidden(item, depth)
                        parts.append(prefix + self.encoder.mask_text)
                        continue
                parts.append(prefix + self.below(key, front, item, depth))
        except Refused as refused:
            refused.path.append(key if isinstance(key, str) else self.key_shown(key))
            raise
        return "{" + ", ".join(parts) + "}"

    def array_text(self, value: list[Any] | tuple[Any, ...], depth: int) -> str:
        front = self.front
        if front is None:
            return super().array_text(value, depth)
        self.enter(value, depth)
        parts: list[str] = []
        try:
            for index, item in enumerate(value):
                parts.append(self.below(index, front, item, depth))
        except Refused as refused:
            refused.path.append(len(parts))
            raise
        return "[" + ", ".join(parts) + "]"

    def value_text(self, item: Any, depth: int) -> str:
        if self.front is not None and self.front.whole:
            return self.envelope(super().value_text, item, depth)
        return super().value_text(item, depth)

    def below(self, key: str | int, front: Front, item: Any, depth: int) -> str:
        """Return the text of what stands under ``key`` in a container to which the paths have come."""
        path = self.path
        self.front = front.below(key)
        try:
            if self.front is None:
                return super().value_text(item, depth)
            self.path = (*path, str.__str__(key) if isinstance(key, str) else key)
            return self.value_text(item, depth)
        finally:
            self.front, self.path = front, path

    def envelope(self, encode: Callable[[Any, int], str], value: Any, depth: int) -> str:
        """Return a value encrypted; None stays."""
        outer, self.front, self.enclosed = self.front, None, True
        text = encode(value, depth)
        self.front, self.enclosed = outer, False
        if text == "null":
            return text
        envelope = self.cipher.seal(text, self.path)
        self.spend(len(envelope))
        return envelope

    def enter(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> None:
        """Refuse a container that is too deep, or too many."""
        if depth > MAX_DEPTH:
            raise too_deep()
        self.spend(len(value) + 1)

    def shown(self, item: object) -> str:
        return "" if self.enclosed else super().shown(item)

    def key_shown(self, key: object) -> str:
        return f"an instance of {type(key).__name__}" if self.enclosed else super().key_shown(key)


class Decryption:
    """Opens the envelopes in records, as far as there are keys.

    What cannot be opened stays as it is, an envelope, which nobody takes for a value. That is what becomes of a page
    of which one key is destroyed. An envelope that a key does not authenticate was changed, or moved here from
    elsewhere: it stays as well, and is logged, once for each event.
    """

    def __init__(self, keys: KeyCache) -> None:
        self._keys = keys
        self._warned: set[tuple[UUID, str]] = set()

    def open_all(self, records: Iterable[AuditRecord]) -> None:
        """Replace the envelopes in ``records``, which are the caller's own, by what they hold."""
        failed: set[str] = set()
        for record in records:
            for root, payload in (("data", record.data), ("meta", record.meta)):
                # Not by recursion: other writers may nest deeper than Python's stack allows.
                containers: list[tuple[Any, Path]] = [(payload, (root,))]
                while containers:
                    container, path = containers.pop()
                    if type(container) not in (dict, list):
                        continue
                    items = container.items() if type(container) is dict else enumerate(container)
                    for key, value in list(items):
                        if is_envelope(value):
                            container[key] = self._opened(value, record.id, (*path, key), failed)
                        elif type(value) in (dict, list):
                            containers.append((value, (*path, key)))

    def _opened(self, value: dict[str, dict[str, str]], id_: UUID, path: Path, failed: set[str]) -> Any:
        envelope = value[ENVELOPE]
        if envelope["key"] in failed or len(failed) >= _MOST_FAILURES:
            return value
        try:
            key = self._keys.find(envelope["key"])
        except KeyStoreError as error:
            failed.add(envelope["key"])
            self._warn(id_, "an encrypted value cannot be read", str(error))
            return value
        # A key with this id and another hash: the store gives one id to key after key, and this one is gone.
        if key is None or key.hash != envelope["hash"]:
            return value
        text = key.open(envelope, place_of(id_, path))
        if text is None:
            self._warn(id_, "an encrypted value does not authenticate", "it was changed, or belongs elsewhere")
            return value
        return decode(text)

    def _warn(self, id_: UUID, what: str, why: str) -> None:
        if (id_, what) not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add((id_, what))
            _log.warning("%s, and stays as it is stored, in the event %s: %s", what, id_, why)
