"""Who takes part, in SQL: the parts of the registry on one database."""

from fallow.adapters.sql.card_log import SqlCardLog
from fallow.adapters.sql.changes import changes_after
from fallow.adapters.sql.database import Database, open_database
from fallow.adapters.sql.keys import SqlKeys
from fallow.adapters.sql.members import SqlMembers
from fallow.adapters.sql.migrate import migrate
from fallow.adapters.sql.organisations import SqlOrganisations
from fallow.adapters.sql.spending import SqlSpending
from fallow.ports import Changes


class SqlRegistry:
    """Fills ports.Registry. Any thread may call it, and any number of processes may have one on the same database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.organisations = SqlOrganisations(database)
        self.members = SqlMembers(database)
        self.keys = SqlKeys(database)
        self.spending = SqlSpending(database)
        self.cards = SqlCardLog(database)

    def changes_after(self, number: int) -> Changes:
        """Which API keys changed after change `number`; 0 is before the first."""
        return changes_after(self._database, number)

    def close(self) -> None:
        """Let all connections go."""
        self._database.close()


def open_registry(url: str) -> SqlRegistry:
    """The registry at `sqlite:///path` or `postgresql://…`, brought to the newest schema first. Raises StoreFailed or MissingExtra."""
    database = open_database(url)
    try:
        migrate(database)
    except BaseException:
        database.close()
        raise
    return SqlRegistry(database)
