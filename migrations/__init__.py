"""Alembic migrations of the coordinator's database: `bsns-coordinator migrate`. Each goes up and down, with data in
the tables.
"""
