"""Every error and warning of the package, read from its code: the tables of docs/errors.md.

`publish.py --pages` writes them. Nothing is run: the messages are found in the syntax trees, with
what helpers return, what constants hold and what callers pass put in their places.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANOTHER = "another message"  # a SaesubError that is raised again with more said
_DEEPEST = 8  # names and calls that a message is followed through
_MOST_NAMES = 4  # functions named in a row
_SECTION = re.compile(r"^(Args|Returns|Raises):", re.MULTILINE)


class UnresolvedError(Exception):
    """A message that is not in the code as text."""


@dataclass(frozen=True)
class Hole:
    """A part of a message that is known only when it is raised.

    Attributes:
        name: what the code calls it.
        texts: what it may say, as far as the code says it.
        more: whether it may say other things too.
    """

    name: str
    texts: tuple[str, ...] = ()
    more: bool = False

    def __str__(self) -> str:
        return f"‹{self.name}›"


Message = tuple["str | Hole", ...]


@dataclass(frozen=True)
class Function:
    """A function or method of the package, with the functions in it; or a module's own code."""

    module: str
    name: str  # "function", "Class.method" or ""
    node: ast.FunctionDef | ast.Module = field(compare=False, hash=False)

    @property
    def public(self) -> bool:
        parts = self.name.split(".")
        return all(re.match(r"[^_]|__\w+__$", part) for part in parts)


@dataclass(frozen=True)
class Site:
    """A place in the code that makes a message."""

    function: Function
    line: int
    warning: bool
    message: Message


