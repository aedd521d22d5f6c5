"""The commands of who runs a hub: `fallow keys`, `fallow org`, and `fallow hub invite` with its neighbours."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import AsJson, Data, data_of

keys = typer.Typer(no_args_is_help=True, help="API keys of this machine's hub.")
org = typer.Typer(no_args_is_help=True, help="Organisations, and their agreements.")
hub = typer.Typer(help="Run a hub: the meeting point, with its broker.")

KeyId = Annotated[str, typer.Argument(metavar="KEY", help="A key's id, such as key-0123456789ab.")]
Rings = Annotated[str | None, typer.Option("--rings", metavar="LIST", help="Whose nodes: own, partner, market. [default: own,partner]")]
Partners = Annotated[str | None, typer.Option("--partners", metavar="LIST", help="Of its organisation's partners, these only.")]
Regions = Annotated[str | None, typer.Option("--regions", metavar="LIST", help="Where calls may run, such as eu-de.")]
Countries = Annotated[str | None, typer.Option("--countries", metavar="LIST", help="The same by country, such as de,at.")]
Hardware = Annotated[str | None, typer.Option("--hardware", metavar="KIND", help="cpu or gpu.")]
Isolation = Annotated[str | None, typer.Option("--isolation", metavar="LEVEL", help="none, landlock or bwrap at least.")]
Privacy = Annotated[str | None, typer.Option("--privacy", metavar="HOW", help="plain, padded or whole: what sizes and times may tell.")]
Prefer = Annotated[str | None, typer.Option("--prefer", metavar="WHAT", help="cheap or fast.")]
MaxCost = Annotated[float | None, typer.Option("--max-cost", metavar="CREDITS", help="The most that a call may cost; 0: no limit.")]
MaxPrice = Annotated[
    float | None, typer.Option("--max-price", metavar="CREDITS", help="The most for a million output tokens; 0: no limit.")
]
Concurrency = Annotated[int | None, typer.Option("--concurrency", help="Calls at once in each gateway. [default: 256]")]
CallsPerMinute = Annotated[int | None, typer.Option("--calls-per-minute", help="0: no limit.")]
TokensPerMinute = Annotated[int | None, typer.Option("--tokens-per-minute", help="0: no limit.")]
Weight = Annotated[float | None, typer.Option("--weight", help="Its share where work waits. [default: 1]")]
AllowedModels = Annotated[str | None, typer.Option("--models", metavar="LIST", help="These models only; an empty list: all.")]
Budget = Annotated[float | None, typer.Option("--budget", metavar="CREDITS", help="What it may spend in all; 0: no limit.")]
Expires = Annotated[str | None, typer.Option("--expires", metavar="TIME", help="From now: 90m, 12h, 30d; or never.")]
OfOrganisation = Annotated[str, typer.Option("--org", metavar="NAME", help="[default: this machine's]")]
All = Annotated[bool, typer.Option("--all", help="Those that are no good any more as well.")]
NOT_LIMITS = ("name", "org", "role", "id", "data", "as_json")


def _said(context: typer.Context) -> dict[str, object]:
    """The flags that are limits."""
    return {name: value for name, value in context.params.items() if name not in NOT_LIMITS}


@keys.command("create")
def keys_create(
    context: typer.Context,
    name: Annotated[str, typer.Option("--name", help="What it is for; people read it.")] = "",
    org: OfOrganisation = "",
    role: Annotated[str, typer.Option("--role", help="caller, lender (no calls) or operator.")] = "caller",
    rings: Rings = None,
    partners: Partners = None,
    regions: Regions = None,
    countries: Countries = None,
    hardware: Hardware = None,
    isolation: Isolation = None,
    prefer: Prefer = None,
    privacy: Privacy = None,
    max_cost: MaxCost = None,
    max_price: MaxPrice = None,
    concurrency: Concurrency = None,
    calls_per_minute: CallsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    weight: Weight = None,
    models: AllowedModels = None,
    budget: Budget = None,
    expires: Expires = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print its secret, once."""
    from fallow.cli import keys

    sys.exit(keys.create(data, name=name, org=org, role=role, said=_said(context), as_json=as_json))


