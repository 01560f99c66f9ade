"""The gateway: the network for people who have an HTTP client and no wallet at hand, and pages to look at it.

`openai_api` and `account_api` are its routes, `model_desk` brings answers from the network, `treasury` moves money on
the chain, `access` and `perimeter` say who may come in. A process of its own: it reads the coordinator's database and
pays like any other requester; the network does not need it, and it cannot do more than any other requester can.
"""
