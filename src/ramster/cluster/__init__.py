"""Who belongs to the cluster: names, numbers, certificates."""