@keys.command("list")
def keys_list(data: Data = None, all_of_them: All = False, as_json: AsJson = False) -> None:
    """List the keys."""
    from fallow.cli import keys

    sys.exit(keys.list_keys(data, as_json=as_json, all_of_them=all_of_them))


@keys.command("show")
def keys_show(id: KeyId, data: Data = None, as_json: AsJson = False) -> None:
    """Show what a key allows."""
    from fallow.cli import keys

    sys.exit(keys.show(data, id, as_json=as_json))


@keys.command("limit")
def keys_limit(
    context: typer.Context,
    id: KeyId,
    rings: Rings = None,
    partners: Partners = None,
    regions: Regions = None,
    countries: Countries = None,
    hardware: Hardware = None,
    isolation: Isolation = None,
    prefer: Prefer = None,
    privacy: Privacy = None,
    max_cost: MaxCost = None,
    max_price: MaxPrice = None,
    concurrency: Concurrency = None,
    calls_per_minute: CallsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    weight: Weight = None,
    models: AllowedModels = None,
    budget: Budget = None,
    expires: Expires = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Change what a key allows, on every gateway within two seconds; what isn't named stays, an empty text lifts a limit."""
    from fallow.cli import keys

    sys.exit(keys.limit(data, id, said=_said(context), as_json=as_json))


@keys.command("rotate")
def keys_rotate(
    id: KeyId,
    grace: Annotated[str, typer.Option("--grace", metavar="TIME", help="How long the old one still holds; 0: not at all.")] = "24h",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Make a key with the same limits, print its secret, once, and let the old one end."""
    from fallow.cli import keys

    sys.exit(keys.rotate(data, id, grace=grace, as_json=as_json))


@keys.command("revoke")
def keys_revoke(ids: Annotated[list[str], typer.Argument(metavar="KEY...", help="Ids of keys.")], data: Data = None) -> None:
    """End keys for good, on every gateway within two seconds."""
    from fallow.cli import keys

    sys.exit(keys.revoke(data, ids))


@org.command("add")
def org_add(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    key: Annotated[str, typer.Option("--key", metavar="A…", help="Its public key, as its own `fallow org key` prints it.")] = "",
    data: Data = None,
) -> None:
    """Add an organisation to this hub."""
    from fallow.cli import organisations

    sys.exit(organisations.add(data, name, key=key))


@org.command("list")
def org_list(data: Data = None, as_json: AsJson = False) -> None:
    """List this hub's organisations, with their partners."""
    from fallow.cli import organisations

    sys.exit(organisations.list_organisations(data, as_json=as_json))


@org.command("key")
def org_key(data: Data = None) -> None:
    """Print the public key of this machine's organisation."""
    from fallow.cli import organisations

    sys.exit(organisations.key(data))


@org.command("agree")
def org_agree(other: Annotated[str, typer.Argument(metavar="OTHER", help="The other organisation.")], data: Data = None) -> None:
    """Offer another organisation to be partners: prints a signed line for it."""
    from fallow.cli import organisations

    sys.exit(organisations.agree(data, other))


@org.command("countersign")
def org_countersign(
    line: Annotated[str, typer.Argument(metavar="LINE", help="What `fallow org agree` or `countersign` printed on the other side.")],
    data: Data = None,
) -> None:
    """Sign the line of another organisation, and keep the agreement if a hub is here."""
    from fallow.cli import organisations

    sys.exit(organisations.countersign(data, line))


@org.command("keep")
def org_keep(line: Annotated[str, typer.Argument(metavar="LINE", help="One that both have signed.")], data: Data = None) -> None:
    """Keep the agreement of two other organisations in this hub."""
    from fallow.cli import organisations

    sys.exit(organisations.keep(data, line))


@org.command("agreements")
def org_agreements(data: Data = None, as_json: AsJson = False) -> None:
    """List the agreements that this hub keeps."""
    from fallow.cli import organisations

    sys.exit(organisations.agreements(data, as_json=as_json))


@org.command("end")
def org_end(
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The other organisation.")], org: OfOrganisation = "", data: Data = None
) -> None:
    """End an agreement, on every gateway within two seconds."""
    from fallow.cli import organisations

    sys.exit(organisations.end(data, other, org=org))


@hub.command("init")
def hub_init(
    context: typer.Context,
    offline: Annotated[
        Path | None,
        typer.Option("--offline", metavar="DIR", help="Move the operator's and the accounts' keys there, to keep them elsewhere."),
    ] = None,
    data: Data = None,
) -> None:
    """Make all keys and the database of a hub now; `fallow hub` does it by itself. Nothing that is there is changed."""
    from fallow.cli import hub_init

    sys.exit(hub_init.init(data or data_of(context), offline))


@hub.command("invite")
def hub_invite(
    context: typer.Context,
    org: OfOrganisation = "",
    role: Annotated[list[str] | None, typer.Option("--role", help="node or gateway; may be given for each. [default: node]")] = None,
    uses: Annotated[str, typer.Option("--uses", help="How many machines may join by it, or any.")] = "1",
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="From now: 90m, 12h, 30d; or never.")] = "7d",
    address: Annotated[
        list[str] | None,
        typer.Option("--address", metavar="ADDRESS", help="Where the hub is reached. [default: as the one running here says]"),
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Let machines join: prints a token for `fallow lend --join TOKEN`."""
    from fallow.cli import members

    folder = data or data_of(context)
    roles = role or ["node"]
    sys.exit(members.invite(folder, org=org, roles=roles, uses=uses, lasts=expires, addresses=address or [], as_json=as_json))


@hub.command("invites")
def hub_invites(
    context: typer.Context,
    end: Annotated[str, typer.Option("--end", metavar="INVITATION", help="End this one.")] = "",
    data: Data = None,
    all_of_them: All = False,
    as_json: AsJson = False,
) -> None:
    """List the invitations, or end one."""
    from fallow.cli import members

    sys.exit(members.invites(data or data_of(context), as_json=as_json, all_of_them=all_of_them, end=end))


@hub.command("members")
def hub_members(context: typer.Context, data: Data = None, as_json: AsJson = False) -> None:
    """List the nodes and gateways that joined."""
    from fallow.cli import members

    sys.exit(members.members(data or data_of(context), as_json=as_json))


@hub.command("ban")
def hub_ban(
    context: typer.Context,
    member: Annotated[str, typer.Argument(metavar="MEMBER", help="Its public key, or how it begins.")],
    why: Annotated[str, typer.Option("--why", help="The reason, for who looks later.")] = "",
    data: Data = None,
) -> None:
    """Put a node or a gateway out, within a second, and keep it out."""
    from fallow.cli import members

    sys.exit(members.ban(data or data_of(context), member, why=why))


@hub.command("unban")
def hub_unban(
    context: typer.Context,
    member: Annotated[str, typer.Argument(metavar="MEMBER", help="Its public key, or how it begins.")],
    data: Data = None,
) -> None:
    """Let a node or a gateway in again."""
    from fallow.cli import members

    sys.exit(members.unban(data or data_of(context), member))


@hub.command("refusals")
def hub_refusals(context: typer.Context, data: Data = None, as_json: AsJson = False) -> None:
    """Show what the hub and its broker refused: logins, requests to join, cards; why, how often, and when last."""
    from fallow.cli import members

    sys.exit(members.refusals(data or data_of(context), as_json=as_json))


@hub.command("log")
def hub_log(
    context: typer.Context,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=10_000, help="How many.")] = 30,
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Of this node only; how its public key begins is enough.")] = "",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show the public log of nodes' cards, and check that nobody changed it."""
    from fallow.cli import members

    sys.exit(members.log(data or data_of(context), lines=lines, node=node, as_json=as_json))