class Package:
    """The syntax trees of a package: its functions, who calls them, and its messages."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.trees = {module: ast.parse(text) for module, text in sources.items()}
        self.functions: dict[tuple[str, str], Function] = {}
        self.around: dict[ast.AST, Function] = {}  # of every node in one
        self.bases: dict[tuple[str, str], list[ast.expr]] = {}
        self.constants: dict[tuple[str, str], ast.expr] = {}
        self.imports: dict[tuple[str, str], tuple[str, str]] = {}
        for module, tree in self.trees.items():
            self._read(module, tree)

    def _read(self, module: str, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in self.packages:
                for name in node.names:
                    self.imports[module, name.asname or name.name] = (node.module, name.name)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self._add(Function(module, node.name, node))
            elif isinstance(node, ast.ClassDef):
                self.bases[module, node.name] = node.bases
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        self._add(Function(module, f"{node.name}.{method.name}", method))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[module, node.targets[0].id] = node.value

    def _add(self, function: Function) -> None:
        self.functions.setdefault((function.module, function.name), function)
        self.around |= dict.fromkeys(ast.walk(function.node), function)

    @cached_property
    def packages(self) -> set[str]:
        return {".".join(m.split(".")[:n]) for m in self.trees for n in range(1, m.count(".") + 2)}

    def lookup(self, module: str, name: str) -> tuple[str, str]:
        """Where a name of a module is defined."""
        seen = set()
        while (module, name) in self.imports and (module, name) not in seen:
            seen.add((module, name))
            module, name = self.imports[module, name]
        return module, name

    # messages

    def sites(self) -> Iterator[Site]:
        """All places that make a message; raises UnresolvedError, which names those without one."""
        lost = []
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                kind = ast.unparse(node.func).split(".")[-1]
                if kind not in ("SaesubError", "warn"):
                    continue
                function = self.around.get(node, Function(module, "", tree))
                try:
                    found = self.texts(node.args[0], function)
                except (UnresolvedError, IndexError):
                    lost.append(f"{module}:{node.lineno}")
                    continue
                for message in found:
                    yield Site(function, node.lineno, kind == "warn", message)
        if lost:
            raise UnresolvedError(f"no text is found for the messages at {', '.join(lost)}")

    def texts(self, node: ast.expr, where: Function, depth: int = 0) -> list[Message]:
        """The texts that an expression may be; raises UnresolvedError where it is no text."""
        if depth > _DEEPEST:
            raise UnresolvedError
        follow = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if follow is None:
            raise UnresolvedError
        return list(dict.fromkeys(follow(node, where, depth + 1)))

    def _of_constant(self, node: ast.Constant, where: Function, depth: int) -> list[Message]:
        if not isinstance(node.value, str):
            raise UnresolvedError
        return [(node.value,)]

    def _of_joinedstr(self, node: ast.JoinedStr, where: Function, depth: int) -> list[Message]:
        parts: Message = ()
        for part in node.values:
            if isinstance(part, ast.Constant):
                parts += (str(part.value),)
            elif isinstance(part, ast.FormattedValue):
                shows_value = part.conversion == ord("r")
                parts += self.hole(part.value, where, depth, follow=not shows_value)
        return [parts]

    def hole(self, node: ast.expr, where: Function, depth: int, follow: bool = True) -> Message:
        """A part of an f-string: what a constant holds, the only text that stands there, or a hole
        with the texts that may."""
        if isinstance(node, ast.Name):
            held = self.constants.get(self.lookup(where.module, node.id))
            if isinstance(held, ast.Constant):
                return (str(held.value),)
            if _is_our_error(node.id, where.node):
                return (Hole(ANOTHER),)
        if not follow:
            return (Hole(readable(node)),)
        texts, more = [], False
        for value, at in self.values(node, where, depth):
            try:
                texts += [] if _is_empty(value) else self.texts(value, at, depth)
            except UnresolvedError:
                more = True
        texts = list(dict.fromkeys(texts))
        if len(texts) == 1 and not more:
            return texts[0]
        shown = tuple(plain(message) for message in texts)
        if more and not any(" " in text for text in shown[1:]):
            shown = ()  # a value of many
        name = " or ".join(shown) if isinstance(node, ast.IfExp) and shown else readable(node)
        return (Hole(name, () if name == " or ".join(shown) else shown, more),)

    def values(
        self, node: ast.expr, where: Function, depth: int
    ) -> list[tuple[ast.expr, Function]]:
        """What an expression may be, and where that stands: what is assigned to a name, passed for
        a parameter or returned by a function; itself where nothing is found."""
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            return [found for part in parts for found in self.values(part, where, depth)]
        if depth > _DEEPEST or not isinstance(node, (ast.Name, ast.Call)):
            return [(node, where)]
        given: list[tuple[ast.expr, Function]] = []
        if isinstance(node, ast.Call):
            called = self.called(node.func, where)
            given = [(value, f) for f in called for value in _returned(f.node)]
        elif where.name:
            given = [(value, where) for value in _assigned(where.node, node.id)]
            if node.id in {a.arg for a in _parameters(where)} and not self.is_entry(where):
                given += self.arguments(where, node.id)
        if given:
            return [found for value, at in given for found in self.values(value, at, depth + 1)]
        if isinstance(node, ast.Name):
            module, name = self.lookup(where.module, node.id)
            if (module, name) in self.constants:
                return [(self.constants[module, name], Function(module, "", self.trees[module]))]
        return [(node, where)]

    def _of_name(self, node: ast.expr, where: Function, depth: int) -> list[Message]:
        found = self.values(node, where, depth)
        if found == [(node, where)]:
            raise UnresolvedError
        return [
            message
            for value, at in found
            if not _is_empty(value)
            for message in self.texts(value, at, depth)
        ]

    _of_ifexp = _of_boolop = _of_name

    def _of_binop(self, node: ast.BinOp, where: Function, depth: int) -> list[Message]:
        if not isinstance(node.op, ast.Add):
            raise UnresolvedError
        sides, known = [], 0
        for side in (node.left, node.right):
            try:
                sides.append(self.texts(side, where, depth))
                known += 1
            except UnresolvedError:
                sides.append([(Hole(readable(side)),)])  # a list that is joined
        if not known:
            raise UnresolvedError
        return [left + right for left, right in product(*sides)]

    def _of_attribute(self, node: ast.Attribute, where: Function, depth: int) -> list[Message]:
        """A field of a constant that is made with keywords."""
        found = [
            (keyword.value, at)
            for made, at in self.values(node.value, where, depth)
            if isinstance(made, ast.Call)
            for keyword in made.keywords
            if keyword.arg == node.attr
        ]
        if not found:
            raise UnresolvedError
        return [message for value, at in found for message in self.texts(value, at, depth)]

    def _of_call(self, node: ast.Call, where: Function, depth: int) -> list[Message]:
        if isinstance(node.func, ast.Attribute):
            if node.func.attr in ("strip", "rstrip", "lstrip"):
                return self.texts(node.func.value, where, depth)
            if node.func.attr == "format":
                filled = [self.hole(given, where, depth) for given in node.args]
                return [_filled(m, filled) for m in self.texts(node.func.value, where, depth)]
        return self._of_name(node, where, depth)

    def arguments(self, function: Function, parameter: str) -> list[tuple[ast.expr, Function]]:
        """What callers in the package pass for a parameter, and its default."""
        assert isinstance(function.node, ast.FunctionDef)
        spec = function.node.args
        names = [a.arg for a in [*spec.posonlyargs, *spec.args]]
        defaults = dict(zip(reversed(names), reversed(spec.defaults), strict=False))
        defaults |= {a.arg: d for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d}
        found = [(defaults[parameter], function)] if parameter in defaults else []
        shift = int(names[:1] in (["self"], ["cls"]))
        for call, at in self._calls[function.module, function.name]:
            given = {k.arg: k.value for k in call.keywords}
            given |= dict(zip(names[shift:], call.args, strict=False))
            if parameter in given:
                found.append((given[parameter], at))
        return found

    # who calls whom

    @cached_property
    def _calls(self) -> dict[tuple[str, str], list[tuple[ast.Call, Function]]]:
        calls = defaultdict(list)
        for function in self.functions.values():
            for node in ast.walk(function.node):
                if isinstance(node, ast.Call):
                    for called in self.called(node.func, function):
                        calls[called.module, called.name].append((node, function))
        return calls

    @cached_property
    def callers(self) -> dict[tuple[str, str], set[Function]]:
        """The functions that name a function, by its module and name."""
        callers = defaultdict(set)
        for function in self.functions.values():
            for node in ast.walk(function.node):
                if isinstance(node, (ast.Name, ast.Attribute)):
                    for called in self.called(node, function):
                        if called is not function:
                            callers[called.module, called.name].add(function)
        return callers

    @cached_property
    def _public(self) -> set[tuple[str, str]]:
        """The names that `import saesub` gives, with their modules."""
        modules = ast.literal_eval(self.constants["saesub", "_MODULES"])
        return {
            self.lookup(f"saesub.{module}", name)
            for module, names in modules.items()
            for name in names.split()
        }

    def is_entry(self, function: Function) -> bool:
        """Whether users call it: saesub's own names, what nothing in the package calls, and what
        only its own module calls if its docstring lists what it takes, gives or raises."""
        if not function.public or not function.name:
            return False
        if (function.module, function.name.split(".")[0]) in self._public:
            return True
        callers = self.callers[function.module, function.name]
        told = _SECTION.search(ast.get_docstring(function.node) or "")
        return not callers or (bool(told) and {c.module for c in callers} == {function.module})

    def raisers(self, function: Function) -> list[str]:
        """The functions for users that a function is called by, nearest first, or itself."""
        found, seen, layer = [], {function}, [function]
        while layer:
            entries = {f for f in layer if self.is_entry(f)}
            found += sorted(map(self._shown, entries))
            beyond = [c for f in layer if f not in entries for c in self._callers_of(f)]
            layer = [f for f in dict.fromkeys(beyond) if f not in seen]
            seen.update(layer)
        return list(dict.fromkeys(found)) or [self._shown(function)]

    def _callers_of(self, function: Function) -> list[Function]:
        callers = self.callers[function.module, function.name]
        return sorted(callers, key=lambda caller: (caller.module, caller.name))

    def _shown(self, function: Function) -> str:
        """`Class` for its private methods, which Python or SAELens call; the module where the
        function is private; `$ saesub` for the command line."""
        first, *method = function.name.split(".")
        name = ".".join([first, *(part for part in method if not part.startswith("_"))])
        if (function.module, first) in self._public:
            return name
        if function.module == "saesub.cli":
            return "$ saesub"
        homes = [m for (m, _), made in self.imports.items() if made == (function.module, first)]
        rooms = [home for home in homes if function.module.startswith(f"{home}.")]
        inside = min([*rooms, function.module], key=len).removeprefix("saesub.")
        if not first or first.startswith("_"):
            return inside
        return f"{inside}.{name}" if first in {public for _, public in self._public} else name

    def called(self, node: ast.expr, where: Function) -> list[Function]:
        """The package's functions that an expression names."""
        if isinstance(node, ast.Name):
            local = [n for n in _assigned(where.node, node.id) if isinstance(n, ast.Name)]
            if where.name and local:
                return [found for other in local for found in self.called(other, where)]
            module, name = self.lookup(where.module, node.id)
            made = ("", ".__init__", ".__post_init__", ".__call__")
            found = (self.functions.get((module, name + end)) for end in made)
            return [function for function in found if function]
        if not isinstance(node, ast.Attribute):
            return []
        if isinstance(node.value, ast.Name):
            module, name = self.lookup(where.module, node.value.id)
            if tree := self.trees.get(f"{module}.{name}"):
                return self.called(ast.Name(node.attr), Function(f"{module}.{name}", "", tree))
            if node.value.id in ("self", "cls") and "." in where.name:
                return self.method(where.module, where.name.split(".")[0], node.attr)
            if (module, name) in self.bases:
                return self.method(module, name, node.attr)
            return [
                found
                for of_module, of_class in self._classes_of(node.value.id, where)
                for found in self.method(of_module, of_class, node.attr)
            ]
        return []

    def _classes_of(self, name: str, where: Function) -> Iterator[tuple[str, str]]:
        """The package's classes that a local name is annotated with or made of."""
        for argument in _parameters(where):
            if argument.arg == name and argument.annotation:
                for part in ast.walk(argument.annotation):
                    if isinstance(part, ast.Name):
                        yield self.lookup(where.module, part.id)
        for value in _assigned(where.node, name):
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                yield self.lookup(where.module, value.func.id)

    def method(self, module: str, of_class: str, name: str) -> list[Function]:
        """A method of a class or of the package's classes that it derives from."""
        if found := self.functions.get((module, f"{of_class}.{name}")):
            return [found]
        for base in self.bases.get((module, of_class), ()):
            while isinstance(base, ast.Subscript):
                base = base.value
            if isinstance(base, ast.Name):
                return self.method(*self.lookup(module, base.id), name)
        return []


