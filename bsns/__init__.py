"""The protocol library of bsns: what requesters, nodes, the coordinator and auditors must agree on."""
