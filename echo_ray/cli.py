"""The `echo-ray` command: finds the subcommand, imports only that one, prints errors plainly."""

from __future__ import annotations

import argparse
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from echo_ray import __version__, commands
from echo_ray.errors import ConfigError, EchoError

PROGRAM = "echo-ray"
REFUSED = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit status, 2 for anything that was refused."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0].startswith("-"):
            return _without_command(words)
        return _run(words[0], words[1:])
    except EchoError as e:
        print(f"{PROGRAM}: {e.code}: {e.message}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(name: str, words: Sequence[str]) -> int:
    command = _command(name)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=command.__doc__)
    command.add_arguments(parser)
    args = parser.parse_args(words)
    try:
        return int(command.run(args))
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("echo_ray"):
            raise
        raise ConfigError(
            f"{name} needs the package {e.name}, which is not installed; "
            "pip install 'echo-ray[server]'"
        ) from e


def _without_command(words: Sequence[str]) -> int:
    lines = [f"  {name:<10} {_command(name).HELP}" for name in _names() if _is_command(name)]
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description="Endless, real-time generated video that survives the machine it runs on.",
        epilog="\n".join(["commands:", *lines, "", f"{PROGRAM} COMMAND --help says more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.parse_args(words)
    parser.print_help(sys.stderr)
    return REFUSED


def _names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(commands.__path__))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{name}")


def _is_command(name: str) -> bool:
    """Whether the module is a subcommand, and not a part of one."""
    return hasattr(_module(name), "HELP")


def _command(name: str) -> ModuleType:
    known = _names()
    if name in known and _is_command(name):
        return _module(name)
    listed = [n for n in known if _is_command(n)]
    near = difflib.get_close_matches(name, listed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(listed)}"
    raise ConfigError(f"command {name!r} is unknown ({hint})")
