"""The service that plans: it watches the chain, plans which node serves which shard units, routes requests and closes
what is open.

It can never slash, move a deposit or stop a withdrawal. No torch anywhere.
"""
