"""A line -> text, and equal lines of many ranks -> one: `[0-511] loaded shard`.

Bytes on disk stay bytes up to the output, where what is not UTF-8 becomes \\xNN and so do control characters.
csrc/log_text.cpp says the same in C++, for speed, and a test holds both to the same bytes: change them
together. This one also serves `--follow`, and wherever there is no compiler.
"""

from __future__ import annotations

import calendar
import dataclasses
import functools
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from strop.obs import log_line, secrets
from strop.slurm import hostlist

WINDOW_US = 2_000_000
"""Lines are collapsed with a first one at most this much earlier."""
MAX_GROUPS = 16384
"""So many lines at most wait for others like them."""
RAW = b"RAW"
LAST_TIME_US = 253402300799999999
"""Of the year 9999."""
FOREVER_US = LAST_TIME_US + 1

_STRING = rb'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"'
_NUMBER = rb"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_ARRAY = rb"\[(?:" + _NUMBER + rb"(?:," + _NUMBER + rb")*)?\]"
_PAIR = rb',"([a-z_]+)":(' + b"|".join([_STRING, _NUMBER, _ARRAY, rb"null|true|false"]) + rb")"
_LINE = re.compile(re.escape(log_line.PREFIX) + rb'([0-9T:.Z-]{27})"((?:' + _PAIR + rb")*)\}")
_PAIRS = re.compile(_PAIR)
_TIME = re.compile(rb"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)")
_ESCAPE = re.compile(rb"\\(?:u([dD][89abAB]..)\\u([dD][c-fC-F]..)|u(....)|(.))")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_JSON_CONTROL = re.compile(rb"\x7f|\xc2[\x80-\x9f]")
_NUMBERS = re.compile(rb"(?:(?:^|(?<=[ =(\[,:]))-)?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_BAD_BYTE = re.compile("[\udc80-\udcff]")
_PLAIN_ESCAPES = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}
_LEVELS = {b"DEBUG": 10, b"WARNING": 30, RAW: 30, b"ERROR": 40, b"CRITICAL": 50}
_COLOURS = {
    b"DEBUG": b"\x1b[2m",
    b"WARNING": b"\x1b[33m",
    RAW: b"\x1b[35m",
    b"ERROR": b"\x1b[31m",
    b"CRITICAL": b"\x1b[1;31m",
}


@dataclass(frozen=True)
class Selection:
    """Which lines; ranks and attempts are chosen by `log_files.find` already."""

    since_us: int = 0
    until_us: int = FOREVER_US
    """Corrected times, inclusive."""
    level: int = 0
    """As in logging: 30 for warnings and above."""
    steps: Optional[tuple[int, int]] = None
    """Inclusive."""
    phase: Optional[str] = None
    nodes: Optional[frozenset[str]] = None
    grep: Optional[re.Pattern[str]] = None
    """Searched in the message and the traceback."""


@dataclass(frozen=True)
class View:
    """How lines are shown."""

    json: bool = False
    """As they lie on disk, with the corrected time; nothing is collapsed."""
    collapse: bool = True
    ranges: bool = False
    """Collapse lines that differ only in numbers, too."""
    colour: bool = False
    show_attempt: bool = False


@dataclass(slots=True)
class Line:
    """One line of a rank. The bytes are those on disk: JSON's escapes unless `plain`."""

    key: int = 0
    """Corrected time in microseconds, never less than that of the rank's line before: the order."""
    time: int = 0
    """Corrected time in microseconds, as shown."""
    rank: int = 0
    attempt: int = 0
    plain: bool = False
    """Raw, or no JSON: `message` is the text itself."""
    whole: bytes = b""
    level: bytes = b""
    logger: bytes = b""
    message: bytes = b""
    traceback: bytes = b""
    phase: bytes = b""
    node: bytes = b""
    step: int = -1
    mark: Optional[tuple[int, int]] = None
    dropped: int = 0
    bad_utf8: bool = False

    @property
    def text(self) -> bytes:
        return self.message if self.plain else unescape(self.message)


def level_number(level: bytes) -> int:
    """RAW counts as a warning; a level of one's own as INFO."""
    return _LEVELS.get(level, 20)


def passes(line: Line, selection: Selection) -> bool:
    """Whether a line is selected; its end is the caller's concern."""
    if line.logger == b"raw":  # it only carries a mark
        return False
    if line.key < selection.since_us or level_number(line.level) < selection.level:
        return False
    if selection.steps is not None and not selection.steps[0] <= line.step <= selection.steps[1]:
        return False
    if selection.phase is not None and unescape(line.phase) != selection.phase.encode(
        "utf-8", "backslashreplace"
    ):
        return False
    if selection.nodes is not None and _shown(unescape(line.node)) not in selection.nodes:
        return False
    if selection.grep is None:
        return True
    text = line.text + (b"\n" + unescape(line.traceback) if line.traceback else b"")
    return selection.grep.search(_shown(text)) is not None


