"""`fallow models`: what there is, what is here, and bringing, adding, removing and checking it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fallow.apps.run import complain
from fallow.apps.settings import Settings, load
from fallow.cli.bar import Bar
from fallow.model.errors import BadFlag, FallowError

if TYPE_CHECKING:
    from fallow.adapters.catalogue import Catalogue
    from fallow.adapters.fetch import Options, Pulled
    from fallow.adapters.store import Store
    from fallow.model.weights import Weights

WIDE_COLUMNS = 200
"""Of a table that no terminal shows: nothing in it is cut short."""


def list_models(data: Path | None, *, as_json: bool, here: bool) -> int:
    """`fallow models list`."""
    try:
        settings, catalogue, store = _open(data)
        rows = [_row(one, catalogue, store) for one in catalogue.all()]
    except FallowError as error:
        complain(error)
        return 1
    rows = [row for row in rows if row["here"] or not here]
    if as_json:
        _print_json(rows)
        return 0
    from rich.console import Console
    from rich.table import Table

    names = max((len(row["name"]) for row in rows), default=0)
    table = Table(box=None, header_style="bold")
    for heading in ("model", "kind", "parameters", "quantisation", "MB", "context", "licence", "checksum", "here"):
        table.add_column(heading, no_wrap=True, min_width=names if heading == "model" else None)  # a name cut short is of no use
    for row in rows:
        table.add_row(*_cells(row))
    console = Console() if sys.stdout.isatty() else Console(width=WIDE_COLUMNS)
    console.print(table)
    if any(row["licence"]["must_accept"] and not row["accepted"] for row in rows):
        console.print("* the licence must be accepted: `fallow models pull NAME --accept-licence`", highlight=False)
    used = f"{store.used_bytes() / 1e9:.1f} GB" + (f" of {settings.models.disk_gb} GB" if settings.models.disk_gb else "")
    console.print(f"{used} taken in {store.folder}", highlight=False, soft_wrap=True)
    return 0


def show(data: Path | None, name: str, *, as_json: bool) -> int:
    """`fallow models show`."""
    try:
        _, catalogue, store = _open(data)
        row = _row(catalogue.find(name), catalogue, store)
    except FallowError as error:
        complain(error)
        return 1
    if as_json:
        _print_json(row)
        return 0
    licence = row["licence"]
    said: dict[str, object] = {
        "name": row["name"],
        "aliases": ", ".join(row["aliases"]),
        "kind": row["kind"],
        "family": row["family"],
        "engine": row["engine"],
        "parameters": _number(row["parameters"]),
        "quantisation": row["quantisation"],
        "context": _number(row["context_tokens"]) + " tokens" if row["context_tokens"] else "as the file says",
        "senses": ", ".join(row["senses"]),
        "dimensions": f"{row['dimensions'] or ''}{' or fewer' if row['shorter_dimensions'] else ''}",
        "licence": licence["name"] + (" (must be accepted)" if licence["must_accept"] else ""),
        "licence text": licence["link"],
        "from": "your models.toml" if row["own"] else "Fallow",
        "here": "yes" if row["here"] else "no",
    }
    for field, value in said.items():
        if value:
            print(f"{field:<14}{value}")
    for file in row["files"]:
        size = f", {file['size_bytes'] / 1e6:.1f} MB" if file["size_bytes"] else ""
        print(f"{file['role']:<14}{file['filename']}{size}")
        print(f"{'  sha256':<14}{file['sha256'] or 'not known'} ({file['checksum']})")
        for source in file["sources"]:
            print(f"{'  source':<14}{_where(source)}")
    return 0


def pull(data: Path | None, names: list[str], *, accept_licence: bool) -> int:
    """`fallow models pull`."""
    from fallow.adapters import fetch

    try:
        settings, catalogue, store = _open(data)
        chosen = [catalogue.find(name) for name in names or settings.node.models]
    except FallowError as error:
        complain(error)
        return 1
    failed = False
    for weights in chosen:
        try:
            if accept_licence and weights.licence.must_accept:
                store.accept(weights)
            with Bar(weights.name) as bar:
                pulled = fetch.pull(weights, store.folder, progress=bar, options=_options(settings))
        except FallowError as error:
            complain(error)
            failed = True
        else:
            print(f"{weights.name} is here and whole: {_summary(pulled)}")
    return int(failed)


def add(data: Path | None, source: str, name: str) -> int:
    """`fallow models add`."""
    from fallow.adapters import adding

    try:
        settings, catalogue, store = _open(data)
        with Bar(name or source) as bar:
            entry = adding.add(catalogue, source, name, store.folder, progress=bar, options=_options(settings))
    except FallowError as error:
        complain(error)
        return 2 if isinstance(error, BadFlag) else 1
    print(entry.name)
    return 0


def remove(data: Path | None, names: list[str], *, keep_entry: bool, forget: bool) -> int:
    """`fallow models rm`."""
    try:
        _, catalogue, store = _open(data)
        for name in names:
            weights = catalogue.find(name)
            freed = store.remove(weights, [one for one in catalogue.all() if one.name != weights.name])
            gone = catalogue.is_users(weights) and not keep_entry
            if forget or gone:
                store.forget(weights)
            if gone:
                catalogue = catalogue.remove(weights.name)
            said = f"{weights.name}: {freed / 1e6:.1f} MB are free again"
            print(said + ("; it is no longer in your models.toml" if gone else ""))
    except FallowError as error:
        complain(error)
        return 1
    return 0


def verify(data: Path | None, names: list[str]) -> int:
    """`fallow models verify`."""
    from fallow.adapters import fetch

    try:
        _, catalogue, store = _open(data)
        chosen = [catalogue.find(name) for name in names] or [one for one in catalogue.all() if store.is_here(one)]
    except FallowError as error:
        complain(error)
        return 1
    failed = False
    for weights in chosen:
        try:
            with Bar(weights.name) as bar:
                pulled = fetch.verify(weights, store.folder, progress=bar)
        except FallowError as error:
            complain(error)
            failed = True
        else:
            print(f"{weights.name} is whole: {_summary(pulled)}")
    return int(failed)


def _open(data: Path | None) -> tuple[Settings, Catalogue, Store]:
    from fallow.adapters.catalogue import load_catalogue
    from fallow.adapters.store import Store

    settings = load(data)
    return settings, load_catalogue(settings.data), Store(settings.models_folder)


def _options(settings: Settings) -> Options:
    from fallow.adapters.fetch import Options

    return Options(budget_bytes=settings.models.disk_bytes)


def _row(weights: Weights, catalogue: Catalogue, store: Store) -> dict[str, Any]:
    """An entry, with what is known of it on this machine."""
    import msgspec

    files = []
    for file in weights.files:
        known, path = store.known(weights.name, file), store.path(weights.name, file)
        facts = {
            "sha256": known.sha256 if known else None,
            "size_bytes": known.size_bytes if known else file.size_bytes,
            "checksum": known.origin if known else "unknown",
            "path": str(path) if path else None,
        }
        files.append(msgspec.to_builtins(file) | facts)
    sizes = [file["size_bytes"] for file in files]
    model = next(file for file in files if file["role"] == "model")
    entry: dict[str, Any] = msgspec.to_builtins(weights)
    return entry | {
        "files": files,
        "sha256": model["sha256"],
        "size_bytes": None if None in sizes else sum(sizes),
        "checksum": next((origin for origin in ("unknown", "learnt") if origin in {file["checksum"] for file in files}), "pinned"),
        "here": all(file["path"] for file in files),
        "accepted": store.accepted(weights),
        "own": catalogue.is_users(weights),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        row["kind"],
        _number(row["parameters"]),
        row["quantisation"],
        "" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:.0f}",
        str(row["context_tokens"] or ""),
        row["licence"]["name"] + (" *" if row["licence"]["must_accept"] and not row["accepted"] else ""),
        row["checksum"],
        "yes" if row["here"] else "",
    ]


def _number(count: int | None) -> str:
    """A count as people say it: 135 M, 1.7 B."""
    if not count:
        return ""
    if count >= 10**9:
        return f"{count / 1e9:.1f} B"
    return f"{count / 1e6:.0f} M" if count >= 10**6 else str(count)


def _where(source: dict[str, Any]) -> str:
    match source["type"]:
        case "index":
            return "package index: " + ", ".join(f"{one['distribution']} {one['version']}" for one in source["members"])
        case "hub":
            return f"model hub: {source['repository']}/{source['file']} @ {source['revision']}"
        case kind:
            return f"{kind}: {source.get('url') or source.get('path')}"


def _summary(pulled: Pulled) -> str:
    origin = "learnt" if any(piece.origin == "learnt" for piece in pulled.pieces) else "pinned"
    size = f"{pulled.size_bytes / 1e6:.0f} MB" if pulled.size_bytes >= 10**6 else f"{pulled.size_bytes} bytes"
    return f"{pulled.model.path} ({size}, {pulled.weights.licence}, checksum {origin})"


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.encode(value).decode())