def _assigned(function: ast.AST, name: str) -> list[ast.expr]:
    """What a function assigns to a name."""
    return _assignments(function).get(name, [])


@cache
def _assignments(function: ast.AST) -> dict[str, list[ast.expr]]:
    """What a function assigns, by name."""
    found = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found[target.id].append(node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr, ast.AugAssign)) and node.value:
            if isinstance(node.target, ast.Name):
                found[node.target.id].append(node.value)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            found[ast.unparse(node.target)] += node.iter.elts
    return dict(found)


def _returned(function: ast.AST) -> list[ast.expr]:
    """What a function returns, but for None and ""."""
    found = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return [value for value in found if value is not None and not _is_empty(value)]


def _is_empty(node: ast.expr) -> bool:
    """Whether it is None or "", which stands for no message."""
    return isinstance(node, ast.Constant) and not node.value


def _is_our_error(name: str, function: ast.AST) -> bool:
    """Whether a function catches a SaesubError under this name."""
    return any(
        isinstance(node, ast.ExceptHandler)
        and node.name == name
        and isinstance(node.type, ast.Name)
        and node.type.id == "SaesubError"
        for node in ast.walk(function)
    )


def _parameters(function: Function) -> list[ast.arg]:
    if not isinstance(function.node, ast.FunctionDef):
        return []
    spec = function.node.args
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]


