"""The `fallow` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fallow import __version__
from fallow.cli import registry
from fallow.cli.options import AsJson, Data, data_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pools idle CPUs, and whatever GPUs are there, into one open network for AI work.",
)
models = typer.Typer(no_args_is_help=True, help="Models of the catalogue.")
app.add_typer(models, name="models")
lending = typer.Typer(help="Lend this machine: run a node.")
app.add_typer(lending, name="lend")
app.add_typer(registry.hub, name="hub")
app.add_typer(registry.keys, name="keys")
app.add_typer(registry.org, name="org")

HubAddress = Annotated[str, typer.Option("--hub", metavar="ADDRESS", help="The hub's broker instead of the invitation's.")]
Join = Annotated[
    str, typer.Option("--join", metavar="TOKEN", help="An invitation of `fallow hub invite` (default: FALLOW_JOIN, or DIR/invitation).")
]
JoinFile = Annotated[Path | None, typer.Option("--join-file", metavar="FILE", help="A file with the invitation.")]
ReadyFd = Annotated[int | None, typer.Option("--ready-fd", hidden=True)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, never what is said.")]
BaseUrl = Annotated[
    str, typer.Option("--base-url", metavar="URL", help="A gateway's address (default: FALLOW_BASE_URL, or the one running here).")
]
Models = Annotated[list[str] | None, typer.Option("--model", metavar="NAME", help="A model of the catalogue; may be given several times.")]


@app.command()
def up(
    data: Data = None,
    port: Annotated[int | None, typer.Option("--port", help="The gateway's port; 0: any free one. [default: 8400]")] = None,
    host: Annotated[str | None, typer.Option("--host", help="The gateway's address. [default: 127.0.0.1]")] = None,
    model: Models = None,
    profile: Annotated[str | None, typer.Option("--profile", metavar="NAME", help="As in `fallow lend`. [default: dedicated]")] = None,
    isolation: Annotated[str | None, typer.Option("--isolation", metavar="LEVEL", help="As in `fallow lend`. [default: auto]")] = None,
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="A data folder of its own that is removed at the end.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run everything on this machine: broker, hub, gateway and one node."""
    from fallow.cli import processes

    flags = {
        "gateway.port": port,
        "gateway.host": host,
        "node.models": model or None,
        "lend.profile": profile,
        "lend.isolation": isolation,
    }
    sys.exit(processes.up(data, flags, ephemeral=ephemeral, verbose=verbose))


@registry.hub.callback(invoke_without_command=True)
def hub(
    context: typer.Context,
    data: Data = None,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="HOST:PORT", help="Where the broker listens. [default: 127.0.0.1:8422]")
    ] = None,
    broker: Annotated[str | None, typer.Option("--broker", metavar="ADDRESS", help="A nats-server that runs already.")] = None,
    credential_life: Annotated[int | None, typer.Option("--credential-life", metavar="S", min=1, hidden=True)] = None,
    verbose: Verbose = False,
    ready_fd: ReadyFd = None,
) -> None:
    """Run a hub: the meeting point, with its broker."""
    if context.invoked_subcommand is not None:
        return
    from fallow.cli import processes

    sys.exit(processes.hub(data, listen=listen, broker=broker, life_s=credential_life, verbose=verbose, ready_fd=ready_fd))


@app.command()
def gateway(
    hub: HubAddress = "",
    data: Data = None,
    port: Annotated[int | None, typer.Option("--port", help="0: any free one. [default: 8400]")] = None,
    host: Annotated[str | None, typer.Option("--host", help="[default: 127.0.0.1]")] = None,
    join: Join = "",
    join_file: JoinFile = None,
    verbose: Verbose = False,
    ready_fd: ReadyFd = None,
) -> None:
    """Run a gateway: answers callers' HTTP."""
    from fallow.cli import processes

    invited = processes.Invited(token=join, file=join_file)
    sys.exit(processes.gateway(data, hub, port=port, host=host, invited=invited, verbose=verbose, ready_fd=ready_fd))


