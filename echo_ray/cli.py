"""The `echo-ray` command: finds the subcommand, imports only that one, prints errors plainly."""
