"""All that runs at the coordinator."""