@lending.callback(invoke_without_command=True)
def lend(
    context: typer.Context,
    hub: HubAddress = "",
    data: Data = None,
    model: Models = None,
    engine: Annotated[str, typer.Option("--engine", metavar="URL", help="An OpenAI-compatible server that runs already.")] = "",
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="invisible, balanced, dedicated, night or quiet. [default: invisible]")
    ] = None,
    cores: Annotated[int | None, typer.Option("--cores", help="The most cores that engines use.")] = None,
    hours: Annotated[str | None, typer.Option("--hours", metavar="FROM-TO", help="Local time, such as 22-7.")] = None,
    isolation: Annotated[
        str | None, typer.Option("--isolation", metavar="LEVEL", help="auto, bwrap, landlock or none. [default: auto]")
    ] = None,
    slots: Annotated[int | None, typer.Option("--slots", help="Calls answered at the same time.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of the engine.")] = None,
    join: Join = "",
    join_file: JoinFile = None,
    verbose: Verbose = False,
    ready_fd: ReadyFd = None,
    with_up: Annotated[bool, typer.Option("--with-up", hidden=True)] = False,
) -> None:
    """Lend this machine: run a node."""
    if context.invoked_subcommand is not None:
        return
    from fallow.cli import processes

    flags = {name: context.params[flag] or None for flag, name in processes.LEND_FLAGS.items()}
    lending = processes.Lending(hub=hub, engine=engine, invited=processes.Invited(token=join, file=join_file), with_up=with_up)
    sys.exit(processes.lend(data, flags, lending, verbose=verbose, ready_fd=ready_fd))


@lending.command("status")
def lend_status(context: typer.Context, data: Data = None, as_json: AsJson = False) -> None:
    """Show what the node that runs here does, and why; and what it did today."""
    from fallow.cli import owner

    sys.exit(owner.status(data or data_of(context), as_json=as_json))


