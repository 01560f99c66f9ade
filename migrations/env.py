"""Runs the migrations. The caller (coordinator.storage.migrate) hands over an engine; the plain `alembic` command
takes the database from `-x url=…`. One transaction for all steps, so that a failing one leaves the tables as they
were.
"""

from __future__ import annotations

from alembic import context

from coordinator.storage import migration_engine

config = context.config
engine_factory = config.attributes.get("engine")
if engine_factory is None:
    url = context.get_x_argument(as_dictionary=True).get("url")
    if url is None:
        raise SystemExit("give the database: alembic -x url=sqlite:///coordinator.sqlite upgrade head")
    engine = migration_engine(url)
else:
    engine = engine_factory()

try:
    with engine.begin() as connection:
        # SQLite cannot alter most things in place: batch mode copies the table.
        context.configure(
            connection=connection, target_metadata=config.attributes.get("metadata"), render_as_batch=True
        )
        with context.begin_transaction():
            context.run_migrations()
finally:
    engine.dispose()
