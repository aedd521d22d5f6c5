"""What Alembic runs for each migration; `migrate.py` gives it the connection, in whose transaction all steps are done."""

from alembic import context

from fallow.adapters.sql.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
