"""`echo-ray sessions VERB`: look at the sessions of a running service, and act on them."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_ray.client import EchoClient

HELP = "list, fork, rewind, export ... sessions of a running service"
URL = "http://127.0.0.1:8000"
PROMPT_SHOWN = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=URL, help=f"of the service (default: {URL})")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the token of a service with access on; default: the variable ECHO_RAY_TOKEN",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="all sessions, oldest first")
    _of_one(verbs, "show", "everything that the service says of a session")
    _of_one(verbs, "pause", "release its device")
    _of_one(verbs, "resume", "let it go on")
    fork = _of_one(verbs, "fork", "a new session with the same past")
    fork.add_argument("--chunk", type=int, metavar="N", help="begin there; default: now")
    fork.add_argument("--prompt", help="switch to it there")
    fork.add_argument("--pace", choices=("realtime", "max"))
    fork.add_argument("--on-idle", choices=("pause", "continue", "close"))
    fork.add_argument(
        "--label", action="append", metavar="KEY=VALUE", help="may be repeated; replaces the old"
    )
    rewind = _of_one(verbs, "rewind", "go on from an earlier chunk, under a new id")
    rewind.add_argument("chunk", type=int)
    token = _of_one(verbs, "viewer-token", "print a token to watch it with, for a while")
    token.add_argument("--seconds", type=float, help="how long; default: as the service has it")
    export = _of_one(verbs, "export", "write the session to a file")
    export.add_argument("file", type=Path)
    taken = verbs.add_parser("import", help="a new session from such a file")
    taken.add_argument("file", type=Path)
    _of_one(verbs, "delete", "forget it, its log and its snapshots")


def run(args: argparse.Namespace) -> int:
    """Do one thing and print what came of it, a session a line."""
    for line in asyncio.run(_lines(args)):
        print(line)
    return 0


async def _lines(args: argparse.Namespace) -> Sequence[str]:
    from echo_ray.client import EchoClient

    async with EchoClient(args.url, token=args.token_file) as client:
        return await VERBS[args.verb](client, args)


async def _list(client: EchoClient, _: argparse.Namespace) -> Sequence[str]:
    return [_line(session) for session in await client.sessions()]


async def _show(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    return list(_entries(await client.get(args.id)))


async def _pause(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    return [_line(await client.pause(args.id))]


async def _resume(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    return [_line(await client.resume(args.id))]


async def _fork(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    made = await client.fork(
        args.id,
        args.chunk,
        prompt=args.prompt,
        pace=args.pace,
        on_idle=args.on_idle,
        labels=_labels(args.label),
    )
    return [_line(made)]


async def _rewind(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    return [_line(await client.rewind(args.id, args.chunk))]


async def _export(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    from echo_ray.errors import ArchiveError

    if await asyncio.to_thread(args.file.exists):
        raise ArchiveError(f"{args.file} is there already; name another file")
    return [f"{args.file}  {await client.export(args.id, args.file)} bytes"]


async def _import(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    return [_line(await client.import_(args.file))]


async def _viewer_token(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    return [str((await client.viewer_token(args.id, ttl_s=args.seconds))["token"])]


async def _delete(client: EchoClient, args: argparse.Namespace) -> Sequence[str]:
    await client.delete(args.id)
    return []


VERBS: Mapping[str, Callable[[EchoClient, argparse.Namespace], Awaitable[Sequence[str]]]] = {
    "list": _list,
    "show": _show,
    "pause": _pause,
    "resume": _resume,
    "fork": _fork,
    "rewind": _rewind,
    "export": _export,
    "import": _import,
    "viewer-token": _viewer_token,
    "delete": _delete,
}


def _of_one(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text)
    verb.add_argument("id", metavar="ID", help="of the session")
    return verb


def _labels(given: Sequence[str] | None) -> dict[str, str] | None:
    from echo_ray.errors import InvalidRequestError

    if given is None:
        return None
    labels = {}
    for text in given:
        key, sep, value = text.partition("=")
        if not sep:
            raise InvalidRequestError(f"--label {text!r}: write it as KEY=VALUE", param="labels")
        labels[key] = value
    return labels


def _line(session: Mapping[str, Any]) -> str:
    prompt = " ".join(str(session["prompt"]).split())
    short = prompt if len(prompt) <= PROMPT_SHOWN else f"{prompt[: PROMPT_SHOWN - 1]}…"
    owner = session["owner"] or "-"
    state, chunk = session["state"], session["next_chunk"]
    return f"{session['id']}  {state:<6}  {chunk:>8}  {owner}  {short}"


def _entries(session: Mapping[str, Any]) -> Iterator[str]:
    width = max(len(name) for name in session)
    for name, value in session.items():
        yield f"{name:<{width}}  {value}"
