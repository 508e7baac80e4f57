"""What the models take from the kernels' sources: sizes of rings, counts of barriers, and the names they mirror."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
FORWARD = ("attention/sm90/config.h", "attention/sm90/fwd_shared.cuh", "device/ring.cuh")
BACKWARD = ("attention/sm90/config.h", "attention/sm90/bwd_shared.cuh", "attention/sm90/bwd_plan.h", "device/ring.cuh")
# Of the first of them `Constants` takes a struct alone.
GRADIENTS = (*2 * ("attention/sm90/bias_gradient_shared.cuh",), "device/ring.cuh")
NARROW = ("matmul/sm90/config.h", "matmul/sm90/narrow.cuh", "device/ring.cuh")
PRODUCTS = ("matmul/sm90/config.h", "matmul/sm90/shared.cuh", "matmul/sm90/product.cuh", "matmul/sm90/consumer.cuh")


@functools.cache
def text(path: str) -> str:
    """A file of csrc, without comments."""
    return re.sub(r"//[^\n]*", "", (CSRC / path).read_text())


def python_of(expression: str) -> str:
    """A C++ expression of integers and truth values as one of Python."""
    expression = re.sub(r"\b(?:Config|Shared|Features)::|\bint64_t\b", "", expression)
    expression = re.sub(r"!(?!=)", " not ", expression.replace("&&", " and ").replace("||", " or ").replace("/", "//"))
    expression = expression.replace("true", "True").replace("false", "False").strip()
    return _conditional(expression)


def _conditional(expression: str) -> str:
    """`a ? b : c`, nested or in parentheses, as `b if a else c`."""
    groups: list[str] = []  # in parentheses, innermost first

    def put_away(match: re.Match) -> str:
        groups.append(f"({_choice(match[1])})")
        return f"@{len(groups) - 1}@"

    while "(" in expression:
        expression = re.sub(r"\(([^()]*)\)", put_away, expression)
    expression = _choice(expression)
    while "@" in expression:
        expression = re.sub(r"@(\d+)@", lambda match: groups[int(match[1])], expression)
    return expression


def _choice(expression: str) -> str:
    """The same without parentheses."""
    condition, question, rest = expression.partition("?")
    if not question:
        return expression
    depth = 0
    for i, x in enumerate(rest):
        depth += (x == "?") - (x == ":")
        if depth < 0:
            return f"({_choice(rest[:i])}) if ({condition}) else ({_choice(rest[i + 1 :])})"
    raise ValueError(expression)


class Constants:
    """The constants of some files and of a struct of the first, for given template arguments: `constants["kStages"]`.

    Of two definitions under #if and #else the latter holds: that of the library, and not of its checks.
    """

    def __init__(self, paths: tuple[str, ...], struct: str = "", **arguments: int):
        source = "".join(text(path) for path in paths)
        if struct:  # of the other structs of config.h nothing is wanted
            config = text(paths[0])
            body = re.search(rf"struct {struct}\b[^;{{]*{{.*?\n}};", config, re.S)
            assert body, struct
            source = config[: config.index("template")] + body[0] + "".join(text(path) for path in paths[1:])
        self.values: dict[str, int] = dict(arguments)
        self.source = source
        self.expressions: dict[str, str] = {}
        for declaration in re.findall(r"constexpr (?:int|bool|int64_t|uint32_t) ([^;]+);", source):
            depth, parts = 0, [""]
            for x in declaration:
                depth += (x in "(<") - (x in ")>")
                if x == "," and depth == 0:
                    parts.append("")
                else:
                    parts[-1] += x
            for part in parts:
                name, equals, expression = part.partition("=")
                if equals and python_of(expression) != name.strip():  # `kStages = Config::kStages` says nothing
                    self.expressions[name.strip()] = expression

    def __getitem__(self, name: str) -> int:
        if name not in self.values:
            self.values[name] = self.evaluate(self.expressions[name])
        return self.values[name]

    def evaluate(self, expression: str) -> int:
        python = python_of(expression)
        names = {name: self[name] for name in re.findall(r"[A-Za-z_]\w*", python) if name not in _WORDS}
        return eval(python, {"__builtins__": {}}, names)

    def count(self, barrier: str) -> int:
        """Arrivals of a phase, as in `InitBarrier(barrier[..], arrivals)`."""
        inside = r"(?:[^;()]|\([^()]*\))+"
        found = re.findall(rf"InitBarrier\({barrier}(?:\[\w+\])*, ({inside})\)", self.source)
        assert len(found) == 1, (barrier, found)
        return self.evaluate(found[0])

    def size(self, barrier: str) -> int:
        """Barriers of a name, as in `Barrier barrier[size], other;`: of the first dimension."""
        for declaration in re.findall(r"\bBarrier ([^;]+);", self.source):
            for part in declaration.split(","):
                found = re.fullmatch(r"(\w+)(?:\[([^\]]+)\])?(?:\[[^\]]+\])?", part.strip())
                if found and found[1] == barrier:
                    return self.evaluate(found[2]) if found[2] else 1
        raise KeyError(barrier)


_WORDS = {"if", "else", "and", "or", "not", "True", "False"}


def mirrored(docstring: str) -> list[tuple[str, str]]:
    """The functions that a docstring names, with their files: "`Class::Function` and `Other` in file.cuh"."""
    found = []
    for names, path in re.findall(r"((?:`[\w:]+`(?:, | and )?)+) in ([\w/]+\.(?:cuh|h|cu))", docstring):
        found += [(name, path) for name in re.findall(r"`([\w:]+)`", names)]
    return found


def body(name: str, path: str) -> str:
    """The text of a function (or struct) of csrc without comments, from its name on; empty where there is none."""
    paths = [x for x in CSRC.rglob(Path(path).name) if str(x).endswith("/" + path)]
    if len(paths) != 1:
        return ""
    source = re.sub(r"//[^\n]*", "", paths[0].read_text())
    *scopes, function = name.split("::")
    for scope in scopes:
        found = re.search(rf"\b(?:class|struct) (?:alignas\(\d+\) )?{scope} {{.*?^}};", source, re.S | re.M)
        if not found:
            return ""
        source = found[0]
    # A definition: its name, parentheses, perhaps initial values, and a body.
    parameters = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
    found = re.search(rf"\b{function}{parameters}\s*(?:const\s*)?(?::[^;{{]*)?{{|\bstruct {function} {{", source)
    if not found:
        return ""
    depth, at = 1, found.end()
    while depth > 0:
        depth += (source[at] == "{") - (source[at] == "}")
        at += 1
    return source[found.start() : at]


def skeleton(name: str, path: str) -> list[str]:
    """What a function waits for, arrives at, copies and decides: its statements that do."""
    statements = [" ".join(x.split()) for x in re.split(r"[;{}]", body(name, path))]
    return [x for x in statements if _MATTERS.search(x)]


# Branches, loops, and calls of the kernels' own functions, which have capital letters.
_MATTERS = re.compile(r"\b(?:if|else|while|for|do|return|break|continue)\b|\b[A-Z]\w*(?:<[^<>]*>)?\(")


def digest(name: str, path: str) -> str:
    return hashlib.sha256("\n".join(skeleton(name, path)).encode()).hexdigest()[:12]
