"""Alembic's entry: runs migrations on the connection, and in the transaction, that `database` gives it."""

from alembic import context

from stockpot.accounts.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata(),
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
