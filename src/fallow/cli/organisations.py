"""`fallow org`: organisations, their keys, and agreements between two of them."""

from pathlib import Path

from fallow.apps.hub import registrar
from fallow.apps.hub.founding import own_key
from fallow.apps.hub.key_desk import Agreements
from fallow.apps.settings import ORGANISATION_KEY_FILE, Settings
from fallow.cli.registry_desk import Desk, at_desk, is_hub_here, local, opened, print_json, print_table, say, told, utc
from fallow.core.membership import is_in_force, partners_of
from fallow.model.errors import BadFlag, WireError
from fallow.model.ids import OrgId
from fallow.wire import agreement_line


def add(data: Path | None, name: str, *, key: str) -> int:
    """`fallow org add`."""

    def act(desk: Desk) -> None:
        made = registrar.add_organisation(desk.registry, OrgId(name), public_key=key, now_ms=desk.now_ms)
        print(f"{made.id} is an organisation of this hub" + ("" if key else "; without a public key it can't agree with others"))

    return at_desk(data, act)


def list_organisations(data: Path | None, *, as_json: bool) -> int:
    """`fallow org list`."""

    def act(desk: Desk) -> None:
        desk.own()
        agreements = Agreements(desk.registry).signed()
        members = desk.registry.members.all()
        documents = [
            {
                "id": one.id,
                "public_key": one.public_key,
                "partners": sorted(partners_of(one.id, agreements, desk.now_ms)),
                "members": sum(member.org_id == one.id and member.banned_at_ms is None for member in members),
                "created_at": utc(one.created_at_ms),
                "since": local(one.created_at_ms),
            }
            for one in desk.registry.organisations.all()
        ]
        if as_json:
            return print_json([{name: value for name, value in one.items() if name != "since"} for one in documents])
        rows = [
            [str(one["id"]), ", ".join(one["partners"]), str(one["members"]), str(one["since"]), str(one["public_key"])]  # type: ignore[arg-type]
            for one in documents
        ]
        print_table(("organisation", "partners", "members", "since", "public key"), rows, "no organisations yet")

    return at_desk(data, act)


def key(data: Path | None) -> int:
    """`fallow org key`."""

    def act(settings: Settings) -> None:
        own, pair = own_key(settings)
        say(f"The public key of {own}, which this machine is of. Its private half is in {settings.data / ORGANISATION_KEY_FILE}.")
        print(pair.public)

    return told(data, act)


def agree(data: Path | None, other: str) -> int:
    """`fallow org agree`."""

    def act(settings: Settings) -> None:
        from fallow.adapters.clock import SystemClock

        own, pair = own_key(settings)
        if other == own:
            raise BadFlag(f"this machine is of {own} itself; name the other organisation")
        try:
            line = agreement_line.proposed(own, OrgId(other), begins_at_ms=SystemClock().wall_ms())
        except WireError as error:
            raise BadFlag(error.message) from None
        say(f"Pass this line to {other}, who runs `fallow org countersign LINE` and passes back what that prints. Nothing in it is secret.")
        print(agreement_line.write(agreement_line.signed(line, own, pair.public, pair.sign)))

    return told(data, act)


def countersign(data: Path | None, text: str) -> int:
    """`fallow org countersign`."""

    def act(settings: Settings) -> None:
        own, pair = own_key(settings)
        came = agreement_line.read(text)
        line = registrar.countersigned(came, own, pair.public, pair.sign)
        other = line.right if line.left == own else line.left
        other_key = line.keys.get(OrgId(other), "")
        if not other_key:
            raise WireError(f"this is your own line: pass it to {other}, who countersigns it")
        say(f"{other} signed with {other_key}.")
        if is_hub_here(settings):
            with opened(settings) as desk:
                desk.own()
                registrar.store_agreement(desk.registry, line, now_ms=desk.now_ms)
            say(f"This hub keeps it: {own} and {other} are partners.")
        if line != came:
            say(f"Pass this line back to {other}, whose hub keeps it after `fallow org countersign LINE`.")
            print(agreement_line.write(line))
        elif not is_hub_here(settings):
            say("Both have signed, and no hub is here to keep it: who runs yours gives it to `fallow org keep LINE`.")

    return told(data, act)


def keep(data: Path | None, text: str) -> int:
    """`fallow org keep`: an agreement that two others have signed."""

    def act(desk: Desk) -> None:
        agreement = registrar.store_agreement(desk.registry, agreement_line.read(text), now_ms=desk.now_ms)
        print(f"{agreement.left} and {agreement.right} are partners")

    return at_desk(data, act)


def agreements(data: Path | None, *, as_json: bool) -> int:
    """`fallow org agreements`."""

    def act(desk: Desk) -> None:
        found = desk.registry.organisations.agreements()
        signed = Agreements(desk.registry).signed()
        documents = [
            {
                "left": one.left,
                "right": one.right,
                "begins_at": utc(one.begins_at_ms),
                "ends_at": utc(one.ends_at_ms),
                "state": "not signed" if one not in signed else "in force" if is_in_force(one, desk.now_ms) else "ended",
            }
            for one in found
        ]
        if as_json:
            return print_json(documents)
        rows = [
            [one.left, one.right, str(document["state"]), local(one.begins_at_ms), local(one.ends_at_ms)]
            for one, document in zip(found, documents, strict=True)
        ]
        print_table(("organisation", "and", "state", "since", "ended"), rows, "no agreements yet; `fallow org agree` begins one")

    return at_desk(data, act)


def end(data: Path | None, other: str, *, org: str) -> int:
    """`fallow org end`."""

    def act(desk: Desk) -> None:
        one = desk.organisation(org)
        registrar.end_agreement(desk.registry, one, OrgId(other), now_ms=desk.now_ms)
        print(f"{one} and {other} are partners no more")

    return at_desk(data, act)