def valid_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def parse_line(text: bytes) -> Optional[Line]:
    """The line, its time not corrected yet; None if it is not of log_line's form: it is shown as it is."""
    match = _LINE.fullmatch(text)
    micros = match and _microseconds(match[1])
    if match is None or micros is None:
        return None
    line = Line(time=micros, whole=text, bad_utf8=not valid_utf8(text))
    for key, value in _PAIRS.findall(match[2]):
        if key in (b"message", b"level", b"logger", b"phase", b"node", b"traceback"):
            setattr(line, key.decode(), value[1:-1] if value[:1] == b'"' else b"")
        elif key == b"step":
            line.step = _whole_number(value)
        elif key == b"dropped":
            line.dropped = max(0, _whole_number(value))
        elif key == b"raw" and value[:1] == b"[":
            pair = [_whole_number(part) for part in value[1:-1].split(b",", 1)]
            if len(pair) == 2 and min(pair) >= 0:
                line.mark = (pair[0], pair[1])
    return line


def redact_line(text: bytes, redact: Callable[[str], str]) -> bytes:
    """A structured line of another writer, without secrets in any of its strings; any other as it is."""
    match = _LINE.fullmatch(text)
    if match is None:
        return text

    def string(pair: re.Match[bytes]) -> bytes:
        key, value = pair[1], pair[2]
        if value[:1] != b'"':
            return pair[0]
        old = unescape(value[1:-1]).decode("utf-8", "surrogateescape")
        new = secrets.MARKER if old and secrets.names_secret(key.decode()) else redact(old)
        if new == old:
            return pair[0]
        quoted = log_line.quoted(new).encode("utf-8", "surrogateescape")
        return b',"%b":%b' % (key, quoted)

    return text[: match.start(2)] + _PAIRS.sub(string, match[2]) + b"}"


def _whole_number(text: bytes) -> int:
    return int(text) if len(text) <= 18 and text.isdigit() else -1


def _microseconds(text: bytes) -> Optional[int]:
    seconds = _seconds(text[:19])
    tail = text[19:]
    if seconds is None or tail[:1] != b"." or tail[7:] != b"Z" or not tail[1:7].isdigit():
        return None
    return seconds * 1_000_000 + int(tail[1:7])


@functools.lru_cache(maxsize=1024)
def _seconds(text: bytes) -> Optional[int]:
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    y, m, d, hour, minute, second = map(int, match.groups())
    if y < 1970 or not 1 <= m <= 12 or hour > 23 or minute > 59 or second > 59:
        return None
    if not 1 <= d <= calendar.monthrange(y, m)[1]:
        return None
    return calendar.timegm((y, m, d, hour, minute, second))


