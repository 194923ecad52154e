"""Linear probes of all layers together: the protocol, the fits in memory or block by block, the solver."""
