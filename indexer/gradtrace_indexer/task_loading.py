"""Load a Task by its name on the command line: `module:attribute`, `path/to/file.py:attribute`, or a `.json` file of a
language task."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gradtrace.errors import TaskError
from gradtrace.task import Task
from gradtrace.tasks.language import TASK_FILE, read_task_file

_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_GRADTRACE = ("gradtrace", "gradtrace_indexer", "gradtrace_service", "gradtrace_client")

_before_tasks: set[str] = set()  # names of the modules that were imported before the first task was loaded


def load_task(spec: str, *, anew: bool = False) -> Task:
    """The task that `spec` names; a Task subclass is instantiated without arguments.

    anew: run the module again, under another name, together with the user's modules that it imports, so that the task
        shares no data with an earlier one and sees what has changed on disk. Installed modules, and those that cannot
        be run twice, stay as they were first imported.

    Raises:
        TaskError: no such file, module or attribute; an error while importing or instantiating; or not a Task.
    """
    if spec.endswith(".json"):
        return read_task_file(Path(spec))
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise TaskError(f"{spec!r} is not a task's name; write module:attribute or path/to/file.py:attribute")
    module = import_source(source, anew=anew)
    if not hasattr(module, name):
        raise TaskError(f"{source} has no {name!r}; {_tasks_in(module)}")
    named = getattr(module, name)
    try:
        task = named() if inspect.isclass(named) and issubclass(named, Task) else named
    except Exception as error:  # whatever the user's code raises
        raise TaskError(
            f"{spec}() failed: {type(error).__name__}: {error}; a task class is instantiated without arguments: "
            "give its parameters defaults, or name an instance instead"
        ) from error
    if not isinstance(task, Task):
        raise TaskError(f"{spec} is of type {type(named).__name__}, not a gradtrace.Task; {_tasks_in(module)}")
    return task


def spec_of(index: Path, given: str | None) -> str:
    """The name of an index's task: the one that is given, or that of the file which `gradtrace build --model` wrote.

    Raises:
        TaskError: none is given, and there is no such file.
    """
    file = index / TASK_FILE
    if given is None and not file.is_file():
        raise TaskError(f"{index} was built from a task of your own: name it by --task, as you did for the build")
    return str(file) if given is None else given


def import_source(source: str, *, anew: bool = False) -> ModuleType:
    """Import a module by its dotted name, or a Python file by its path.

    As for a Python script, the file's folder (for a module: the working directory) is put on the import path.

    Raises:
        TaskError: there is no such file or module, or importing it failed.
    """
    is_file = source.endswith(".py") or "/" in source
    if is_file and not Path(source).is_file():
        raise TaskError(f"there is no file {source}; give a path to a .py file, or a module's dotted name")
    folder = Path(source).resolve().parent if is_file else Path.cwd()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    _before_tasks.update(() if _before_tasks else sys.modules)

    def run() -> ModuleType:
        if is_file:
            return _import_file(Path(source).resolve(), anew)
        return _import_again(source) if anew else importlib.import_module(source)

    try:
        return _without_helpers(run) if anew else run()
    except SystemExit as error:
        raise TaskError(
            f"importing {source} ended the program ({error}): put the code that runs it as a script under "
            "`if __name__ == '__main__':`"
        ) from error
    except Exception as error:  # whatever the user's code raises
        raise TaskError(f"importing {source} failed: {type(error).__name__}: {error}") from error


def _without_helpers(run: Callable[[], ModuleType]) -> ModuleType:
    """Run a module while the user's modules that it imports count as not imported."""
    helpers = {name: module for name, module in list(sys.modules.items()) if _is_helper(name, module)}
    for name in helpers:
        del sys.modules[name]
    try:
        return run()
    except BaseException as error:
        sys.modules.update(helpers)
        if not helpers or not isinstance(error, Exception):
            raise
    return run()  # a module may refuse to be run twice, as when it registers something


def _is_helper(name: str, module: ModuleType) -> bool:
    """Whether a module was imported by a task and is the user's code: neither installed nor part of Gradtrace."""
    file = getattr(module, "__file__", None)
    is_ours = name.partition(".")[0] in _GRADTRACE or name.startswith("_gradtrace_")
    return name not in _before_tasks and file is not None and not is_ours and not file.startswith(_INSTALLED)


def _import_file(path: Path, anew: bool = False, package: str = "") -> ModuleType:
    """Run the file as a module with a unique name: a `types.py` must not replace the standard library's.

    A module that is run anew replaces the one that was run anew before.
    """
    name = f"_gradtrace_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}{'_anew' if anew else ''}"
    if name in sys.modules and not anew:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # before it runs, since dataclasses look it up
    module.__package__ = package
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_again(name: str) -> ModuleType:
    """Run a module's file again, as another module."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.has_location:
        raise ImportError(f"{name} has no file to be read again")
    return _import_file(Path(spec.origin), anew=True, package=name if spec.parent == name else spec.parent or "")


def _tasks_in(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if _is_task(value) and not name.startswith("_")]
    return f"tasks found there: {', '.join(names)}" if names else "no tasks were found there"


def _is_task(value: Any) -> bool:
    if inspect.isclass(value):
        is_ours = value.__module__.partition(".")[0] in _GRADTRACE
        return issubclass(value, Task) and not inspect.isabstract(value) and not is_ours
    return isinstance(value, Task)
