"""The service that executes: serves shards of models to paid requests, commits to what it did, and re-executes what
others did.
"""