def _filled(message: Message, filled: Sequence[Message]) -> Message:
    """A format string with what stands at its `{}`."""
    parts: Message = ()
    rest = iter(filled)
    for part in message:
        for place, piece in enumerate(part.split("{}") if isinstance(part, str) else [part]):
            parts += (*next(rest), piece) if place else (piece,)
    return parts


def plain(message: Message) -> str:
    """A message in a line, with the names of its holes."""
    return " ".join("".join(map(str, message)).split())


def readable(node: ast.expr) -> str:
    """What an expression is called in a message."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        inner = readable(node.args[-1]) if node.args else ""
        if name == "len":
            return f"number of {inner}"
        if name in ("tuple", "list", "sorted", "int", "str", "float", "map", "join", "repr"):
            return inner
        if name in ("item", "rstrip", "strip", "sum") and isinstance(node.func, ast.Attribute):
            return readable(node.func.value)
        return name.strip("_").replace("_", " ")
    if isinstance(node, ast.Attribute):
        of = readable(node.value)
        if node.attr == "shape":
            return f"shape of {of}"
        if node.attr == "__name__":
            return "class"
        return node.attr.strip("_") if of == "self" else f"{of}.{node.attr}"
    if isinstance(node, ast.BoolOp):
        return readable(node.values[0])
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return readable(node.generators[0].iter)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        return readable(node.value)
    if isinstance(node, ast.Subscript) and readable(node.value).startswith("shape of "):
        return readable(node.value).replace("shape", "width")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return readable(node.left)
    if isinstance(node, ast.Compare):
        return f"number of {ast.unparse(node)}"
    return ast.unparse(node).strip("_").replace("self.", "")


def package() -> Package:
    """saesub, read."""
    folder = ROOT / "saesub"
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in folder.rglob("*.py")}
    return Package(
        {
            name.removesuffix(".__init__"): path.read_text(encoding="utf-8")
            for path, name in sorted(names.items(), key=lambda item: item[1])
        }
    )


# the page

_NEAR = "near names"  # the function that writes "did you mean …?" or "known names: …"
# What an advice begins with: the imperatives of the messages.
_IMPERATIVES = (
    "add|apply|ask|call|cast|check|choose|compute|continue|convert|copy|cut|define|delete|divide|drop|fit|fold|"
    "free|give|go|harvest|increase|initialise|install|judge|keep|leave|load|lower|make|measure|merge|"
    "move|name|pad|pass|pip|put|raise|reduce|reinstall|remove|rename|repeat|replace|resample|"
    "retry|resume|run|save|scale|see|select|set|shorten|skip|split|start|stop|switch|take|tokenise|train|"
    "try|turn|unfreeze|unset|use|wait|wrap|write"
)
_ADVICE = re.compile(
    rf"(?:to [^:]*?, |of a \w+ )?(?:{_IMPERATIVES})\b"
    rf"|did you mean|known names|‹(?:{_NEAR}|{ANOTHER}|known\b[^›]*)›",
    re.IGNORECASE,
)
# What says which value is wanted, and so what to do.
_WANTED = re.compile(r"\b(?:must|needs?)\b|, (?:not|got) (?:of shape )?‹[^›]*›$")


def halves(message: Message) -> tuple[str, str]:
    """What was wrong, and what to do. The second begins with the first imperative after a colon,
    semicolon or full stop; it is empty where the message says which value is wanted, or only warns.
    """
    text = plain(message)
    says = {str(part): part.texts for part in message if isinstance(part, Hole)}
    # Brackets hold no advice; blanked, they keep the places of the rest.
    outside = re.sub(r"\([^()]*\)", lambda found: "_" * len(found[0]), text)
    for found in re.finditer(r"[:;.] ", outside):
        rest = text[found.end() :]
        hole = re.match(r"‹[^›]*›", rest)
        given = says.get(hole[0], ()) if hole else ()
        if _ADVICE.match(rest) or any(_gives_advice(said) for said in given):
            return text[: found.start()], rest.rstrip(".")
    return ("", text.rstrip(".")) if _ADVICE.match(text) else (text.rstrip("."), "")


def _gives_advice(text: str) -> bool:
    return any(_ADVICE.match(part) for part in re.split(r"[:;.] ", text))


def lacking(sites: Iterable[Site]) -> list[Site]:
    """The errors that say neither what to do nor which value is wanted."""
    return [
        site
        for site in sites
        if not site.warning and not halves(site.message)[1] and not _says_wanted(site.message)
    ]


def _says_wanted(message: Message) -> bool:
    texts = [text for part in message if isinstance(part, Hole) for text in part.texts]
    return any(_WANTED.search(text.rstrip(".")) for text in (plain(message), *texts))


def error_tables(found: Package) -> str:
    """The rooms as a contents list, then a table for each module."""
    by_room: dict[str, dict[str, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site in found.sites():
        module = site.function.module
        first = ".".join(module.split(".")[:2])
        room = first if any(m.startswith(f"{first}.") for m in found.trees) else "saesub"
        by_room[room.removeprefix("saesub.")][module].append(site)
    rooms = sorted(by_room.items(), key=lambda room: (room[0] != "saesub", room[0]))
    lines = [f"- [{room}](#{room}): {_counted(modules.values())}" for room, modules in rooms]
    for room, modules in rooms:
        lines += ["", f"## {room}"]
        for module, sites in sorted(modules.items()):
            file = module.removeprefix("saesub.").replace(".", "/") + ".py"
            lines += ["", f"### [{file}](../saesub/{file})", "", *_rows(found, sites)]
    return "\n".join(lines)


@cache
def tables() -> str:
    """The generated part of docs/errors.md."""
    return error_tables(package())


def _counted(of_modules: Iterable[Sequence[Site]]) -> str:
    sites = [site for of_module in of_modules for site in of_module]
    warnings = sum(site.warning for site in sites)
    told = [(len(sites) - warnings, "error"), (warnings, "warning")]
    return ", ".join(f"{n} {name}{'s' * (n != 1)}" for n, name in told if n)


def _rows(found: Package, sites: Iterable[Site]) -> list[str]:
    """A table: what was wrong, what to do, and the functions that say it."""
    raisers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for site in sites:
        wrong, to_do = (_cell(half, site.message) for half in halves(site.message))
        raisers[("*Warning:* " if site.warning else "") + wrong, to_do] += found.raisers(
            site.function
        )
    lines = ["| What was wrong | What to do | Raised by |", "|---|---|---|"]
    for (wrong, to_do), names in sorted(raisers.items(), key=lambda row: row[0][0].lower()):
        names = list(dict.fromkeys(names))
        shown = ", ".join(f"`{name}`" for name in names[:_MOST_NAMES])
        beyond = len(names) - _MOST_NAMES
        more = f" and {beyond} more" if beyond > 0 else ""
        lines.append(f"| {wrong} | {to_do} | {shown}{more} |")
    return lines


def _cell(half: str, message: Message) -> str:
    """Half of a message in Markdown, and below it what its holes may say."""
    lines = [_escaped(half) or "–"]
    for hole in dict.fromkeys(part for part in message if isinstance(part, Hole)):
        if str(hole) in half and hole.texts and hole.name != _NEAR:
            said = [*map(_escaped, hole.texts), *["…"] * hole.more]
            whole = half == str(hole)
            lines = said if whole else [*lines, f"{_escaped(str(hole))}: {' / '.join(said)}"]
    return "<br>".join(lines)


def _escaped(text: str) -> str:
    marks = r"[|*\\[]|<(?=\w)|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(marks, lambda found: f"\\{found[0]}", text)
