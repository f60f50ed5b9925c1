"""PTX text to kernels: declarations, instructions, the source line of each.

Functions are inlined where they are called, so that a kernel is one list of instructions, and the
scratch parameters of a call become registers. Kernels are parsed when first asked for: nvcc writes
a hundred thousand lines for a file of templates.

Source: NVIDIA, "Parallel Thread Execution ISA".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = {
    "b8": 1, "u8": 1, "s8": 1,
    "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8,
    "pred": 1,
}  # fmt: skip


class Register(NamedTuple):
    index: int
    type: str


class Immediate(NamedTuple):
    text: str


class Symbol(NamedTuple):
    """A label, a variable or a special register such as %tid.x."""

    name: str


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Vector(NamedTuple):
    """{a, b, ...} or the two destinations a|b. None stands for the sink _."""

    items: tuple


Operand = Register | Immediate | Symbol | Address | Vector


class Location(NamedTuple):
    """A source line, and the line that the code was inlined into."""

    file: str
    line: int
    inlined_at: Location | None

    def lines(self) -> list[str]:
        """file:line from the innermost outwards."""
        outer = self.inlined_at.lines() if self.inlined_at else []
        return [f"{self.file}:{self.line}", *outer]


class Instruction(NamedTuple):
    name: str  # with all modifiers: ld.global.v4.u32
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool  # runs where the guard is false
    location: Location | None


class Variable(NamedTuple):
    """A variable of a memory space: bytes, alignment and, if it has one, its initial content."""

    name: str
    space: str
    size: int
    align: int
    content: bytes


@dataclass
class Kernel:
    name: str
    params: list[Variable]
    max_threads: tuple[int, int, int] | None  # of __launch_bounds__
    exactly: bool = False  # whether a block must have exactly as many
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)  # their types
    labels: dict[str, int] = field(default_factory=dict)  # to the next instruction
    variables: list[Variable] = field(default_factory=list)  # shared and local ones


class ParseError(Exception):
    """PTX that this parser does not know."""


_ROUTINE = re.compile(r"^(?:\.\w+ +)*\.(entry|func)\b([^{;]*)([{;])", re.M)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common) )*\.(shared|local|global|const|param)\s+"
    r"(?:\.align\s+(\d+)\s+)?(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$%.]+)(\[(\d*)\])?(?:\s*=\s*(.*))?"
)


def _closing_brace(text: str, start: int) -> int:
    """The index just past the brace that closes the one opened before `start`."""
    depth = 1
    for found in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.end()
    raise ParseError("expected a brace to be closed, got the end of the file")


def _variable(text: str) -> Variable:
    found = _VARIABLE.fullmatch(text.strip())
    if not found:
        raise ParseError(f"expected a variable, got {text.strip()!r}")
    space, align, kind, name, array, count, content = found.groups()
    size = SIZES[kind]
    raw = b""
    if content:
        values = [int(v, 0) for v in re.findall(r"[-\w]+", content)]
        raw = b"".join((v % (1 << 8 * size)).to_bytes(size, "little") for v in values)
    total = size * int(count or 0) if array else size
    return Variable(name, space, total, int(align or size), raw.ljust(total, b"\0"))


class Module:
    """The kernels and variables of one PTX file."""

    def __init__(self, text: str) -> None:
        self._routines: dict[str, tuple[str, str]] = {}  # header and body
        self.kernel_names: list[str] = []
        self._parsed: dict[str, Kernel] = {}
        outside, end = "", 0
        for found in _ROUTINE.finditer(text):
            kind, header, opening = found.groups()
            outside += text[end : found.start()]
            end = found.end()
            if opening == ";":
                continue
            end = _closing_brace(text, end)
            name = re.match(r"\s*(?:\(.*?\)\s*)?([\w$]+)", header, re.S)
            assert name, header
            self._routines[name[1]] = (header, text[found.end() : end - 1])
            if kind == "entry":
                self.kernel_names.append(name[1])
        outside += text[end:]
        self.files = {
            int(n): os.path.normpath(path)
            for n, path in re.findall(r'^\t?\.file\s+(\d+) "(.*?)"', text, re.M)
        }
        declared = re.findall(r"^(?:\.\w+ )*\.(?:shared|global|const)[^;]*", outside, re.M)
        self.variables = {v.name: v for v in map(_variable, declared)}

    def kernel(self, name: str) -> Kernel:
        if name not in self._parsed:
            self._parsed[name] = self._parse(name)
        return self._parsed[name]

    def _parse(self, name: str) -> Kernel:
        header, body = self._routines[name]
        params = [_variable(p) for p in re.findall(r"\.param[^,)]*", header)]
        bound = re.search(r"\.(maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", header)
        threads = tuple(int(n or 1) for n in bound.groups()[1:]) if bound else None
        kernel = Kernel(name, params, threads, bool(bound and bound[1] == "reqntid"))
        _Body(self, kernel).parse(body)
        named = {
            part.base.name
            if isinstance(part, Address) and isinstance(part.base, Symbol)
            else part.name
            for i in kernel.instructions
            for part in i.operands
            if isinstance(part, Symbol)
            or (isinstance(part, Address) and isinstance(part.base, Symbol))
        }
        kernel.variables += [v for n, v in self.variables.items() if n in named]
        return kernel

    def function(self, name: str) -> tuple[list[str], list[str], str]:
        """(return parameters, parameters, body) of a .func."""
        if name not in self._routines:
            raise ParseError(f"call of {name}, which has no body in this file")
        header, body = self._routines[name]
        found = re.match(r"\s*(?:\((.*?)\))?\s*[\w$]+\s*(?:\((.*?)\))?", header, re.S)
        assert found
        names = [
            [_variable(p).name for p in re.findall(r"\.param[^,]*", part or "")]
            for part in found.groups()
        ]
        return names[0], names[1], body


class _Scope:
    """The names between two braces."""

    def __init__(self, parent: _Scope | None) -> None:
        self.parent = parent
        self.names: dict[str, Register | str] = {}  # a register, or the key of a parameter
        self.ranges: dict[str, str] = {}  # %r<100>: the type of %r0 to %r99


class _Body:
    """Parses the body of one kernel, and inlines the functions it calls."""

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self.module = module
        self.kernel = kernel
        self.scope = _Scope(None)
        self.location: Location | None = None
        self.calls = 0
        self.prefix = ""  # of labels and variables, to keep those of inlined functions apart
        self.slots: dict[tuple[str, int], Register] = {}  # scratch parameters, by key and offset

    def parse(self, body: str, returns_to: str = "") -> None:
        """Parses a body. An inlined function's `ret` goes to the label `returns_to`."""
        seen: dict[tuple[int, int, int], Location] = {}
        called_at = self.location
        pending = ""
        for line in body.splitlines():
            line = line.partition("//")[0].strip()
            if line.startswith((".loc ", ".loc\t")):
                self.location = self._locate(line, seen, called_at)
                continue
            pending = f"{pending} {line}" if pending else line
            while pending:
                if pending[0] in "{}":
                    parent = self.scope.parent
                    self.scope = _Scope(self.scope) if pending[0] == "{" else parent or self.scope
                    pending = pending[1:].lstrip()
                    continue
                label = re.match(r"([\w$]+):\s*", pending)
                if label:
                    name = self.prefix + label[1]
                    if name in self.kernel.labels:  # legal in separate scopes
                        raise ParseError(f"expected each label once, got {label[1]} twice")
                    self.kernel.labels[name] = len(self.kernel.instructions)
                    pending = pending[label.end() :]
                    continue
                statement, end, pending = pending.partition(";")
                if not end:
                    pending = statement
                    break
                pending = pending.lstrip()
                self._statement(statement.strip(), returns_to)
        if pending:
            raise ParseError(f"expected a statement to end, got {pending!r}")
        self.location = called_at

    def _locate(self, line: str, seen: dict, called_at: Location | None) -> Location:
        numbers = re.match(
            r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?", line
        )
        if not numbers:
            raise ParseError(f"expected a source line, got {line!r}")
        key = tuple(int(n) for n in numbers.groups()[:3])
        file = self.module.files.get(key[0], "?")
        outer = called_at
        if numbers[4]:
            at = tuple(int(n) for n in numbers.groups()[3:])
            outer = seen.get(at) or Location(self.module.files.get(at[0], "?"), at[1], called_at)
        seen[key] = here = Location(file, key[1], outer)
        return here

    def _statement(self, text: str, returns_to: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                self._declare(name.strip(), kind.lstrip("."))
        elif text.startswith(".param"):
            self.calls += 1
            self.scope.names[_variable(text).name] = f"{_variable(text).name}#{self.calls}"
        elif text.startswith((".shared", ".local")):
            variable = _variable(text)
            self.kernel.variables.append(variable._replace(name=self.prefix + variable.name))
            self.scope.names[variable.name] = self.prefix + variable.name
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("call"):
            self._call(text)
        elif text:
            self._instruction(text, returns_to)

    def _declare(self, name: str, kind: str) -> None:
        many = re.fullmatch(r"(.+)<\d+>", name)
        if many:
            self.scope.ranges[many[1]] = kind
        else:
            self.scope.names[name] = self._new_register(kind)

    def _new_register(self, kind: str) -> Register:
        self.kernel.registers.append(kind)
        return Register(len(self.kernel.registers) - 1, kind)

    def _lookup(self, name: str) -> Register | str | None:
        scope: _Scope | None = self.scope
        stem = name.rstrip("0123456789")
        while scope:
            if name in scope.names:
                return scope.names[name]
            if stem != name and stem in scope.ranges:
                scope.names[name] = register = self._new_register(scope.ranges[stem])
                return register
            scope = scope.parent
        return None

    def _operand(self, text: str) -> Operand | None:
        text = text.strip()
        if text == "_":
            return None
        if text[0] == "{":
            return Vector(tuple(self._operand(t) for t in text[1:-1].split(",")))
        if "|" in text:
            return Vector(tuple(self._operand(t) for t in text.split("|")))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            inner = self._operand(base)
            assert isinstance(inner, (Register, Symbol, Immediate)), text
            return Address(inner, int(offset or "0", 0))
        if text[0].isdigit() or text[0] == "-":
            return Immediate(text)
        found = self._lookup(text)
        if isinstance(found, Register):
            return found
        return Symbol(found or text)

    def _instruction(self, text: str, returns_to: str) -> None:
        guard, negated = None, False
        if text[0] == "@":
            condition, _, text = text.partition(" ")
            negated = condition[1] == "!"
            found = self._lookup(condition.lstrip("@!"))
            assert isinstance(found, Register), condition
            guard = found
        name, _, rest = text.strip().partition(" ") if " " in text else text.partition("\t")
        name = name.strip()
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest)
        operands = tuple(self._operand(p) for p in parts if p.strip())
        if name.startswith("ret") and returns_to:
            name, operands = "bra", (Symbol(returns_to),)
        elif name.startswith("bra"):
            name, operands = "bra", (Symbol(self.prefix + rest.strip()),)
        elif name.startswith(("ld.param", "st.param")):
            name, operands = self._parameter_access(name, operands)
        self.kernel.instructions.append(Instruction(name, operands, guard, negated, self.location))

    def _parameter_access(self, name: str, operands: tuple) -> tuple[str, tuple]:
        """Turns scratch parameters of calls into registers; keeps parameters of the kernel."""
        is_load = name.startswith("ld")
        address = operands[1] if is_load else operands[0]
        if not isinstance(address.base, Symbol) or "#" not in address.base.name:
            return name, operands
        kind = "b" + str(8 * SIZES[name.rpartition(".")[2]])
        key = (address.base.name, address.offset)
        if key not in self.slots:
            self.slots[key] = self._new_register(kind)
        slot = self.slots[key]
        if slot.type != kind or kind == "b8" or ".v" in name:
            raise ParseError(f"{name}: expected the type that was stored, {slot.type}")
        return f"mov.{kind}", (operands[0], slot) if is_load else (slot, operands[1])

    def _call(self, text: str) -> None:
        found = re.fullmatch(
            r"call(?:\.uni)?\s+(?:\((.*?)\)\s*,\s*)?([\w$]+)\s*(?:,\s*\((.*?)\))?", text
        )
        if not found:
            raise ParseError(f"expected a direct call, got {text!r}")
        results, name, arguments = found.groups()
        outer_returns, outer_params, body = self.module.function(name)
        passed = [
            a.strip() for part in (results, arguments) for a in (part or "").split(",") if a.strip()
        ]
        keys = [self._lookup(a) for a in passed]
        self.calls += 1
        scope, prefix = self.scope, self.prefix
        self.scope = _Scope(None)
        self.scope.names = dict(zip([*outer_returns, *outer_params], keys, strict=True))
        self.prefix = f"{name}#{self.calls}."
        end = self.prefix + "end"
        self.parse(body, returns_to=end)
        self.kernel.labels[end] = len(self.kernel.instructions)
        self.scope, self.prefix = scope, prefix
