"""What each number is: structure, bleeding, spectrum, similarity, fidelity, lens. Definitions: docs/metrics.md."""
