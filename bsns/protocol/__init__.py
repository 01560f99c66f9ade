"""Pure protocol rules: no torch, no I/O. Each module is one rule that several parties must compute alike."""
