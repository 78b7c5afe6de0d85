"""What both ends compute from names and shapes alone: manifests, byte layouts, weight maps, fingerprints."""
