"""The chain as the rest of bsns sees it: contract bindings, decoded events and errors, deployment, signing and
submission.

Nothing outside this package talks to web3. `ChainClient` is the boundary; `Web3ChainClient` is its implementation
over JSON-RPC, and the tests have a simulated one.
"""