@lending.command("log")
def lend_log(
    context: typer.Context,
    data: Data = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=10_000, help="How many.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Show when and why the machine paused, and for how long."""
    from fallow.cli import owner

    sys.exit(owner.log(data or data_of(context), lines=lines, as_json=as_json))


@lending.command("install")
def lend_install(
    context: typer.Context,
    print_only: Annotated[bool, typer.Option("--print", help="Print the unit and change nothing.")] = False,
) -> None:
    """Lend whenever this machine runs, as a service: `fallow lend --profile quiet install`."""
    from fallow.cli import processes

    assert context.parent is not None, "it is a command of `lend`"
    sys.exit(processes.install(context.parent.params, print_only=print_only))


@lending.command("uninstall")
def lend_uninstall() -> None:
    """Remove the service; the data folder and the models stay."""
    from fallow.cli import install

    sys.exit(install.uninstall())


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="[default: what this machine lends]")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast models run here, and what their electricity costs."""
    from fallow.cli import bench

    sys.exit(bench.bench(data, names or [], as_json=as_json))


@app.command()
def pause(
    lasting: Annotated[str, typer.Argument(metavar="[TIME]", help="Such as 2h or 90m; without it, until `fallow resume`.")] = "",
    data: Data = None,
) -> None:
    """Stop lending this machine, at once."""
    from fallow.cli import owner

    sys.exit(owner.pause(data, lasting))


@app.command()
def resume(data: Data = None) -> None:
    """Lend this machine again."""
    from fallow.cli import owner

    sys.exit(owner.resume(data))


@app.command()
def chat(
    text: Annotated[str, typer.Argument(help="What to say; - or nothing reads standard input.")] = "-",
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="[default: the first that is offered]")] = "",
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="The longest answer.")] = None,
    data: Data = None,
    base_url: BaseUrl = "",
) -> None:
    """Say something to a model; the answer is written as it comes."""
    from fallow.cli import client

    sys.exit(client.chat(data, base_url, text, model=model, max_tokens=max_tokens))


@app.command()
def nodes(data: Data = None, base_url: BaseUrl = "", as_json: AsJson = False) -> None:
    """List the nodes that the gateway knows."""
    from fallow.cli import client

    sys.exit(client.nodes(data, base_url, as_json=as_json))


@app.command()
def prices(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="[default: all that have a price]")] = "",
    data: Data = None,
    base_url: BaseUrl = "",
    as_json: AsJson = False,
) -> None:
    """Show what models go for, and how that moved over the last day."""
    from fallow.cli import prices

    sys.exit(prices.prices(data, base_url, model, as_json=as_json))


@app.command()
def quote(
    text: Annotated[str, typer.Argument(help="What would be said.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="[default: the first that is offered]")] = "",
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="The longest answer.")] = None,
    deadline: Annotated[float | None, typer.Option("--deadline", metavar="S", help="Seconds until the whole answer is there.")] = None,
    first_token: Annotated[int | None, typer.Option("--first-token", metavar="MS", help="Milliseconds until the first token.")] = None,
    max_cost: Annotated[float | None, typer.Option("--max-cost", metavar="CREDITS", help="The most that it may cost.")] = None,
    rings: Annotated[str | None, typer.Option("--rings", metavar="LIST", help="Whose nodes: own, partner, market.")] = None,
    prefer: Annotated[str | None, typer.Option("--prefer", metavar="WHAT", help="cheap or fast.")] = None,
    tier: Annotated[str, typer.Option("--tier", metavar="NAME", help="flex, default or priority.")] = "",
    data: Data = None,
    base_url: BaseUrl = "",
    as_json: AsJson = False,
) -> None:
    """Show what a call would cost, where it could run, and what stops the other offers; nothing is run. Exit code 1 if nothing can."""
    from fallow.cli import quote

    wishes = {
        "deadline_s": deadline,
        "first_token_ms": first_token,
        "max_cost": max_cost,
        "rings": None if rings is None else [ring.strip() for ring in rings.split(",")],
        "prefer": prefer,
    }
    sys.exit(quote.quote(data, base_url, text, model=model, max_tokens=max_tokens, wishes=wishes, tier=tier, as_json=as_json))


@app.command()
def why(
    call: Annotated[str, typer.Argument(metavar="CALL", help="A call's id: the header `fallow-call` of its answer.")],
    data: Data = None,
    base_url: BaseUrl = "",
    as_json: AsJson = False,
) -> None:
    """Tell why a call went where it went: what was predicted, what became of it, what else was possible."""
    from fallow.cli import quote

    sys.exit(quote.why(data, base_url, call, as_json=as_json))


@app.command()
def status(data: Data = None, base_url: BaseUrl = "", as_json: AsJson = False) -> None:
    """Show what runs here: address, key, nodes."""
    from fallow.cli import client

    sys.exit(client.status(data, base_url, as_json=as_json))


@models.command("list")
def models_list(
    data: Data = None,
    here: Annotated[bool, typer.Option("--here", help="Only those whose files are here.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the models of the catalogue, and those of your own."""
    from fallow.cli import models

    sys.exit(models.list_models(data, as_json=as_json, here=here))


@models.command("show")
def models_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of a model."""
    from fallow.cli import models

    sys.exit(models.show(data, name, as_json=as_json))


@models.command("pull")
def models_pull(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="[default: what this machine lends]")] = None,
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="Accept the licence of a model that asks for it.")] = False,
    data: Data = None,
) -> None:
    """Fetch models, or check those that are here."""
    from fallow.cli import models

    sys.exit(models.pull(data, names or [], accept_licence=accept_licence))


@models.command("add")
def models_add(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_SOURCE", help="A file, https://…, or hub:OWNER/REPOSITORY/FILE[@REVISION].")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="[default: from the file's name]")] = "",
    data: Data = None,
) -> None:
    """Add a model of your own to models.toml in the data folder, and print its name."""
    from fallow.cli import models

    sys.exit(models.add(data, source, name))


@models.command("rm")
def models_rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="A model's name or alias.")],
    keep_entry: Annotated[bool, typer.Option("--keep-entry", help="Leave a model of your own in models.toml.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Forget a learnt checksum too: the next pull takes what comes.")] = False,
    data: Data = None,
) -> None:
    """Delete models' files, but for those that other models use; a model of your own leaves models.toml too."""
    from fallow.cli import models

    sys.exit(models.remove(data, names, keep_entry=keep_entry, forget=forget))


@models.command("verify")
def models_verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="[default: all that are here]")] = None,
    data: Data = None,
) -> None:
    """Read the files that are here again, whole, and say whether they are what they should be."""
    from fallow.cli import models

    sys.exit(models.verify(data, names or []))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run a command. Wrong use is exit code 2, an interruption 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