@functools.lru_cache(maxsize=1024)
def _second_text(seconds: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()


def iso_time(time_us: int) -> bytes:
    return b"%b.%06dZ" % (_second_text(time_us // 1_000_000), time_us % 1_000_000)


def unescape(text: bytes) -> bytes:
    """The text of a JSON string; half a surrogate pair stays as it is written."""
    return _ESCAPE.sub(_unescaped, text) if b"\\" in text else text


def _unescaped(match: re.Match[bytes]) -> bytes:
    high, low, code, char = match.groups()
    if high is not None:
        return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00).encode()
    if code is not None:
        value = int(code, 16)
        return match[0] if 0xD800 <= value < 0xE000 else chr(value).encode()
    return _PLAIN_ESCAPES.get(char, char)


def clean(text: bytes) -> bytes:
    """For people: valid UTF-8, no control characters but tabs, further lines indented."""
    shown = _shown(text.rstrip(b"\n"))
    shown = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", shown)
    return shown.replace("\n", "\n    ").encode()


def printable(tree: Any) -> Any:
    """The text, or all texts in dataclasses, tuples and lists, so that a terminal only shows them: control
    characters but tab and newline, and halves of surrogate pairs, become escapes."""
    if isinstance(tree, str):
        shown = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", tree)
        return shown.encode("utf-8", "backslashreplace").decode()
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(printable, tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: printable(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **values)
    return tree


def as_json(line: Line) -> bytes:
    """The line as on disk, with the corrected time and valid UTF-8; one for what has none on disk."""
    if not line.plain:
        rest = line.whole[log_line.TIME_END :]
        if line.bad_utf8:
            text = rest.decode("utf-8", "surrogateescape")
            rest = _BAD_BYTE.sub(lambda m: f"\\\\x{ord(m[0]) - 0xDC00:02x}", text).encode()
        return _printable_json(log_line.PREFIX + iso_time(line.time) + rest + b"\n")
    fields = {
        "time": iso_time(line.time).decode(),
        "rank": line.rank,
        "node": _shown(unescape(line.node)) or None,
        "attempt": line.attempt,
        "step": line.step if line.step >= 0 else None,
        "phase": _shown(unescape(line.phase)) or None,
        "level": "RAW",
        "logger": "",
        "message": _shown(line.message),
    }
    return _printable_json(log_line.encode(fields))


def _printable_json(text: bytes) -> bytes:
    """Without the control characters that JSON allows: DEL, and 80 to 9F."""
    return _JSON_CONTROL.sub(lambda match: b"\\u00%02x" % match[0][-1], text)


def _shown(text: bytes) -> str:
    """What is not UTF-8 as \\xNN."""
    return text.decode("utf-8", "backslashreplace")


@dataclass
class Group:
    """Lines that are one in the output; it stands at its first one."""

    first: Line
    key: tuple[object, ...]
    ranks: set[int]
    text: list[bytes] = field(default_factory=list)
    """--ranges: what stands around the numbers."""
    low: list[tuple[float, bytes]] = field(default_factory=list)
    high: list[tuple[float, bytes]] = field(default_factory=list)

    def message(self) -> bytes:
        if not self.text:
            return self.first.text
        parts = [self.text[0]]
        for low, high, after in zip(self.low, self.high, self.text[1:]):
            parts += [low[1] if low[0] == high[0] else b"[%b..%b]" % (low[1], high[1]), after]
        return b"".join(parts)


class Printer:
    """Takes lines in order and gives their text: `add` each, `take` what is ready, `flush` at last."""

    def __init__(self, view: View):
        self._view = view
        self._out: list[bytes] = []
        self.size = 0
        """Bytes that are ready."""
        self._groups: deque[Group] = deque()
        self._open: dict[tuple[object, ...], Group] = {}

    def add(self, line: Line) -> None:
        if self._view.json:
            self._put(as_json(line))
        elif self._view.collapse:
            self._collapse(line)
        else:
            self._put(self._text(line, line.text, [line.rank]))

    def take(self) -> bytes:
        out, self._out, self.size = b"".join(self._out), [], 0
        return out

    def flush(self) -> None:
        while self._groups:
            self._pop()

    def _collapse(self, line: Line) -> None:
        while self._groups and line.key - self._groups[0].first.key > WINDOW_US:
            self._pop()
        ranges = self._view.ranges
        text, numbers = _split(line.text) if ranges else ([], [])
        what: object = tuple(text) if ranges else line.message
        step = 0 if ranges else line.step
        key = (line.plain, line.attempt, step, line.level, line.logger, line.phase, line.traceback, what)
        group = self._open.get(key)
        if group is not None and line.rank not in group.ranks:
            group.ranks.add(line.rank)
            group.low = [min(a, b, key=_value) for a, b in zip(group.low, numbers)]
            group.high = [max(a, b, key=_value) for a, b in zip(group.high, numbers)]
            return
        if len(self._groups) >= MAX_GROUPS:
            self._pop()
        group = Group(line, key, {line.rank}, text, numbers, numbers)
        self._groups.append(group)
        self._open[key] = group

    def _pop(self) -> None:
        group = self._groups.popleft()
        if self._open.get(group.key) is group:
            del self._open[group.key]
        self._put(self._text(group.first, group.message(), group.ranks))

    def _put(self, text: bytes) -> None:
        self._out.append(text)
        self.size += len(text)

    def _text(self, line: Line, message: bytes, ranks: Union[set[int], list[int]]) -> bytes:
        shown = hostlist.ranges(ranks).encode()
        when = iso_time(line.time)[:23].replace(b"T", b" ")
        attempt = b"#%d " % line.attempt if self._view.show_attempt else b""
        level = clean(unescape(line.level)).ljust(8)
        where = clean(unescape(line.phase))
        if line.step >= 0:
            where += b"%b%d" % (b" " if where else b"step ", line.step)
        head = where + b": " if where else b""
        if line.logger not in (b"", b"strop"):
            head += clean(unescape(line.logger)) + b": "
        tail = b"\n    " + clean(unescape(line.traceback)) if line.traceback else b""
        if self._view.colour:
            colour = _COLOURS.get(line.level, b"")
            form = b"\x1b[2m%b\x1b[0m %b\x1b[36m[%b]\x1b[0m %b%b\x1b[0m %b%b%b\n"
            return form % (when, attempt, shown, colour, level, head, clean(message), tail)
        return b"%b %b[%b] %b %b%b%b\n" % (when, attempt, shown, level, head, clean(message), tail)


def _value(number: tuple[float, bytes]) -> float:
    return number[0]


def _split(message: bytes) -> tuple[list[bytes], list[tuple[float, bytes]]]:
    """The text around the numbers, and the numbers: digits, with fraction and exponent where they are."""
    text, numbers, end = [], [], 0
    for match in _NUMBERS.finditer(message):
        text.append(message[end : match.start()])
        numbers.append((float(match[0]), match[0]))
        end = match.end()
    return [*text, message[end:]], numbers
