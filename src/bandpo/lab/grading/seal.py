"""What a grader may not do, in the process that grades: run text, write files, start processes, use the network.

Scorers of reasoning-gym hand a model's answer to `eval` or to SymPy's `parse_expr`, which is `eval` too. Here `eval`
reads literals only, and `parse_expr` takes arithmetic only: numbers, symbols, the usual functions, no towers of powers.
"""

from __future__ import annotations

import ast
import builtins
import math
import os
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

refused: list[str] = []
"""What was refused while the present answer was graded."""

FUNCTIONS = frozenset(
    "Abs E I Rational acos acosh acot acsc asec asin asinh atan atan2 atanh cos cosh cot coth csc exp ln log oo pi sec "
    "sech sign sin sinc sinh sqrt tan tanh erf Si Ci Ei".split()
)
LONGEST = 5000  # characters of an expression
DIGITS = 3000  # of the largest number that an expression may write down
EXPONENT = 1000  # largest power of something that holds a symbol
# Modules whose use of eval, exec and compile is their own: making classes, reading syntax trees, products of monomials.
TRUSTED = {"ast", "collections", "dataclasses", "sympy.polys.monomials", __name__}
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.chflags", "os.setxattr", "os.removexattr", "os.putenv", "os.unsetenv", "subprocess.", "pty.",
    "socket.", "shutil.", "ctypes.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "signal.pthread_kill",
)  # fmt: skip
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
BITS = (ast.LShift, ast.RShift, ast.BitAnd, ast.BitOr, ast.BitXor)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class RefusedError(PermissionError):
    """An answer asked for something that a grader may not do."""


def refuse(what: str) -> NoReturn:
    """Raise, and remember it: scorers swallow exceptions.

    Args:
        what: what was asked for.

    Raises:
        RefusedError: always.
    """
    refused.append(what)
    raise RefusedError(what)


def limit_memory(extra: int = 2**31) -> None:
    """Let the process grow by so much, and write no core.

    Args:
        extra: bytes above what it has now.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = used + extra if hard == resource.RLIM_INFINITY else min(used + extra, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def seal() -> None:
    """Seal this process for good."""
    sys.dont_write_bytecode = True  # an import would write, and that is refused
    builtins.eval = sealed_eval
    if parser := sys.modules.get("sympy.parsing.sympy_parser"):
        _seal_sympy(parser)
    sys.addaudithook(_audit)


_eval = builtins.eval


def sealed_eval(source: Any, globals: Any = None, locals: Any = None, /) -> Any:
    """`eval` that reads literals only, except for the modules in `TRUSTED`.

    Args:
        source: text or code.
        globals: as for `eval`.
        locals: as for `eval`.

    Returns:
        The value.

    Raises:
        RefusedError: the text is Python, but no literal.
    """
    frame = sys._getframe(1)
    if frame.f_globals.get("__name__") in TRUSTED:
        return _eval(source, frame.f_globals if globals is None else globals, globals if locals is None else locals)
    if not isinstance(source, str) or len(source) > LONGEST:
        refuse("eval of code, or of a long text")
    tree = ast.parse(source.strip(), mode="eval")
    try:
        return ast.literal_eval(tree)
    except ValueError:
        pass
    if _digits(tree.body, {}, bits=True) is None:  # numbers alone can be worked out; a scorer does so with its question
        refuse(f"eval of {source[:80]!r}")
    return _eval(compile(tree, "<arithmetic>", "eval"), {"__builtins__": {}})


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event in ("exec", "compile"):
        frame = sys._getframe(1)
        if frame.f_globals.get("__name__") not in TRUSTED and not _importing(frame):
            refuse(f"{event} in {frame.f_globals.get('__name__')}")
    elif event == "open":
        if any(letter in (args[1] or "") for letter in "wax+") or (args[2] or 0) & WRITES:
            refuse(f"writing {str(args[0])[:80]!r}")
    elif event.startswith(FORBIDDEN):
        refuse(event)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported, which may make code of its own."""
    while frame:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def _seal_sympy(parser: Any) -> None:
    """Check every text that SymPy is to parse, whichever way it got there."""
    plain = parser.stringify_expr

    def stringify_expr(s: str, local_dict: Any, global_dict: Any, transformations: Any) -> str:
        check_expression(s, local_dict or {})
        return str(plain(s, local_dict, global_dict, transformations))

    parser.stringify_expr = stringify_expr
    TRUSTED.add(parser.__name__)


def check_expression(text: str, known: Mapping[str, Any] | None = None) -> None:
    """Raise unless a text is arithmetic, with numbers of a size that can be worked out.

    Args:
        text: the expression.
        known: names that mean something harmless.

    Raises:
        SyntaxError: it is no expression at all.
        RefusedError: it is Python, but not arithmetic, or its numbers are too large.
    """
    if len(text) > LONGEST:
        refuse(f"an expression of {len(text)} characters")
    _digits(ast.parse(text.strip(), mode="eval").body, known or {})


def _digits(node: ast.AST, known: Mapping[str, Any], bits: bool = False) -> float | None:
    """Digits that the value may have, at most; None for what holds a symbol. `bits`: also << >> & | ^ ~ of numbers."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if isinstance(value, float) and not abs(value) < 1e300:
                refuse("a number above 1e300 in an expression")
            return math.log10(abs(value) + 1) if abs(value) < 1e300 else len(str(value))
        case ast.Name(id=name):
            if name not in known and name not in FUNCTIONS and _means_something(name):
                refuse(f"the name {name!r} in an expression")
            return None
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _digits(operand, known, bits)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, (*ARITHMETIC, *(BITS if bits else ()))):
            sizes = _digits(left, known, bits), _digits(right, known, bits)
            if isinstance(op, (ast.Pow, ast.LShift)):
                return _power_digits(*sizes)
            return None if None in sizes else _bounded(sum(size or 0.0 for size in sizes) + 1)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            for arg in args:
                _digits(arg, known)
            return None
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            for element in elements:
                _digits(element, known)
            return None
    refuse(f"{type(node).__name__} in an expression")


def _power_digits(base: float | None, exponent: float | None) -> float | None:
    if exponent is None:
        return None
    value = 10**exponent if exponent < 6 else math.inf
    if base is None:
        if value > EXPONENT + 1:
            refuse("a power above 1000 in an expression")
        return None
    return _bounded((base + 1) * value)


def _bounded(digits: float) -> float:
    if digits > DIGITS:
        refuse("a number of thousands of digits")
    return digits


def _means_something(name: str) -> bool:
    """Whether a name is more than a symbol: SymPy's namespace and the built-in functions."""
    return name.startswith("_") or hasattr(builtins, name) or hasattr(sys.modules.get("sympy"), name)
